"""tqstack as a stranger has it: its wheel in an environment of its own, far from any checkout.

The packages that it needs are those of the running Python, so that nothing is downloaded.
"""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from processes import clean_environment

ROOT = Path(__file__).parents[1]


@dataclass
class Installation:
    """An environment with the wheel, an empty HOME, and a folder that holds nothing."""

    wheel: Path
    prefix: Path
    home: Path
    nowhere: Path

    @property
    def program(self) -> Path:
        return self.prefix / "bin/tqstack"

    @property
    def package(self) -> Path:
        return next(self.prefix.glob("lib/python*/site-packages/tqstack"))

    def environment(self, **settings: str) -> dict[str, str]:
        found = clean_environment(self.home, **settings)
        found["PATH"] = f"{self.prefix / 'bin'}:/usr/bin:/bin"
        found["HF_HUB_CACHE"] = str(self.home / ".cache/huggingface/hub")
        return {name: value for name, value in found.items() if name != "PYTHONPATH"}

    def run(self, *arguments: str, **settings: str) -> subprocess.CompletedProcess[str]:
        """A command that ends by itself."""
        return subprocess.run(
            [str(self.program), *arguments],
            cwd=self.nowhere,
            env=self.environment(**settings),
            capture_output=True,
            text=True,
            timeout=240,
        )

    def told(self, *arguments: str, **settings: str) -> str:
        """What a command prints that succeeds."""
        result = self.run(*arguments, **settings)
        assert result.returncode == 0, (arguments, result.stdout, result.stderr)
        return result.stdout


def install(folder: Path) -> Installation:
    """Build the wheel and install it below `folder`."""
    run = {"check": True, "capture_output": True, "cwd": ROOT}
    build = ("-m", "hatchling", "build", "-t", "wheel", "-d", str(folder / "dist"))
    subprocess.run([sys.executable, *build], **run)
    wheel = next((folder / "dist").glob("tqstack-*.whl"))
    prefix = folder / "environment"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(prefix)], **run)
    site = next(prefix.glob("lib/python*/site-packages"))
    (site / "packages.pth").write_text(sysconfig.get_path("purelib") + "\n")
    pip = ("-m", "pip", "--python", str(prefix / "bin/python"), "install", "--no-compile")
    subprocess.run([sys.executable, *pip, "--no-deps", "--no-index", str(wheel)], **run)
    home, nowhere = folder / "home", folder / "nowhere"
    home.mkdir()
    nowhere.mkdir()
    return Installation(wheel, prefix, home, nowhere)
