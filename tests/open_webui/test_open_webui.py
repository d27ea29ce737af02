"""Open WebUI itself, in headless Chromium, through the router: drive.py drives it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from processes import get
from whole_stack import other_backend, whole_stack

DRIVE = Path(__file__).with_name("drive.py")
PYTHON = os.environ.get("OPEN_WEBUI_PYTHON")


@pytest.mark.skipif(not PYTHON, reason="OPEN_WEBUI_PYTHON names no Python that has open-webui")
@pytest.mark.skipif(
    not (os.environ.get("CHROMIUM") or shutil.which("chromium")), reason="there is no Chromium"
)
def test_models_answers_a_long_prompt_and_a_stop_that_ends_the_work(tmp_path):
    with other_backend(tmp_path) as other, whole_stack(tmp_path, other) as stack:
        services = ["--router", stack.router, "--sidecar", stack.sidecar]
        result = subprocess.run(
            [str(PYTHON), str(DRIVE), *services, "--out", str(tmp_path / "shots")],
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert result.returncode == 0, result.stderr
        seen = json.loads(result.stdout)
        status = get(f"{stack.router}/status")
    assert status is not None
    requests = [one for one in reversed(status.json()["recent"]) if one["stream"]]
    assert seen["models"][:2] == ["auto", "demo"]
    assert seen["short"] == seen["long"] == "48213"
    assert [(one["backend"], one["outcome"]) for one in requests] == [
        ("ollama", "ok"),
        ("sidecar", "ok"),
        ("sidecar", "gone"),  # while the prompt was read
        ("sidecar", "gone"),  # in the middle of the answer
    ]
    assert seen["seconds_to_stop_reading"] < 5 and seen["seconds_to_stop_answering"] < 5
    shots = {path.name for path in (tmp_path / "shots").iterdir()}
    assert shots == {"models.png", "connections.png", "tools.png", "answer.png", "long.png"}
