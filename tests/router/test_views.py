"""What the router shows of itself."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import subprocess

import pytest
from prometheus_client.parser import text_string_to_metric_families

from router.stack import HYBRID, LONG, Stack

NAMES = ("chromium", "chromium-headless-shell", "google-chrome", "chrome")
CHROMIUM = next(filter(None, map(shutil.which, NAMES)), None)
BUSY = {
    **HYBRID,
    "cache": {"codec": "turboquant-4", "bytes": 2_700_000, "bytes_fp16": 10_500_000},
}


@pytest.fixture(scope="module")
def stack():
    with Stack() as stack:
        stack.sidecar.health = BUSY
        stack.probe()
        stack.chat("hello", model="qwen")
        stack.chat(LONG, stream=True)
        stack.chat(model="nobody")
        stack.run(stack.ollama.stop())
        stack.chat("hello", model="local:")
        stack.settle()
        yield stack


def samples(stack: Stack) -> dict[str, float]:
    """Every sample, as `name{labels}`; this is Prometheus' own parser."""
    found = {}
    for family in text_string_to_metric_families(stack.http.get("/metrics").text):
        for sample in family.samples:
            labels = ",".join(f"{k}={v}" for k, v in sorted(sample.labels.items()))
            found[f"{sample.name}{{{labels}}}"] = sample.value
    return found


def test_metrics_tell_every_request_and_why(stack):
    found = samples(stack)
    chat = "path=/v1/chat/completions"
    name = "tqstack_router_requests_total"
    assert found[f"{name}{{backend=ollama,outcome=ok,{chat},reason=short-prompt}}"] == 1
    assert found[f"{name}{{backend=sidecar,outcome=ok,{chat},reason=long-prompt}}"] == 1
    assert found[f"{name}{{backend=,outcome=refused,{chat},reason=}}"] == 1
    assert found["tqstack_router_fallbacks_total{from=ollama,to=sidecar}"] == 1
    assert found["tqstack_router_backend_state{backend=ollama,state=down}"] == 1
    assert found["tqstack_router_backend_running{backend=sidecar}"] == 0


def test_metrics_have_the_gen_ai_histograms(stack):
    found = samples(stack)
    side = "gen_ai_provider_name=sidecar"
    assert found[f"gen_ai_server_time_to_first_token_seconds_count{{{side}}}"] == 1
    assert found[f"gen_ai_server_request_duration_seconds_count{{{side}}}"] == 2
    assert found[f"gen_ai_client_token_usage_sum{{{side},gen_ai_token_type=input}}"] == 10


def test_status_tells_the_decision_tokens_and_times_of_each_request(stack):
    status = stack.http.get("/status").json()
    last, refused, long, short = status["recent"]
    assert (short["backend"], short["reason"], short["model"]) == ("ollama", "short-prompt", "qwen")
    assert (short["prompt_tokens"], short["output_tokens"]) == (10, 2)
    assert long["estimate"] > 16_000
    assert long["first_token"] <= long["seconds"]
    assert (refused["outcome"], refused["status"]) == ("refused", 400)
    assert (last["backend"], last["fallback_from"]) == ("sidecar", "ollama")
    assert status["requests"] == []
    assert status["backends"]["sidecar"]["health"]["cache"]["bytes"] == 2_700_000


def test_the_log_has_a_json_line_per_request_without_prompts_or_keys(stack, caplog):
    with caplog.at_level(logging.INFO, logger="tqstack.router.journal"):
        headers = {"authorization": "Bearer sk-secret", "cookie": "id=1"}
        body = {"messages": [{"role": "user", "content": "my private words"}]}
        stack.http.post("/v1/chat/completions", json=body, headers=headers)
        stack.settle()
    line = json.loads(caplog.records[-1].message)
    assert (line["backend"], line["outcome"]) == ("sidecar", "ok")
    for secret in ("private", "sk-secret", "id=1"):
        assert secret not in caplog.text


def test_the_page_is_one_file_that_asks_nobody_else(stack):
    response = stack.http.get("/")
    assert response.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in response.headers["content-security-policy"]
    assert not re.findall(r'(?:src|href)="(?!data:)', response.text)


@pytest.mark.skipif(not CHROMIUM, reason="no Chromium on this machine")
def test_the_page_shows_it_all_in_a_browser(stack, tmp_path):
    assert CHROMIUM
    command = [
        *(CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run"),
        *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
        *("--virtual-time-budget=4000", "--dump-dom", stack.url),
    ]
    # The tests run with OpenBLAS preloaded, which Chromium does not survive.
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    dom = subprocess.run(
        [*command, f"--user-data-dir={tmp_path}"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    ).stdout
    text = re.sub(r"<script>.*</script>", "", dom, flags=re.DOTALL)
    for shown in (
        "16,000 tokens and more go to the sidecar",
        "turboquant-4",
        "2.7 MB of 10.5 MB in 16 bits",
        "short-prompt",
        "sidecar ⤺ ollama",
        "state down",
        "there is no model",
        "no connection to 127.0.0.1",
        "fallbacks: ",
    ):
        assert shown in text, shown
