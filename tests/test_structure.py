"""Imports point one way, and the router starts without mlx."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import tqstack

ROOT = Path(tqstack.__file__).parent
# What each package may import of the others.
ALLOWED = {
    "kv_bits": set(),
    "machine": set(),
    "settings": {"kv_bits", "machine"},
    "openai_api": set(),
    "demo_model": set(),
    "turboquant": {"kv_bits"},
    "attention": {"machine", "turboquant"},
    "weights": {"attention", "turboquant"},
    "models": {
        "attention",
        "demo_model",
        "kv_bits",
        "machine",
        "settings",
        "turboquant",
        "weights",
    },
    "engine": {"attention", "models"},
    "ranks": {"engine", "machine", "models", "settings"},
    "sidecar": {"engine", "machine", "models", "openai_api", "ranks", "settings"},
    "router": {"machine", "openai_api", "settings"},
    "service": {"machine", "settings"},
}


def imports_of(path: Path) -> set[str]:
    """Packages of ours that a module imports, anywhere in it."""
    package = ("tqstack", *path.relative_to(ROOT).parent.parts)
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join((*base, *filter(None, [node.module])))
            names |= {module, *(f"{module}.{alias.name}" for alias in node.names)}
    parts = [name.split(".") for name in names]
    return {part[1] for part in parts if part[0] == "tqstack" and len(part) > 1}


@pytest.mark.parametrize("package", ALLOWED)
def test_imports_point_one_way(package):
    path = ROOT / package
    files = sorted(path.rglob("*.py")) if path.is_dir() else [path.with_suffix(".py")]
    assert files
    known = {p.stem if p.suffix else p.name for p in ROOT.iterdir()}
    for file in files:
        foreign = imports_of(file) & known - {package}
        assert foreign <= ALLOWED[package], file


@pytest.mark.parametrize("module", ["tqstack.router.app", "tqstack.cli"])
def test_the_router_and_the_command_line_load_neither_mlx_nor_transformers(module):
    result = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", f"import {module}"],
        capture_output=True,
        text=True,
        check=True,
    )
    loaded = {line.split("|")[-1].strip().split(".")[0] for line in result.stderr.splitlines()}
    assert "fastapi" in loaded or module == "tqstack.cli"
    assert not loaded & {"mlx", "mlx_lm", "transformers", "torch"}


def test_no_file_is_longer_than_400_lines():
    long = [path for path in ROOT.rglob("*.py") if len(path.read_text().splitlines()) > 400]
    assert not long
