"""Which of OpenBLAS's kernels a processor gets."""

from __future__ import annotations

import ctypes
from pathlib import Path
from types import SimpleNamespace

import pytest

from tqstack.cli import common


@pytest.mark.parametrize(
    ("core", "flags", "wanted"),
    [
        (b"Prescott", "fma avx2 avx512f avx512cd avx512bw avx512dq avx512vl", "SKYLAKEX"),
        (b"Prescott", "fma avx2 avx512f", "HASWELL"),
        (b"Prescott", "sse3", None),
        (b"Zen", "fma avx2", None),  # known: its own choice stays
    ],
)
def test_a_processor_unknown_to_openblas_gets_kernels_it_can_run(monkeypatch, core, flags, wanted):
    blas = SimpleNamespace(openblas_get_corename=lambda: core)
    monkeypatch.setattr(ctypes, "CDLL", lambda _: blas)
    monkeypatch.setattr(Path, "read_text", lambda _: f"processor\t: 0\nflags\t\t: {flags}\n")
    assert common.kernels_by_name("libopenblas.so.0").get("OPENBLAS_CORETYPE") == wanted


def test_a_library_that_does_not_tell_is_left_alone(tmp_path):
    assert common.kernels_by_name(str(tmp_path / "missing.so")) == {}
