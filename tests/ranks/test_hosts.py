"""Ranks on other hosts: started over ssh, examined by doctor. An `ssh` of the test's own runs what
it is given on this machine, in processes that end only by the end of their input."""

from __future__ import annotations

import json
import os

import psutil
import pytest

from processes import tqstack
from ranks.group_of_two import two_ranks

SSH = """#!/bin/bash
case " $* " in *" nowhere "*) echo "ssh: Could not resolve hostname nowhere" >&2; exit 255;; esac
echo "$*" >> "$HOME/ssh.log"
cat | bash -c "${@: -1}"
"""


@pytest.fixture
def hosts(tmp_path):
    """Settings with two hosts, and the ssh that reaches the second."""
    (tmp_path / "bin").mkdir()
    ssh = tmp_path / "bin/ssh"
    ssh.write_text(SSH)
    ssh.chmod(0o755)

    def make(name="cupboard") -> dict[str, str]:
        file = tmp_path / "hosts.json"
        names = ("desk", name)
        file.write_text(json.dumps([{"ssh": each, "ips": ["127.0.0.1"]} for each in names]))
        path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
        return {"SIDECAR_RANKS": "1", "SIDECAR_HOSTS": str(file), "PATH": path}

    return make


def test_a_model_on_two_hosts_answers_and_ends_with_its_supervisor(tmp_path, hosts):
    with two_ranks(tmp_path, **hosts()) as pair, pair.client() as client:
        body = {"model": "demo", "prompt": "def main():", "max_tokens": 8, "temperature": 0}
        assert client.post("/v1/completions", json=body).is_success
        told = pair.health()["ranks"]
        other = psutil.Process(told["each"][1]["pid"])
        assert told["count"] == 2 and told["backend"] == "ring"
        pair.supervisor.kill()
        other.wait(20)
    assert "BatchMode=yes" in (tmp_path / "ssh.log").read_text()


def findings(home, settings):
    told = tqstack(home, "doctor", "--json", **{"SIDECAR_MODEL": "demo", **settings})
    return {one["what"]: one for one in json.loads(told.stdout)}


def test_doctor_tells_versions_and_links_of_hosts_before_they_start(tmp_path, hosts):
    found = findings(tmp_path, hosts())
    assert "2 on hosts, over ring (experimental)" in found["ranks"]["detail"]
    assert found["model"]["state"] == "ok" and "divided" in found["model"]["detail"]
    host = found["host cupboard"]
    assert host["state"] in ("ok", "note") and "MB/s" in host["detail"], host
    assert "µs" in host["detail"]


def test_doctor_says_which_host_does_not_answer_and_why(tmp_path, hosts):
    host = findings(tmp_path, hosts("nowhere"))["host nowhere"]
    assert host["state"] == "wrong" and "Could not resolve" in host["detail"]
    assert "ssh nowhere" in host["advice"]


def test_a_wrong_hosts_file_ends_the_sidecar_with_a_sentence(tmp_path, hosts):
    settings = hosts()
    (tmp_path / "hosts.json").write_text("[]")
    told = tqstack(tmp_path, "sidecar", SIDECAR_MODEL="demo", **settings)
    assert told.returncode == 78 and "SIDECAR_HOSTS" in told.stderr
    assert findings(tmp_path, settings)["ranks"]["state"] == "wrong"


def test_a_model_that_cannot_be_divided_ends_the_sidecar_with_a_sentence(tmp_path):
    told = tqstack(tmp_path, "sidecar", SIDECAR_MODEL="demo", SIDECAR_RANKS="3")
    assert told.returncode == 78 and "cannot be divided between 3 ranks" in told.stderr
    assert "use fewer" in told.stderr


def test_a_rank_is_started_by_its_supervisor_alone(tmp_path):
    told = tqstack(tmp_path, "rank")
    assert told.returncode == 78 and "SIDECAR_RANKS" in told.stderr
