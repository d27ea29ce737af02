from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tqstack.settings import Settings, SettingsError, load_settings


@pytest.fixture(autouse=True)
def empty_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("TQSTACK_CONFIG", raising=False)
    for name in Settings.model_fields:
        monkeypatch.delenv(name.upper(), raising=False)


def test_defaults_are_the_documented_ones():
    settings = load_settings()
    assert (settings.router_url, settings.sidecar_url) == (
        "http://127.0.0.1:8000",
        "http://127.0.0.1:8001",
    )
    assert (settings.tq_kv_bits, settings.prompt_token_threshold) == ("4", "auto")
    assert (settings.tq_kv_code, settings.tq_exact_tokens) == ("auto", 128)


def test_the_environment_wins_over_the_file(tmp_path, monkeypatch):
    file = tmp_path / "my.env"
    file.write_text("ROUTER_PORT=8100  # a comment\nTQ_KV_BITS=3\nOLLAMA_MODEL=\n")
    monkeypatch.setenv("TQSTACK_CONFIG", str(file))
    monkeypatch.setenv("TQ_KV_BITS", "k4v3")
    settings = load_settings()
    assert (settings.router_port, settings.tq_kv_bits, settings.ollama_model) == (8100, "k4v3", "")


@pytest.mark.parametrize(
    "name, value, allowed",
    [
        ("TQ_KV_BITS", "9", "1 to 8"),
        ("TQ_KV_BITS", "8.5", "1 to 8"),
        ("TQ_KV_CODE", "huffman", "'auto', 'lloyd' or 'trellis'"),
        ("TQ_EXACT_TOKENS", "100", "multiples of 128, from 0 to 1024"),
        ("TQ_EXACT_TOKENS", "-128", "multiples of 128, from 0 to 1024"),
        ("TQ_EXACT_TOKENS", "1152", "multiples of 128, from 0 to 1024"),
        ("TQ_EXACT_TOKENS", "all", "integer"),
        ("ROUTER_PORT", "99999", "65535"),
        ("ROUTER_PORT", "http", "integer"),
        ("SIDECAR_ENABLED", "maybe", "auto"),
        ("TQ_CACHE_VERSION", "magic", "turboquant"),
        ("OLLAMA_BASE_URL", "ftp://x", "http"),
        ("PROMPT_TOKEN_THRESHOLD", "-4", "auto"),
        ("ROUTER_HOST", "0.0.0.0", "TQSTACK_API_KEY"),
    ],
)
def test_an_impossible_value_is_named_with_what_is_allowed(monkeypatch, name, value, allowed):
    monkeypatch.setenv(name, value)
    with pytest.raises(SettingsError) as error:
        load_settings()
    for part in (name, value, allowed):
        assert part in str(error.value)


@pytest.mark.parametrize("tokens", [0, 128, 1024])
def test_whole_blocks_of_tokens_can_stay_exact(monkeypatch, tokens):
    monkeypatch.setenv("TQ_EXACT_TOKENS", str(tokens))
    assert load_settings().tq_exact_tokens == tokens


def test_a_file_that_is_named_must_be_there_unless_it_is_the_usual_one(tmp_path, monkeypatch):
    monkeypatch.setenv("TQSTACK_CONFIG", str(tmp_path / "mine.env"))
    with pytest.raises(SettingsError, match=r"mine.env'.*no such file"):
        load_settings()
    # As a service names it, which was installed before any setting was written.
    monkeypatch.setenv("TQSTACK_CONFIG", str(tmp_path / "ai/turboquant/config.env"))
    assert load_settings().router_port == 8000


@pytest.mark.parametrize("where", ["file", "environment"])
def test_an_unknown_setting_is_an_error_wherever_it_stands(tmp_path, monkeypatch, where):
    if where == "file":
        (tmp_path / "c.env").write_text("TQ_KV_BIT=3\n")
        monkeypatch.setenv("TQSTACK_CONFIG", str(tmp_path / "c.env"))
    else:
        monkeypatch.setenv("TQ_KV_BIT", "3")
    with pytest.raises(SettingsError, match=r"TQ_KV_BIT .*not a setting.*TQ_KV_BITS"):
        load_settings()


def test_localhost_is_dialled_by_address(monkeypatch):
    monkeypatch.setenv("OLLAMA_BASE_URL", "http://localhost:11434/v1/")
    assert load_settings().ollama_base_url == "http://127.0.0.1:11434"


@pytest.mark.parametrize(
    "environment", [{}, {"HF_HOME": "/a"}, {"HF_HUB_CACHE": "/b"}, {"XDG_CACHE_HOME": "/c"}]
)
def test_models_are_looked_for_where_huggingface_hub_keeps_them(environment):
    given = {"HOME": "/home/someone", **environment}
    given |= {name: os.environ[name] for name in ("PATH", "PYTHONPATH") if name in os.environ}
    asked = """
from huggingface_hub.constants import HF_HUB_CACHE
from tqstack.machine import hub_cache
print(hub_cache(), HF_HUB_CACHE)"""
    result = subprocess.run(
        [sys.executable, "-c", asked], env=given, capture_output=True, text=True, check=True
    )
    ours, theirs = result.stdout.split()
    assert ours == theirs
