"""Open WebUI itself, in headless Chromium, through the router: open-webui/check.py drives it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from processes import get
from whole_stack import other_backend, whole_stack

CHECK = Path(__file__).parents[2] / "open-webui/check.py"
PYTHON = os.environ.get("OPEN_WEBUI_PYTHON")


@pytest.mark.skipif(not PYTHON, reason="OPEN_WEBUI_PYTHON names no Python that has open-webui")
@pytest.mark.skipif(
    not (os.environ.get("CHROMIUM") or shutil.which("chromium")), reason="there is no Chromium"
)
def test_models_a_short_answer_a_long_prompt_and_the_stop_button(tmp_path):
    with other_backend(tmp_path) as other, whole_stack(tmp_path, other) as stack:
        result = subprocess.run(
            [str(PYTHON), str(CHECK), "--router", stack.router, "--out", str(tmp_path / "shots")],
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert result.returncode == 0, result.stderr
        seen = json.loads(result.stdout)
        status = get(f"{stack.router}/status")
    assert status is not None
    streamed = [one for one in reversed(status.json()["recent"]) if one["stream"]]
    assert seen["models"][:2] == ["auto", "demo"]
    assert seen["short"] and seen["long"] == "48213"
    assert [one["backend"] for one in streamed][:2] == ["ollama", "sidecar"]
    assert seen["stop_status"] == 200
    shots = {path.name for path in (tmp_path / "shots").iterdir()}
    assert shots == {"models.png", "answer.png", "long.png", "stopped.png", "status.png"}
