"""What a stranger installs is the wheel alone: no checkout is near."""

from __future__ import annotations

import json
import plistlib
import signal
import subprocess
import tomllib
import zipfile

import httpx
import pytest

from installed import ROOT
from processes import free_port, wait_for

QUESTION = "The secret code of hotel is 48213. What is the secret code of hotel?"


@pytest.fixture(autouse=True)
def nothing_is_left_at_home(installed):
    yield
    assert [path for path in installed.home.rglob("*") if path.is_file()] == []


def test_every_file_of_the_package_is_in_the_wheel(installed):
    services, templates = ROOT / "services", ROOT / "launchagents"
    wanted = {
        str(path.relative_to(services))
        for path in (services / "tqstack").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    wanted |= {f"tqstack/launchagents/{path.name}" for path in templates.iterdir()}
    assert wanted <= set(zipfile.ZipFile(installed.wheel).namelist())
    assert {"tqstack/demo_model/mtp.safetensors", "tqstack/router/page.html"} <= wanted


def test_its_version_is_the_projects(installed):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert installed.told("--version").strip() == project["version"]


def test_it_generates_with_the_embedded_model_and_its_head(installed):
    arguments = ("generate", "demo", QUESTION, "--speculation", "mtp")
    assert installed.told(*arguments).startswith("48213\n")


def test_doctor_finds_nothing_wrong_and_the_model_in_the_package(installed):
    findings = json.loads(installed.told("doctor", "--json", **ports()))
    assert "wrong" not in [finding["state"] for finding in findings]
    told = {finding["what"]: finding["detail"] for finding in findings}
    assert told["files"].startswith(str(installed.package / "demo_model"))
    assert "proven compressed" in told["model"]


def test_a_dry_run_names_its_own_python_and_changes_nothing(installed):
    told = installed.told("service", "install", "--dry-run")
    for name in ("router", "sidecar"):
        assert f"{installed.prefix}/bin/python" in told and f"-m tqstack {name}" in told
    assert "nothing was changed" in told


def test_its_property_lists_are_made_from_templates_within_the_package(installed):
    program = (
        "from tqstack.service.definition import this_place\n"
        "from tqstack.service.launchd import render\n"
        "print(render('sidecar', this_place()).decode())"
    )
    result = subprocess.run(
        [str(installed.prefix / "bin/python"), "-c", program],
        cwd=installed.nowhere,
        env=installed.environment(),
        capture_output=True,
        check=True,
    )
    argv = plistlib.loads(result.stdout)["ProgramArguments"]
    assert argv[0].startswith(str(installed.prefix / "bin/python"))


def test_up_starts_both_answers_and_stops(installed, tmp_path):
    settings, log = ports(), tmp_path / "up.log"
    router = f"http://127.0.0.1:{settings['ROUTER_PORT']}"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [str(installed.program), "up"],
            cwd=installed.nowhere,
            env=installed.environment(**settings),
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    try:
        wait_for(f"http://127.0.0.1:{settings['SIDECAR_PORT']}/health", log)
        wait_for(f"{router}/health", log)
        body = {"model": "tq:demo", "messages": [{"role": "user", "content": QUESTION}]}
        answer = httpx.post(f"{router}/v1/chat/completions", json=body, timeout=60, trust_env=False)
        assert answer.json()["choices"][0]["message"]["content"] == "48213"
        assert "<html" in httpx.get(router, trust_env=False).text
    finally:
        process.send_signal(signal.SIGINT)
        code = process.wait(60)
    assert code == 0, log.read_text()


def ports() -> dict[str, str]:
    """Settings for services that meet nobody else's, with the embedded model."""
    nobody = f"http://127.0.0.1:{free_port()}"
    return {
        "ROUTER_PORT": str(free_port()),
        "SIDECAR_PORT": str(free_port()),
        "SIDECAR_MODEL": "demo",
        "OLLAMA_BASE_URL": nobody,
    }
