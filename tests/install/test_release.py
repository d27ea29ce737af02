"""What `scripts/release.sh` makes: a wheel, a source archive, and a Homebrew formula for it."""

from __future__ import annotations

import hashlib
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib

import pytest
from packaging.requirements import Requirement

from installed import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
HOMEPAGE = "https://github.com/someone/tqstack"
ARCHIVE = f"tqstack-{PROJECT['version']}.tar.gz"


@pytest.fixture(scope="module")
def release(tmp_path_factory):
    """The folder of a release, made in a checkout whose environment is the running one."""
    checkout = tmp_path_factory.mktemp("release") / "checkout"
    left = shutil.ignore_patterns(".git", ".venv", "__pycache__", ".*_cache", "tests")
    shutil.copytree(ROOT, checkout, ignore=left)
    (checkout / "scripts/setup.sh").write_text(f"root={checkout}\nvenv={sys.prefix}\n")
    folder = checkout.parent / "out"
    script = str(checkout / "scripts/release.sh")
    result = subprocess.run(["bash", script, HOMEPAGE, str(folder)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return folder


def test_the_formula_names_the_archive_by_its_version_and_its_sum(release):
    formula = (release / "tqstack.rb").read_text()
    assert formula.startswith("class Tqstack < Formula\n") and not re.search(r"@[A-Z]+@", formula)
    url = f"{HOMEPAGE}/releases/download/v{PROJECT['version']}/{ARCHIVE}"
    digest = hashlib.sha256((release / ARCHIVE).read_bytes()).hexdigest()
    assert f'  url "{url}"\n  sha256 "{digest}"\n' in formula
    ruby = shutil.which("ruby")
    if ruby:
        subprocess.run([ruby, "-c", str(release / "tqstack.rb")], check=True)


def test_the_archive_holds_what_the_formula_builds_from(release):
    with tarfile.open(release / ARCHIVE) as archive:
        names = archive.getnames()
    for name in ("pyproject.toml", "requirements.lock", "LICENSE", "services/tqstack/__init__.py"):
        assert f"{ARCHIVE.removesuffix('.tar.gz')}/{name}" in names
    assert (release / f"tqstack-{PROJECT['version']}-py3-none-any.whl").exists()


def test_the_lock_without_sums_constrains_every_dependency():
    formula = (ROOT / "scripts/homebrew/tqstack.rb").read_text()
    found = re.search(r"gsub\(/(.+)/, \"\"\)", formula)
    assert found
    text = re.sub(found[1], "", (ROOT / "requirements.lock").read_text())
    lines = [line for line in text.splitlines() if line.strip() and line.lstrip()[0] != "#"]
    pinned = {Requirement(line).name for line in lines}
    assert {Requirement(line).name for line in PROJECT["dependencies"]} <= pinned


def test_the_changelog_begins_with_this_version():
    headings = re.findall(r"(?m)^## (\S+)", (ROOT / "CHANGELOG.md").read_text())
    assert headings == [PROJECT["version"], "0.1.0"]
