"""`tqstack model`: a download that was killed goes on where it ended, and says how far it is."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import subprocess
import sys
import termios
from pathlib import Path

import pytest

from loopback_hub import Hub, loopback_hub
from processes import clean_environment, tqstack, wait_until
from tqstack import demo_model

MB = 1 << 20


def large_file(size: int) -> bytes:
    """A safetensors file of one tensor that is no zeros: a piece in the wrong place shows."""
    header = json.dumps({"extra": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}})
    return (
        len(header).to_bytes(8, "little")
        + header.encode()
        + (bytes(range(251)) * (size // 251 + 1))[:size]
    )


@pytest.fixture(scope="module")
def hub():
    names = ("config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
    files = {name: (demo_model.PATH / name).read_bytes() for name in names}
    files["model.safetensors"] = (demo_model.PATH / "model.safetensors").read_bytes()
    files["model-extra.safetensors"] = large_file(40 * MB)
    files["README.md"] = b"Nobody needs this to run the model."
    with loopback_hub(files) as hub:
        yield hub


def online(hub: Hub) -> dict[str, str]:
    return {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0"}


def partial(home: Path) -> int:
    """The bytes that have come of files that are not whole."""
    return sum(path.stat().st_size for path in home.glob("hub/**/*.part"))


def download_and_kill(home: Path, hub: Hub) -> str:
    """Killed when a part of a large file is on the disk: what was shown on the terminal."""
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 100))
    process = subprocess.Popen(
        [sys.executable, "-m", "tqstack", "model", "download", "owner/name"],
        env=clean_environment(home, **online(hub)),
        stdout=theirs,
        stderr=theirs,
    )
    os.close(theirs)
    try:
        wait_until(lambda: partial(home) >= 20 * MB, "a part of the large file")
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    shown = b""
    try:
        while piece := os.read(ours, 65536):
            shown += piece
    except OSError:  # the end, on Linux
        pass
    os.close(ours)
    return shown.decode()


def test_a_killed_download_shows_its_progress_and_goes_on_where_it_ended(tmp_path, hub):
    hub.seconds_per_chunk = 0.02
    shown = download_and_kill(tmp_path, hub)
    assert re.search(r"model-extra\.safetensors: +\d+%", shown)
    hub.seconds_per_chunk = 0
    here, before = partial(tmp_path), len(hub.sent)
    result = tqstack(tmp_path, "model", "download", "owner/name", **online(hub))
    assert result.returncode == 0, result.stderr
    again = {path: (start, sent) for path, start, sent in hub.sent[before:]}
    size = len(hub.files["model-extra.safetensors"])
    assert again["model-extra.safetensors"] == (here, size - here)
    assert "README.md" not in again and partial(tmp_path) == 0
    for name in again:
        (found,) = tmp_path.glob(f"hub/*/snapshots/*/{name}")
        assert found.read_bytes() == hub.files[name]
    # All that is left to do is done without the hub, which is gone for these.
    for command in ("model download owner/name", "plan owner/name --context 1000"):
        result = tqstack(tmp_path, *command.split())
        assert result.returncode == 0, result.stderr
    result = tqstack(tmp_path, "model", "remove", "owner/name")
    assert result.returncode == 0 and "given back" in result.stdout
    assert [path for path in (tmp_path / "hub").rglob("*") if "owner" in path.name] == []


def test_a_file_that_came_with_an_error_is_not_kept(tmp_path, hub):
    hub.seconds_per_chunk = 0.02
    download_and_kill(tmp_path, hub)
    hub.seconds_per_chunk = 0
    (part,) = tmp_path.glob("hub/**/*.part")
    with part.open("r+b") as file:
        file.write(b"no such byte")
    result = tqstack(tmp_path, "model", "download", "owner/name", **online(hub))
    assert result.returncode == 1 and "came with an error" in result.stderr
    assert partial(tmp_path) == 0
    assert tqstack(tmp_path, "model", "download", "owner/name", **online(hub)).returncode == 0


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("owner/gated", "hf auth login"),
        ("owner/nothing", "correct the name"),
        ("nothing", "owner/name"),
    ],
)
def test_a_model_that_cannot_be_had_says_what_to_do(tmp_path, hub, name, words):
    result = tqstack(tmp_path, "model", "download", name, **online(hub))
    assert result.returncode == 1 and words in result.stderr, result.stderr
    assert "Traceback" not in result.stderr


def test_a_hub_that_is_not_there_says_that_a_second_try_goes_on(tmp_path):
    result = tqstack(
        tmp_path,
        "model",
        "download",
        "owner/name",
        HF_ENDPOINT="http://127.0.0.1:9",
        HF_HUB_OFFLINE="0",
    )
    assert result.returncode == 1 and "what has come is kept" in result.stderr
