"""The model comes and goes; requests do not notice, but that they wait."""

from __future__ import annotations

import gc
import json
import queue
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx
import mlx.core as mx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.testclient import TestClient

from engine.jobs import answer, submit
from processes import clean_environment, free_port, get, running, wait_for, wait_until
from tqstack.engine.engine import Engine
from tqstack.engine.jobs import JobError
from tqstack.models.geometry import UnknownGeometryError
from tqstack.models.plan import Plan
from tqstack.settings import Settings
from tqstack.sidecar.app import create_app
from tqstack.sidecar.loader import Loader
from tqstack.sidecar.ollama import USEFUL_TOKENS, must_free

SETTINGS = Settings(sidecar_model="demo", sidecar_frees_ollama="0")
sizes = st.integers(0, 10**11)


@given(sizes, sizes, sizes)
def test_ollama_is_asked_exactly_if_both_do_not_fit(budget, weights, held):
    plan = Plan(budget, weights, 5200, 20_480, 10**7, 10**9)
    together = plan.total(USEFUL_TOKENS) + held
    assert must_free("auto", plan, held) == (held > 0 and together > budget)
    assert must_free("1", plan, held) == (held > 0)
    assert not must_free("0", plan, held)
    assert not must_free("auto", None, held)


def ask(engine, tokens=range(40, 60)):
    _, events = submit(engine, tokens, max_tokens=6)
    return answer(events, seconds=120)


def state(engine):
    return engine.status()["lifecycle"]["state"]


def test_a_lazy_engine_loads_for_a_job_and_unloads_when_idle():
    loader = Loader(SETTINGS)
    gc.collect()
    before = mx.get_active_memory()
    engine = Engine(loader.load, unloaded=loader.planned(), idle_seconds=0.5)
    engine.start()
    try:
        assert state(engine) == "unloaded" and not engine.lifecycle.starting
        weights = engine.lifecycle.facts.plan.weights
        first = ask(engine)
        assert mx.get_active_memory() - before > weights
        wait_until(lambda: state(engine) == "unloaded", "unloaded")
        assert mx.get_active_memory() - before < weights / 10
        assert ask(engine) == first
        told = engine.status()["lifecycle"]
        assert (told["loads"], told["unloads"]) == (2, 1)
    finally:
        engine.close()


def test_an_engine_without_a_time_to_live_keeps_its_model():
    engine = Engine(Loader(SETTINGS).load)
    engine.start()
    assert engine.ready().result(60).id == "demo"
    time.sleep(1)
    assert state(engine) == "loaded"
    engine.close()


def test_the_facts_of_an_unloaded_model_are_those_of_the_loaded_one():
    loader = Loader(SETTINGS)
    planned, runtime = loader.planned(), loader.load()
    assert planned.codec == runtime.codec
    assert planned.describe() == {**runtime.describe(), "compressed_layers": []}
    assert replace(planned.plan, budget=0) == replace(runtime.plan, budget=0)


def test_a_model_whose_layers_are_unknown_is_loaded_when_it_is_needed(monkeypatch):
    def unknown(config):
        raise UnknownGeometryError("no formula")

    monkeypatch.setattr("tqstack.models.spec.read_geometry", unknown)
    app = create_app(SETTINGS.model_copy(update={"sidecar_lazy_load": "1"}))
    with TestClient(app, base_url="http://127.0.0.1") as client:
        told = client.get("/health").json()
        assert (told["status"], told["lifecycle"]["state"]) == ("ok", "unloaded")
        assert told["model"] == {"id": "demo", "context_length": 32768, "compressed_layers": []}
        assert told["cache"]["codec"] == "tq4" and "memory_plan" not in told
        assert client.get("/v1/models").json()["data"][0]["context_length"] == 32768
        request = {"model": "demo", "prompt": "def", "max_tokens": 2}
        assert client.post("/v1/completions", json=request).status_code == 200
        told = client.get("/health").json()
        assert told["model"]["compressed_layers"] == [3, 7]
        assert told["memory_plan"]["workspace"] > 10**7


def test_all_who_wait_for_a_model_that_does_not_load_are_told_why():
    loader, failures, held = Loader(SETTINGS), queue.SimpleQueue(), threading.Event()

    def load():
        held.wait(10)
        raise OSError("the disk is gone")

    engine = Engine(load, on_failure=failures.put, unloaded=loader.planned())
    engine.start()
    first, second = engine.ready(), engine.ready()
    held.set()
    for future in (first, second):
        with pytest.raises(JobError, match="the disk is gone"):
            future.result(10)
    assert isinstance(failures.get(timeout=5), OSError)
    assert ask(engine).code == "no_model"
    engine.close()


class Ollama(ThreadingHTTPServer):
    """Holds a model in memory until it is asked to let go of it."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), OllamaHandler)
        self.models = {"big:70b": 10**15}  # more than any machine has
        self.asked: list[dict] = []
        self.url = f"http://127.0.0.1:{self.server_port}"


class OllamaHandler(BaseHTTPRequestHandler):
    server: Ollama

    def _answer(self, body) -> None:
        data = json.dumps(body).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self) -> None:
        models = [{"name": name, "size": size} for name, size in self.server.models.items()]
        self._answer({"models": models})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.server.asked.append({"path": self.path, **body})
        # The answer comes before the memory: an answer under way is finished first.
        threading.Timer(0.3, self.server.models.pop, (body["model"], None)).start()
        self._answer({"done": True, "done_reason": "unload"})

    def log_message(self, *arguments) -> None:
        pass


@pytest.fixture
def ollama():
    server = Ollama()
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def test_load_unload_and_reload_under_traffic_lose_no_request(tmp_path, ollama):
    """A real sidecar whose model is unloaded in every pause that is long enough."""
    port, log = free_port(), tmp_path / "log"
    environment = clean_environment(
        tmp_path,
        SIDECAR_MODEL="demo",
        SIDECAR_PORT=str(port),
        SIDECAR_LAZY_LOAD="1",
        SIDECAR_IDLE_UNLOAD_SECONDS="0.3",
        OLLAMA_BASE_URL=ollama.url,
    )
    url = f"http://127.0.0.1:{port}"
    request = {
        "model": "demo",
        "messages": [{"role": "user", "content": "def main():"}],
        "max_tokens": 3,
        "temperature": 0,
    }

    def talk(seed: int) -> list[str]:
        chance, answers = random.Random(seed), []
        with httpx.Client(trust_env=False, timeout=120) as client:
            for _ in range(4):
                response = client.post(f"{url}/v1/chat/completions", json=request)
                assert response.status_code == 200, response.text
                answers.append(response.json()["choices"][0]["message"]["content"])
                time.sleep(chance.choice((0, 0.3, 1.0)))
        return answers

    def health() -> dict:
        return get(f"{url}/health").json()

    with running(["-m", "tqstack", "sidecar"], environment, log):
        wait_for(f"{url}/health", log)
        told = health()
        assert told["lifecycle"]["state"] == "unloaded" and told["lifecycle"]["loads"] == 0
        assert told["model"]["context_length"] == 32_768
        assert get(f"{url}/v1/models").json()["data"][0]["id"] == "demo"
        wrong = httpx.post(f"{url}/v1/completions", json={"model": "gpt", "prompt": "x"})
        assert wrong.status_code == 400 and health()["lifecycle"]["loads"] == 0
        with ThreadPoolExecutor(3) as pool:
            first = [answer for answers in pool.map(talk, range(3)) for answer in answers]
        wait_until(lambda: health()["lifecycle"]["state"] == "unloaded", "unloaded")
        again = talk(4)
        assert len(first) == 12 and len({*first, *again}) == 1
        told = health()["lifecycle"]
        assert told["loads"] >= 2 and told["unloads"] >= 1
    # Both did not fit, so the first load asked, once.
    assert ollama.asked == [{"path": "/api/generate", "model": "big:70b", "keep_alive": 0}]
    assert ollama.models == {}
