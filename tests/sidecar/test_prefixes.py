"""A sidecar over HTTP: prompts are read once, also across a restart, in bounded memory."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import httpx
import pytest

from processes import clean_environment, free_port, running, wait_for, wait_until
from sidecar.clients import demo_client
from tqstack import demo_model

TEXT = demo_model.held_out_tokens()[:6000].tolist()


class Sidecar:
    """A sidecar that is asked for completions."""

    def __init__(self, client: httpx.Client):
        self.client = client

    def ask(self, tokens, limit=4, **fields):
        body = {"model": "demo", "prompt": tokens, "max_tokens": limit, "temperature": 0, **fields}
        return self.client.post("/v1/completions", json=body)

    def answer(self, tokens, **fields):
        """(text, cached tokens)"""
        body = self.ask(tokens, **fields).raise_for_status().json()
        cached = body["usage"]["prompt_tokens_details"]["cached_tokens"]
        return body["choices"][0]["text"], cached

    def health(self):
        return self.client.get("/health").json()


@contextmanager
def process(home, **settings):
    """A sidecar in a process of its own."""
    port, log = free_port(), home / "sidecar.log"
    environment = clean_environment(home, SIDECAR_PORT=str(port), **settings)
    url = f"http://127.0.0.1:{port}"
    with running(["-m", "tqstack", "sidecar"], environment, log):
        wait_for(f"{url}/health", log)
        with httpx.Client(base_url=url, timeout=120, trust_env=False) as client:
            yield Sidecar(client)


@contextmanager
def here(**settings):
    """A sidecar in this process."""
    with demo_client(**settings) as client:
        yield Sidecar(client)


@pytest.mark.parametrize("idle", ["0", "0.5"])
def test_prefixes_outlive_the_process_and_an_idle_unload(tmp_path, idle):
    settings = {"SIDECAR_PREFIX_DISK_GB": "1", "XDG_CACHE_HOME": str(tmp_path / "cache")}
    settings["SIDECAR_IDLE_UNLOAD_SECONDS"] = idle
    with process(tmp_path, **settings) as first:
        cold, cached = first.answer(TEXT[:3000])
        assert cached == 0
        if idle != "0":
            wait_until(lambda: first.health()["lifecycle"]["state"] == "unloaded", "unloaded")
            assert first.answer(TEXT[:3000]) == (cold, 2991)
    with process(tmp_path, **settings) as second:
        assert second.answer(TEXT[:3000]) == (cold, 2991)
        assert second.health()["prefixes"]["disk"]["read"] > 0


def test_health_tells_budget_parts_and_why_prompts_were_read():
    with here(sidecar_memory_mb=300) as sidecar:
        sidecar.answer(TEXT[:1000])
        sidecar.answer(TEXT[:1500])
        sidecar.answer(TEXT[:500] + TEXT[3000:3500])
        told = sidecar.health()
        memory = told["memory"]
        assert memory["budget"] == 300 << 20
        assert memory["held"] == sum(memory["parts"].values()) <= memory["budget"]
        assert memory["parts"]["checkpoints"] > 0 and memory["parts"]["weights"] > 70 << 20
        assert told["prefixes"]["misses"] == {"new": 1, "no_checkpoint": 1}
        metrics = sidecar.client.get("/metrics").text
        assert 'tqstack_sidecar_prefix_misses_total{why="no_checkpoint"} 1.0' in metrics


def test_a_request_that_says_so_leaves_no_prefix():
    with here() as sidecar:
        first = sidecar.answer(TEXT[:800], cache_prompt=False)
        assert sidecar.health()["prefixes"]["checkpoints"] == 0
        assert sidecar.answer(TEXT[:800]) == first == (first[0], 0)


def test_a_full_queue_is_a_429_that_says_when_to_come_again():
    with (
        here(sidecar_max_batch=1, sidecar_max_queue=1) as sidecar,
        ThreadPoolExecutor(4) as pool,
    ):
        asked = [pool.submit(sidecar.ask, TEXT[i : i + 300], 80) for i in range(4)]
        answers = [future.result() for future in asked]
    refused = [answer for answer in answers if answer.status_code == 429]
    assert 1 <= len(refused) < 4
    assert {answer.status_code for answer in answers} == {200, 429}
    assert refused[0].headers["retry-after"] == "5"
    assert refused[0].json()["error"]["code"] == "queue_full"
    assert "x-should-retry" not in refused[0].headers


def test_the_quantized_cache_of_mlx_lm_is_served():
    with here(tq_cache_version="native") as sidecar, ThreadPoolExecutor(3) as pool:
        told = sidecar.health()
        assert told["cache"]["codec"] == "mlx4-g64"
        assert "one request at a time" in told["model"]["note"]
        texts = list(pool.map(lambda i: sidecar.answer(TEXT[:900])[0], range(3)))
        assert len(set(texts)) == 1 and texts[0]
