"""Ollama's environment for this stack: only what the version that is here honours.

Standard library only. `python3 -m tqstack.service.ollama` prints NAME=value lines.
"""

from __future__ import annotations

import sys

from tqstack.service.preflight import ollama_version

# (first version that knows it, name, value); see Ollama's envconfig.
VARIABLES = (
    ((0, 1, 41), "OLLAMA_FLASH_ATTENTION", "1"),
    ((0, 5, 0), "OLLAMA_KV_CACHE_TYPE", "q8_0"),
    # What the router leaves to Ollama: prompts below the threshold, and their answers.
    ((0, 5, 13), "OLLAMA_CONTEXT_LENGTH", "32768"),
    ((0, 19, 0), "OLLAMA_MLX", "1"),
)


def environment(version: tuple[int, ...], on_mac: bool) -> dict[str, str]:
    """Variables that a version honours; MLX is there on a Mac alone."""
    return {
        name: value
        for first, name, value in VARIABLES
        if version >= first and (on_mac or name != "OLLAMA_MLX")
    }


def main() -> None:
    version = ollama_version()
    if version is None:
        raise SystemExit("there is no ollama on the PATH: https://ollama.com/download")
    for name, value in environment(version, sys.platform == "darwin").items():
        print(f"{name}={value}")


if __name__ == "__main__":
    main()
