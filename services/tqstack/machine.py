"""What machine this is, told with the standard library alone."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Literal

DEFAULT_MAC_MODEL = "mlx-community/Qwen3.6-35B-A3B-4bit"
# A Mac below this runs the router alone; one of just this size loads the model when it is needed.
SMALL_MEMORY = 32 << 30


def accelerator() -> Literal["metal", "cuda", "cpu"]:
    """What this machine computes on, told without importing mlx."""
    if platform.system() == "Darwin" and platform.machine() == "arm64":
        return "metal"
    return "cuda" if Path("/dev/nvidiactl").exists() else "cpu"


def machine_memory() -> int:
    """Bytes of this machine's memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def cache_folder() -> Path:
    """Where this platform keeps what can be made again."""
    if platform.system() == "Darwin":
        return Path.home() / "Library/Caches/tqstack"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tqstack"


def hub_cache() -> Path:
    """Where huggingface_hub keeps models, told without it: the router and the preflight check have
    no need of it else."""
    if os.environ.get("HF_HUB_CACHE"):
        return Path(os.environ["HF_HUB_CACHE"]).expanduser()
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(os.environ.get("HF_HOME") or caches / "huggingface").expanduser() / "hub"


def hub_folder(model: str) -> Path:
    """Where a model of that name is, if it was downloaded."""
    return hub_cache() / f"models--{model.replace('/', '--')}"
