"""Whether this machine can run tqstack, told before anything is installed.

Standard library only: it runs with the system's Python, `python3 -m tqstack.service.preflight`.
"""

from __future__ import annotations

import argparse
import platform
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tqstack.machine import DEFAULT_MAC_MODEL, SMALL_MEMORY, accelerator, hub_folder, machine_memory

GB = 10**9
DISK_FOR_MODEL, DISK_FOR_PACKAGES = 30 * GB, 3 * GB
OLLAMA_WITH_MLX = (0, 19)
OLDEST_MACOS = 14


@dataclass(frozen=True)
class MachineFacts:
    """What was found. Versions are tuples of numbers; None: there is none. Sizes are in bytes."""

    system: str
    machine: str
    macos: int | None
    memory: int
    free_disk: int
    ollama: tuple[int, ...] | None
    model: str
    model_is_here: bool
    downloaded: int  # of a model that is not here whole


@dataclass(frozen=True)
class Remark:
    state: Literal["ok", "note", "cannot"]
    text: str


def judge(facts: MachineFacts) -> Iterator[Remark]:
    """All that is worth saying; what is `cannot` keeps tqstack from running."""
    on_mac = facts.system == "Darwin"
    if on_mac and facts.machine != "arm64":
        yield Remark("cannot", "this Mac has no Apple silicon: MLX does not run on it")
    elif on_mac and (facts.macos or 0) < OLDEST_MACOS:
        yield Remark("cannot", f"macOS {facts.macos} is too old: {OLDEST_MACOS} or newer is needed")
    elif facts.system not in ("Darwin", "Linux"):
        yield Remark("cannot", f"{facts.system} is not supported: use macOS or Linux")
    memory = f"{facts.memory / (1 << 30):.0f} GB of memory"
    if not on_mac or facts.memory > SMALL_MEMORY:
        yield Remark("ok", f"{memory}: the sidecar will run")
    elif facts.memory == SMALL_MEMORY:
        yield Remark("ok", f"{memory}: the sidecar will load its model when it is first needed")
    else:
        yield Remark("note", f"{memory}: only the router will run; the sidecar needs 32 GB")
    download = not facts.model_is_here
    to_come = max(0, DISK_FOR_MODEL - facts.downloaded) if download else 0
    needed = DISK_FOR_PACKAGES + to_come
    disk = f"{facts.free_disk / GB:.0f} GB of disk are free"
    if facts.free_disk < needed:
        what = f"the packages and {facts.model}" if download else "the packages"
        yield Remark("cannot", f"{disk}: {what} need {needed / GB:.0f} GB")
    else:
        yield Remark("ok", disk)
    if facts.ollama is None:
        where = "https://ollama.com/download"
        yield Remark("note", f"Ollama is not here: ordinary requests need it; get it from {where}")
    else:
        version = ".".join(map(str, facts.ollama))
        old = on_mac and facts.ollama < OLLAMA_WITH_MLX
        newer = ": 0.19 or newer is faster, by MLX" if old else ""
        yield Remark("note" if old else "ok", f"Ollama {version}{newer}")


def find_facts(model: str) -> MachineFacts:
    """Of this machine."""
    home, memory = Path.home(), machine_memory()
    if not model:
        on_big_mac = accelerator() == "metal" and memory >= SMALL_MEMORY
        model = DEFAULT_MAC_MODEL if on_big_mac else "demo"
    here = model == "demo" or Path(model).expanduser().is_dir()
    macos = platform.mac_ver()[0]
    cached = hub_folder(model)
    return MachineFacts(
        system=platform.system(),
        machine=platform.machine(),
        macos=int(macos.split(".")[0]) if macos else None,
        memory=memory,
        free_disk=shutil.disk_usage(home).free,
        ollama=ollama_version(),
        model=model,
        model_is_here=here or (cached / "snapshots").is_dir(),
        downloaded=sum(path.stat().st_size for path in cached.glob("blobs/*")),
    )


def ollama_version() -> tuple[int, ...] | None:
    """Of the `ollama` on the PATH."""
    try:
        result = subprocess.run(
            ["ollama", "--version"], capture_output=True, text=True, timeout=10, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return parse_version(result.stdout + result.stderr)


def parse_version(text: str) -> tuple[int, ...] | None:
    match = re.search(r"(\d+)\.(\d+)(?:\.(\d+))?", text)
    return tuple(int(part) for part in match.groups() if part) if match else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="", help="what the sidecar will serve")
    remarks = list(judge(find_facts(parser.parse_args().model)))
    for remark in remarks:
        print(f"{remark.state:>8}  {remark.text}")
    raise SystemExit(any(remark.state == "cannot" for remark in remarks))


if __name__ == "__main__":
    main()
