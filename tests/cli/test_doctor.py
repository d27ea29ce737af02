from __future__ import annotations

import json

from commands import called
from processes import free_port, tqstack


def test_it_tells_what_would_be_served_and_whether_it_fits(tmp_path):
    settings = {"ROUTER_PORT": str(free_port()), "SIDECAR_PORT": str(free_port())}
    settings |= {"OLLAMA_BASE_URL": f"http://127.0.0.1:{free_port()}", "SIDECAR_MODEL": "demo"}
    result = tqstack(tmp_path, "doctor", "--json", **settings)
    findings = {finding["what"]: finding for finding in json.loads(result.stdout)}
    assert result.returncode == 0
    assert "layers [3, 7] proven compressed" in findings["model"]["detail"]
    assert "32,768 of 32,768 tokens fit" in findings["memory"]["detail"]
    assert findings["kernels"]["state"] == "ok"
    assert findings["ollama"]["state"] == "note" and "ollama serve" in findings["ollama"]["advice"]


def test_a_wrong_setting_is_a_finding_and_an_exit_code(tmp_path):
    result = called(tmp_path, "doctor", "--json", TQ_KV_BITS="nine")
    assert result.exit_code == 1
    assert "TQ_KV_BITS='nine'" in json.loads(result.stdout)[-1]["detail"]
