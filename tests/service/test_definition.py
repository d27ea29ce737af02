"""Which paths a service keeps."""

from __future__ import annotations

from pathlib import Path

from tqstack.service.definition import lasting


def test_a_service_of_homebrews_keeps_its_python_through_an_upgrade(tmp_path):
    cellar = tmp_path / "Cellar/tqstack/0.2.0"
    python = cellar / "libexec/bin/python"
    python.parent.mkdir(parents=True)
    python.touch()
    assert lasting(python) == python  # no link yet: what is here is better than what is not
    (tmp_path / "opt").mkdir()
    (tmp_path / "opt/tqstack").symlink_to(cellar)
    assert lasting(python) == tmp_path / "opt/tqstack/libexec/bin/python"
    assert lasting(Path("/usr/bin/python3")) == Path("/usr/bin/python3")
