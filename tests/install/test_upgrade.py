"""From 0.1.0: its settings, its services and the model that it downloaded stay in use.

`from_0_1_0/` holds what `tqstack config write` and `tqstack service install` of 0.1.0 wrote."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import httpx
import pytest

from processes import free_port, wait_for
from tqstack import demo_model
from tqstack.cli.config import updated
from tqstack.settings import Settings, load_settings

OLD = Path(__file__).with_name("from_0_1_0")
CONFIG = (OLD / "config.env").read_text()
CHANGED = dict(re.findall(r"^([A-Z]\w*)=(.*)$", CONFIG, re.M))
DEFAULTS = dict(re.findall(r"^#([A-Z]\w*)=(.*)$", CONFIG, re.M))
UNITS = ("tqstack-router.service", "tqstack-sidecar.service")


def value(settings: Settings, name: str) -> str:
    """As the file has it: seconds without a fraction are read as 20.0."""
    return str(getattr(settings, name.lower())).removesuffix(".0")


def loaded(text: str, tmp_path, monkeypatch) -> Settings:
    file = tmp_path / "config.env"
    file.write_text(text)
    monkeypatch.setenv("TQSTACK_CONFIG", str(file))
    return load_settings()


def test_what_was_changed_in_the_file_applies(tmp_path, monkeypatch):
    settings = loaded(CONFIG, tmp_path, monkeypatch)
    assert {name: value(settings, name) for name in CHANGED} == CHANGED


def test_every_default_that_it_showed_is_allowed(tmp_path, monkeypatch):
    settings = loaded(re.sub(r"(?m)^#(?=[A-Z]\w*=)", "", CONFIG), tmp_path, monkeypatch)
    assert len(DEFAULTS) > 20
    assert {name: value(settings, name) for name in DEFAULTS} == DEFAULTS


def test_settings_that_came_later_are_added_behind_what_it_wrote():
    new = updated(CONFIG, {})
    assert new.startswith(CONFIG)
    added = re.findall(r"^#([A-Z]\w*)=", new.removeprefix(CONFIG), re.M)
    assert {"SIDECAR_MEMORY_MB", "SIDECAR_SPECULATION"} <= set(added)
    assert updated(new, {}) == new


def downloaded(home: Path, name: str) -> None:
    """A model as huggingface_hub keeps it."""
    repository = home / ".cache/huggingface/hub" / f"models--{name.replace('/', '--')}"
    revision = "0123456789abcdef0123456789abcdef01234567"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs/main").write_text(revision)
    snapshot = repository / "snapshots" / revision
    snapshot.mkdir(parents=True)
    for file in demo_model.PATH.iterdir():
        if file.is_file() and file.suffix != ".py" and file.name != "mtp.safetensors":
            (snapshot / file.name).symlink_to(file)


@pytest.fixture
def upgraded(installed, tmp_path, monkeypatch):
    """A HOME that 0.1.0 was used in; its checkout has an environment with the new packages."""
    home, fakes = tmp_path / "home", tmp_path / "fakes"
    for folder in (home / "ai/turboquant", home / ".config/systemd/user", fakes):
        folder.mkdir(parents=True)
    ports = {name: str(free_port()) for name in ("ROUTER_PORT", "SIDECAR_PORT")}
    config = CONFIG + f"OLLAMA_BASE_URL=http://127.0.0.1:{free_port()}\n"
    config += "".join(f"{name}={port}\n" for name, port in ports.items())
    (home / "ai/turboquant/config.env").write_text(config)
    downloaded(home, CHANGED["SIDECAR_MODEL"])
    for unit in UNITS:
        text = (OLD / unit).read_text().replace("/home/me", str(home))
        (home / ".config/systemd/user" / unit).write_text(text)
    python = home / "tqstack/.venv/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\nexec {installed.prefix}/bin/python "$@"\n')
    python.chmod(0o755)
    systemctl = Path(__file__).with_name("live_systemctl.py")
    (fakes / "systemctl").write_text(f'#!/bin/sh\nexec {sys.executable} {systemctl} "$@"\n')
    (fakes / "systemctl").chmod(0o755)
    machine = replace(installed, home=home)
    environment = machine.environment(FAKE_SYSTEMD=str(fakes))
    environment["PATH"] = f"{fakes}:{environment['PATH']}"
    monkeypatch.setattr(type(machine), "environment", lambda self: environment)

    def control(*arguments: str) -> None:
        argv = [str(fakes / "systemctl"), "--user", *arguments]
        subprocess.run(argv, env=environment, check=True)

    yield machine, control, {name: f"http://127.0.0.1:{port}" for name, port in ports.items()}
    for unit in UNITS:
        control("stop", unit)


@pytest.mark.skipif(sys.platform == "darwin", reason="the stand-in is for systemctl")
def test_its_services_keep_settings_and_model_and_an_install_moves_them(upgraded):
    machine, control, urls = upgraded
    config = machine.home / "ai/turboquant/config.env"
    logs = machine.home / ".local/state/tqstack"
    before = config.read_text()

    def serves_as_before() -> None:
        wait_for(f"{urls['SIDECAR_PORT']}/health", logs / "sidecar.log")
        health = httpx.get(f"{urls['SIDECAR_PORT']}/health", trust_env=False).json()
        assert health["model"]["id"] == CHANGED["SIDECAR_MODEL"]
        assert health["cache"]["codec"] == "tq3.5"
        wait_for(f"{urls['ROUTER_PORT']}/health", logs / "router.log")
        health = httpx.get(f"{urls['ROUTER_PORT']}/health", trust_env=False).json()
        assert health["threshold"] == int(CHANGED["PROMPT_TOKEN_THRESHOLD"])

    for unit in UNITS:
        control("start", unit)
    serves_as_before()
    shutil.rmtree(machine.home / "tqstack")  # the checkout of 0.1.0 is needed no more
    machine.told("service", "install")
    serves_as_before()
    assert machine.told("service", "status").count("running") == 2
    for unit in UNITS:
        text = (machine.home / ".config/systemd/user" / unit).read_text()
        assert f"{machine.prefix}/bin/python" in text
    assert config.read_text() == before
