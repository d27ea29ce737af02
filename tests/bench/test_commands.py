"""Both commands as processes of their own, against a real sidecar and a real mlx_lm.server."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import time

import psutil
import pytest

from commands import called
from processes import clean_environment, free_port, running, tqstack, wait_for, wait_until
from tqstack import demo_model


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """An mlx_lm.server as the commands' help tells to start it, and as `--url` takes it."""
    home = tmp_path_factory.mktemp("other")
    environment, copy, log = clean_environment(home), str(home / "copy"), home / "log"
    options = ("--model", str(demo_model.PATH), "--mlx-path", copy, "-d", "--dtype", "float32")
    command = [sys.executable, "-m", "mlx_lm", "convert", *options]
    subprocess.run(command, env=environment, check=True, capture_output=True)
    port = free_port()
    argv = ["-m", "mlx_lm", "server", "--model", copy, "--port", str(port)]
    with running(argv, environment, log):
        wait_for(f"http://127.0.0.1:{port}/health", log)
        yield f"http://127.0.0.1:{port},default_model"


def run(home, *arguments: str) -> dict:
    """What a command writes into its file."""
    output = home / "figures.json"
    result = tqstack(home, "bench", *arguments, "--output", str(output))
    assert result.returncode == 0, result.stderr + result.stdout
    return json.loads(output.read_text())


def test_serving_measures_both_servers(tmp_path, other):
    sizes = ("--prompt-tokens", "40", "--generation-tokens", "6", "--rounds", "1")
    options = ("--concurrency", "1,3", "--schema", "--url", other)
    figures = run(tmp_path, "serving", "demo", *sizes, *options)
    names = [server["name"] for server in figures["servers"]]
    assert names[0] == "sidecar" and len(names) == 2
    found = [(row["server"], row["concurrency"], row["schema"]) for row in figures["rows"]]
    assert found == list(itertools.product(names, (1, 3), (False, True)))
    for free, forced in zip(figures["rows"][::2], figures["rows"][1::2], strict=True):
        timed = free["decode_tps"] and forced["decode_tps"]  # an answer in one event has no gaps
        assert free["overhead"] is None and (forced["overhead"] is None) == (not timed)
    for row in figures["rows"]:
        assert (row["requests"], row["errors"]) == (row["concurrency"], 0), row["error"]
        assert 30 <= row["prompt_tokens"] <= 45 and 1 <= row["generated_tokens"] <= 6
        assert row["output_tps"] > 0 and row["first_token_s"] <= row["first_token_s_p95"]


def test_serving_tells_what_a_long_prompt_does(tmp_path):
    sizes = ("--prompt-tokens", "40", "--generation-tokens", "5", "--rounds", "1")
    (row,) = run(tmp_path, "serving", "--long-prompt", "1500", *sizes)["rows"]
    assert row["errors"] == 0, row["error"]
    assert 1450 <= row["long_prompt_tokens"] <= 1510
    assert row["before_tps"] > 0 and row["ratio"] == row["during_tps"] / row["before_tps"]
    assert row["short_first_token_s"] > 0 and row["long_first_token_s"] > 0


def test_agent_accounts_for_both_servers(tmp_path, other):
    sizes = ("--turns", "3", "--system-tokens", "300", "--answer-tokens", "4")
    names = "tool-session,edited-message"
    figures = run(tmp_path, "agent", *sizes, "--scenarios", names, "--url", other)
    rows = [row for row in figures["rows"] if row["scenario"] == "tool-session"]
    assert [row["turn"] for row in rows] == [1, 1, 2, 2, 3, 3]
    for row in rows:
        assert not row["error"] and row["prompt_tokens"] > 300 and row["first_token_s"] > 0
        assert 0 <= row["cached_tokens"] < row["prompt_tokens"]
        assert (row["reusable_tokens"] > 300) == (row["turn"] > 1)
    assert [row["cold"] for row in rows] == [True, True, False, False, False, False]
    assert len(figures["scenarios"]) == 4
    assert all(row["warm_first_token_s"] > 0 for row in figures["scenarios"])


def test_a_client_that_leaves_and_comes_again_gets_its_answer(tmp_path):
    sizes = ("--document-tokens", "3000", "--answer-tokens", "2")
    left, again = run(tmp_path, "agent", "--scenarios", "cancelled", *sizes)["rows"]
    assert left["first_token_s"] is None and left["cached_tokens"] is None
    assert not again["error"] and again["prompt_tokens"] > 2900
    assert again["first_token_s"] > 0 and again["reusable_tokens"] > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("serving", "--url", "http://127.0.0.1:{port}"), "does not answer"),
        (("agent", "--no-sidecar"), "give --url"),
        (("agent", "--scenarios", "tools"), "allowed: tool-session"),
        (("serving", "--concurrency", "0"), "at least 1"),
        (("agent", "no-such-folder"), "give demo, a model's folder, or owner/name"),
    ],
)
def test_what_cannot_be_measured_is_said(tmp_path, arguments, message):
    port = str(free_port())
    result = called(tmp_path, "bench", *(part.format(port=port) for part in arguments))
    assert result.exit_code in (1, 2) and message in result.stderr


def test_a_command_that_is_ended_takes_its_sidecar_with_it(tmp_path):
    command = [sys.executable, "-m", "tqstack", "bench", "serving", "--rounds", "500"]
    process = subprocess.Popen(
        command,
        env=clean_environment(tmp_path),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    children: list[psutil.Process] = []
    try:
        wait_until(lambda: psutil.Process(process.pid).children(), "a sidecar is started")
        children = psutil.Process(process.pid).children()
        time.sleep(1)
        process.terminate()
        assert process.wait(30) == 143
        assert not any(child.is_running() for child in children)
    finally:
        for leftover in (process, *children):
            if isinstance(leftover, subprocess.Popen) or leftover.is_running():
                leftover.kill()
        process.wait()
