"""What several commands share: the console, settings with a readable failure, OpenBLAS."""

from __future__ import annotations

import ctypes.util
import logging
import os
import re
import sys
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import NoReturn

from rich.console import Console

from tqstack.machine import accelerator
from tqstack.settings import EXIT_CONFIG, Settings, SettingsError, load_settings

LOG_BYTES, LOG_FILES = 10_000_000, 4  # 50 MB at most for each service

# OpenBLAS's kernels by what a processor must be able to do, the fastest first.
KERNELS = {
    "SKYLAKEX": {"avx512f", "avx512cd", "avx512bw", "avx512dq", "avx512vl"},
    "HASWELL": {"avx2", "fma"},
}

# Redirected output has no width of its own: wide enough that no table is cut.
console = Console(width=None if sys.stdout.isatty() else 140)
errors = Console(stderr=True)


def fail(message: str, code: int = EXIT_CONFIG) -> NoReturn:
    errors.print(f"[bold red]tqstack:[/] {message}", soft_wrap=True, highlight=False)
    # launchd starts again all that did not succeed; systemd is told which exit code is
    # not worth it.
    lasting = code == EXIT_CONFIG and "STARTED_BY_LAUNCHD" in os.environ
    raise SystemExit(0 if lasting else code)


def settings() -> Settings:
    """The settings, or an exit that says what is wrong with them."""
    try:
        return load_settings()
    except SettingsError as error:
        fail(str(error))


def start_logging(config: Settings, name: str) -> None:
    """Log to the terminal, or to `name`.log in TQSTACK_LOG_DIR, which never grows without end."""
    handlers: list[logging.Handler] | None = None
    if config.tqstack_log_dir:
        folder = Path(config.tqstack_log_dir).expanduser()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            file = RotatingFileHandler(folder / f"{name}.log", "a", LOG_BYTES, LOG_FILES)
        except OSError as error:
            fail(f"TQSTACK_LOG_DIR={config.tqstack_log_dir!r}: {error}")
        handlers = [file]
    logging.basicConfig(
        level=config.tqstack_log_level.upper(),
        format="%(asctime)s %(levelname)s %(message)s",
        handlers=handlers,
    )


def openblas() -> str | None:
    """The system's OpenBLAS on a Linux machine that computes on its CPU; MLX's own BLAS is 30 times
    slower there."""
    if sys.platform != "linux" or accelerator() != "cpu":
        return None
    known = sorted(Path("/usr/lib").glob("*/openblas-pthread/libopenblas.so.0"))
    return str(known[0]) if known else ctypes.util.find_library("openblas")


def with_openblas(environment: dict[str, str]) -> dict[str, str]:
    """`environment` with OpenBLAS loaded before MLX's own BLAS, where that helps."""
    library = openblas()
    loaded = environment.get("LD_PRELOAD", "")
    if library is None or "openblas" in loaded:
        return environment
    kernels = {} if "OPENBLAS_CORETYPE" in environment else kernels_by_name(library)
    return {**environment, **kernels, "LD_PRELOAD": f"{library}:{loaded}".rstrip(":")}


def kernels_by_name(library: str) -> dict[str, str]:
    """OPENBLAS_CORETYPE for a processor that OpenBLAS is too old to know: it takes those for a
    Pentium 4 (Prescott), whose kernels read a prompt at half the speed."""
    try:
        blas = ctypes.CDLL(library)
        blas.openblas_get_corename.restype = ctypes.c_char_p
        core = blas.openblas_get_corename().decode()
        flags = set(
            re.findall(r"^flags\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.M)[0].split()
        )
    except (OSError, AttributeError, IndexError):
        return {}
    if core != "Prescott":
        return {}
    for name, needed in KERNELS.items():
        if needed <= flags:
            return {"OPENBLAS_CORETYPE": name}
    return {}


def preload_openblas() -> None:
    """Start this very command again with OpenBLAS in place: a library can only be preloaded."""
    environment = with_openblas(dict(os.environ))
    if environment.get("LD_PRELOAD") != os.environ.get("LD_PRELOAD"):
        os.execve(sys.executable, [sys.executable, "-m", "tqstack", *sys.argv[1:]], environment)


def size(count: int) -> str:
    """Bytes for people, in decimal units, as disks and macOS count."""
    return f"{count / 1e9:.2f} GB" if abs(count) >= 1e9 else f"{count / 1e6:.1f} MB"
