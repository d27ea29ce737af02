"""CUDA kernels are compiled once and kept where MLX looks for them. No GPU; what needs NVIDIA's
compiler runs where its packages are (nvidia-cuda-nvrtc, nvidia-cuda-runtime, nvidia-cuda-cccl)."""

from __future__ import annotations

import ctypes
import importlib.util
import shutil
import subprocess
from functools import cache
from pathlib import Path

import mlx.core as mx
import pytest

from tqstack.attention.blocks import BlockLayout
from tqstack.attention.kernels import compiled, program, trust
from tqstack.attention.kernels.program import Program
from tqstack.models.layers import (  # noqa: F401  their checks
    decoder,
    experts,
    gated_delta,
)
from tqstack.turboquant.codec import make_codec

TRIED = compiled.usable  # before a test replaces it
EIGHT = Program("eight", (), "y[tid] = x[tid] + A;", ("x",), ("y",))
B, F = mx.bfloat16, mx.float32
TQ4, TQ8, TRELLIS = make_codec("tq4", 256), make_codec("tq8", 128), make_codec("tcq2-l8", 128)
LAYOUT = BlockLayout(TQ4, TQ4, 2)
VARIANTS = [
    ("decode", LAYOUT, 1, 16, B, B, False, None, False),
    ("decode", BlockLayout(TQ8, TQ8, 2), 4, 8, F, F, True, True, True),
    ("prefill", LAYOUT, 1, 16, B, B, True, None, False),
    ("encode", TQ4, TQ4, B),
    ("search", TRELLIS),
    ("experts", 4, 64, B),
    ("residual", 9, True, True, B),
    ("residual", 1, False, True, F),
    ("route", 256, 8, True, B),
    ("heads", 256, 64, B),
    ("delta_token", 128, 128, 4, B, F, B),
    ("gated delta", 128, 128, B, F, B),
]


@cache
def nvidia() -> tuple[list[Path], list[Path]]:
    """NVIDIA's compiler and its headers, from its packages."""
    spec = importlib.util.find_spec("nvidia")
    roots = [Path(place) for place in (spec.submodule_search_locations if spec else None) or ()]
    libraries = [path for root in roots for path in root.glob("*/lib/libnvrtc.so.*")]
    headers = [path.parent for root in roots for path in root.glob("*/include/cuda_fp16.h")]
    cccl = [path.parents[1] for root in roots for path in root.glob("*/include/**/nv/target")]
    return libraries, cccl + headers


@pytest.fixture
def nvrtc() -> tuple[ctypes.CDLL, list[Path]]:
    libraries, headers = nvidia()
    if not libraries or not headers:
        pytest.skip("needs NVIDIA's compiler")
    return ctypes.CDLL(str(libraries[0])), headers


@pytest.fixture
def on_cuda(monkeypatch, tmp_path):
    """A GPU that takes everything, and a folder of MLX's. Returns what was compiled."""
    seen = []

    def machine_code(text, target, *_):
        seen.append((text, target))
        return b"code"

    monkeypatch.setenv("MLX_PTX_CACHE_DIR", str(tmp_path / "kept"))
    monkeypatch.setattr(compiled, "usable", lambda: True)
    monkeypatch.setattr(compiled, "architecture", lambda: "sm_90a")
    monkeypatch.setattr(compiled, "nvrtc", lambda: None)
    monkeypatch.setattr(compiled, "machine_code", machine_code)
    monkeypatch.setattr(program, "gpu_dialect", lambda: "cuda")
    launched = []
    monkeypatch.setattr(
        mx.fast,
        "precompiled_cuda_kernel",
        lambda **options: launched.append(options) or [mx.ones(8)],
    )
    return seen, launched, tmp_path / "kept"


def eight(constant: int = 1, dtype: mx.Dtype = mx.float32, kernel: Program = EIGHT) -> mx.array:
    shape = {"blocks": (1, 1, 1), "threads": 8, "outputs": [((8,), mx.float32)]}
    return kernel([mx.ones(8, dtype)], template={"A": constant}, **shape)[0]


def test_a_kernel_is_compiled_once_and_lies_where_mlx_looks(on_cuda):
    seen, launched, folder = on_cuda
    for _ in range(2):
        again = Program("eight", (), EIGHT.call, ("x",), ("y",))  # as a new process has it
        for constant in (1, 2, 1):
            eight(constant, kernel=again)
    eight(1, mx.float16)
    assert [target for _, target in seen] == ["sm_90a"] * 3
    assert len(launched) == 7 and all(not one["compiled_source"] for one in launched)
    names = {one["name"] for one in launched}
    assert len(names) == 3
    for name in names:
        at = folder / f"{name}_{compiled.NO_SOURCE}.ptx"
        assert at.read_bytes() == b"code"
        assert at.with_suffix(".txt").read_text() == f"{name}\t{name}\n"
        assert any(f"__global__ void {name}(" in text for text, _ in seen)
    assert len(list(folder.iterdir())) == 6


def test_half_of_what_was_kept_is_compiled_again(on_cuda):
    seen, _, folder = on_cuda
    for suffix in (".txt", ".ptx"):
        eight(kernel=Program("eight", (), EIGHT.call, ("x",), ("y",)))
        next(folder.glob(f"*{suffix}")).unlink()
    eight(kernel=Program("eight", (), EIGHT.call, ("x",), ("y",)))
    assert len(seen) == 3


def test_another_body_has_another_name(tmp_path):
    header = tmp_path / "a.h"
    texts = []
    for body in ("// one", "// two"):
        header.write_text(body)
        texts.append(compiled.source(Program("a", (header,), "", ("x",), ("y",)), {}, [F, F]))
    assert texts[0][0] == texts[1][0] and texts[0][1] != texts[1][1]


def test_what_does_not_compile_is_left_to_mlx(on_cuda, monkeypatch, caplog):
    def broken(*_):
        raise RuntimeError("no such instruction")

    monkeypatch.setattr(compiled, "machine_code", broken)
    assert compiled.kept(EIGHT, {"A": 1}, [F, F]) is None
    assert "no such instruction" in caplog.text
    assert compiled.kept(EIGHT, {"A": 1}, [mx.complex64, F]) is None


@pytest.fixture
def not_tried_yet():
    TRIED.cache_clear()
    yield
    TRIED.cache_clear()


def test_a_machine_without_the_compiler_goes_without(not_tried_yet, caplog):
    assert compiled.kept(EIGHT, {"A": 1}, [F, F]) is None
    assert "compiled anew at every start" in caplog.text


@pytest.mark.parametrize("answer, usable", [(2.0, True), (1.0, False), (RuntimeError(), False)])
def test_an_mlx_that_does_not_find_what_is_kept_goes_without(
    answer, usable, on_cuda, not_tried_yet, monkeypatch
):
    def launch(**_):
        if isinstance(answer, Exception):
            raise answer
        return [mx.array([answer])]

    monkeypatch.setattr(mx.fast, "precompiled_cuda_kernel", launch)
    monkeypatch.setattr(compiled, "usable", TRIED)
    assert compiled.usable() == usable


@pytest.mark.skipif(not shutil.which("g++"), reason="needs g++")
def test_mlx_looks_for_the_hash_of_no_source(tmp_path):
    code, binary = tmp_path / "hash.cpp", tmp_path / "hash"
    code.write_text(
        "#include <cstdio>\n#include <string>\n"
        'int main() { std::printf("%zx", std::hash<std::string>{}("")); }\n'
    )
    subprocess.run(["g++", code, "-o", binary], check=True)
    assert subprocess.run([binary], capture_output=True, text=True).stdout == compiled.NO_SOURCE


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant[0])
def test_kernels_compile_for_a_gpu(variant, nvrtc, monkeypatch):
    codes = []

    def launch(self, inputs, *, template, outputs, **_):
        types = *(x.dtype for x in inputs), *(dtype for _, dtype in outputs)
        text, _ = compiled.source(self, template, types)
        codes.append(compiled.machine_code(text, "sm_90a", *nvrtc))
        return [mx.zeros(shape, dtype) for shape, dtype in outputs]

    monkeypatch.setattr(Program, "__call__", launch)
    mx.disable_compile()
    try:
        trust._checks[variant[0]](*variant[1:])
    finally:
        mx.enable_compile()
    assert codes and all(code.startswith(b"\x7fELF") for code in codes)


def test_the_compiler_says_what_is_wrong(nvrtc):
    wrong = Program("wrong", (), "*y = nonsense;", ("x",), ("y",))
    text, _ = compiled.source(wrong, {}, [F, F])
    with pytest.raises(RuntimeError, match="nonsense"):
        compiled.machine_code(text, "sm_90a", *nvrtc)
