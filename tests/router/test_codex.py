"""Codex CLI, where it is installed: it asks, runs the tool that the model calls, and shows the
answer to its result."""

from __future__ import annotations

import os
import subprocess

import pytest

from router.stack import Stack
from router.try_clients import codex, command


@pytest.mark.skipif(not command("codex"), reason="codex is not installed")
def test_codex_runs_a_command_and_reads_its_output(tmp_path):
    with Stack() as stack:
        done = subprocess.run(
            codex(stack, tmp_path),
            cwd=tmp_path,
            env={**os.environ, "HOME": str(tmp_path), "CODEX_HOME": str(tmp_path)},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert "forty-42" in done.stdout, done.stderr[-3000:]
        first, second = (seen.json for seen in stack.sidecar.seen[:2])
        roles = [message["role"] for message in first["messages"]]
        assert roles.count("system") == 1 and roles[0] == "system"
        names = {tool["function"]["name"] for tool in first["tools"]}
        assert "multi_agent_v1__spawn_agent" in names
        assert "web_search" in stack.app.state.services.journal.recent[0].left_out
        # What the model thought before its call comes back with the call.
        [called] = [m for m in second["messages"] if m.get("tool_calls")]
        assert called["reasoning_content"] == "I need a tool."
