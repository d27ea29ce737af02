"""Shell scripts pass shellcheck, and the thin ones do what their first lines say."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tqstack.machine import DEFAULT_MAC_MODEL
from tqstack.service.ollama import environment
from tqstack.service.preflight import MachineFacts, judge, parse_version

ROOT = Path(__file__).parents[2]
GIB = 1 << 30
SHELLCHECK = shutil.which("shellcheck") or shutil.which(
    "shellcheck", path=str(Path(sys.executable).parent)
)


@pytest.mark.skipif(SHELLCHECK is None, reason="shellcheck is not installed")
def test_every_shell_script_passes_shellcheck():
    assert SHELLCHECK
    scripts = [*ROOT.glob("*.sh"), *ROOT.glob("scripts/*.sh"), ROOT / ".ci/run"]
    assert len(scripts) >= 12
    result = subprocess.run(
        [SHELLCHECK, "-x", *map(str, scripts)], capture_output=True, text=True, cwd=ROOT
    )
    assert result.returncode == 0, result.stdout


def test_a_fast_run_leaves_out_what_starts_a_process_and_says_so(tmp_path):
    (tmp_path / "test_two.py").write_text(
        "import subprocess\ndef test_one(): pass\ndef test_other(): subprocess.run('true')\n"
    )
    command = [sys.executable, "-m", "pytest", "-q", "-rs", "-p", "conftest", "--fast", "."]
    result = subprocess.run(
        command,
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT / "tests")},
    )
    assert "1 passed, 1 skipped" in result.stdout and "starts a process" in result.stdout


@pytest.mark.parametrize("script", ["install.sh", "uninstall.sh"])
def test_an_unknown_option_is_refused_with_the_usage(script):
    result = subprocess.run(
        ["bash", str(ROOT / script), "--what"], capture_output=True, text=True, timeout=20
    )
    assert result.returncode == 2 and "Usage:" in result.stderr


def a_mac(**changes) -> MachineFacts:
    facts = {
        "system": "Darwin",
        "machine": "arm64",
        "macos": 15,
        "memory": 64 * GIB,
        "free_disk": 200 * 10**9,
        "ollama": (0, 19, 1),
        "model": DEFAULT_MAC_MODEL,
        "model_is_here": False,
        "downloaded": 0,
    }
    return MachineFacts(**{**facts, **changes})


@pytest.mark.parametrize(
    ("changes", "state", "words"),
    [
        ({}, "ok", "the sidecar will run"),
        ({"memory": 32 * GIB}, "ok", "when it is first needed"),
        ({"memory": 24 * GIB}, "note", "only the router"),
        ({"machine": "x86_64"}, "cannot", "Apple silicon"),
        ({"macos": 13}, "cannot", "14 or newer"),
        ({"system": "Windows"}, "cannot", "not supported"),
        ({"free_disk": 29 * 10**9}, "cannot", "need 33 GB"),
        ({"free_disk": 29 * 10**9, "downloaded": 10**10}, "ok", "29 GB of disk"),
        ({"free_disk": 29 * 10**9, "model_is_here": True}, "ok", "29 GB of disk"),
        ({"ollama": (0, 18, 9)}, "note", "0.19 or newer"),
        ({"ollama": None}, "note", "ollama.com/download"),
    ],
)
def test_the_preflight_check_judges_a_mac(changes, state, words):
    found = [remark for remark in judge(a_mac(**changes)) if words in remark.text]
    assert [remark.state for remark in found] == [state]
    fatal = any(remark.state == "cannot" for remark in judge(a_mac(**changes)))
    assert fatal == (state == "cannot")


def test_the_preflight_check_needs_no_package_and_passes_here(tmp_path):
    result = subprocess.run(
        ["bash", str(ROOT / "scripts/preflight-check.sh"), "--model", "demo"],
        capture_output=True,
        text=True,
        # No packages: isolated from the environment that the tests run in.
        env={"PATH": os.environ["PATH"], "HOME": str(tmp_path), "PYTHONNOUSERSITE": "1"},
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "GB of memory" in result.stdout and not list(tmp_path.iterdir())


@given(st.tuples(st.integers(0, 1), st.integers(0, 40), st.integers(0, 20)), st.booleans())
def test_ollama_gets_only_what_its_version_honours(version, on_mac):
    found = environment(version, on_mac)
    assert ("OLLAMA_MLX" in found) == (on_mac and version >= (0, 19, 0))
    assert ("OLLAMA_KV_CACHE_TYPE" in found) == (version >= (0, 5, 0))


def test_versions_are_read_from_what_ollama_prints():
    assert parse_version("ollama version is 0.19.3-rc1") == (0, 19, 3)
    assert parse_version("Warning: could not connect\nclient version is 0.20") == (0, 20)
    assert parse_version("nothing") is None


def test_ollama_is_started_with_its_settings_and_the_users_own_win(tmp_path):
    ollama = tmp_path / "ollama"
    ollama.write_text(
        '#!/bin/sh\n[ "$1" = --version ] && echo "ollama version is 0.19.0" && exit\n'
        'echo "$1 $OLLAMA_KV_CACHE_TYPE $OLLAMA_FLASH_ATTENTION"\n'
    )
    ollama.chmod(0o755)
    result = subprocess.run(
        ["bash", str(ROOT / "scripts/start-ollama-optimized.sh")],
        capture_output=True,
        text=True,
        env={
            **os.environ,
            "PATH": f"{tmp_path}:{os.environ['PATH']}",
            "OLLAMA_KV_CACHE_TYPE": "f16",
        },
    )
    assert result.stdout.splitlines()[-1] == "serve f16 1", result.stderr
