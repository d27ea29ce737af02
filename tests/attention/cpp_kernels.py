"""Runs kernel programs in their C++ dialect: compiled by g++, launched on numpy arrays."""

from __future__ import annotations

import ctypes
import hashlib
import shutil
import subprocess
import tempfile
from contextlib import suppress
from functools import cache, partial
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from tqstack.attention.kernels import trust
from tqstack.attention.kernels.program import Program

COMPILER = shutil.which("g++")
CACHE = Path(tempfile.gettempdir()) / "tqstack-cpp-kernels"
_TYPES = {
    mx.uint32: "uint32_t",
    mx.uint8: "uint8_t",
    mx.int32: "int32_t",
    mx.float16: "half_t",
    mx.float32: "float",
    mx.bool_: "bool",
}
_POISON = {
    mx.float32: float("nan"),
    mx.float16: float("nan"),
    mx.uint32: 0xA5A5A5A5,
    mx.uint8: 0xA5,
}
_FLAGS = ["-std=c++17", "-O1", "-Wall", "-Wno-unused", "-fPIC"]
# What the dialect includes, which takes longer to compile than most kernels: done once.
_LIBRARY = "#include <cmath>\n#include <cstdint>\n#include <functional>\n#include <vector>\n"
_LAUNCHER = """
{header}
struct uint3 {{ int x, y, z; }};
extern "C" void launch(const int* blocks, int threads, void** arguments) {{
  {arguments}
  {constants}
  for (int bz = 0; bz < blocks[2]; bz++)
    for (int by = 0; by < blocks[1]; by++)
      for (int bx = 0; bx < blocks[0]; bx++) {{
        const uint3 block = {{bx, by, bz}};
        Block(threads, [&](int tid) {{ {call} }});
      }}
}}
"""


def run(program: Program, inputs, *, template, blocks, threads, outputs, metal_layout=False):
    """`Program.__call__`, on the CPU. Outputs start as nonsense: what is not written shows."""
    arguments = [
        f"const auto {name} = (const {_TYPES[x.dtype]}*)arguments[{i}];"
        for i, (name, x) in enumerate(zip(program.inputs, inputs, strict=True))
    ]
    arguments += [
        f"const auto {name} = ({_TYPES[dtype]}*)arguments[{len(inputs) + i}];"
        for i, (name, (_, dtype)) in enumerate(zip(program.outputs, outputs, strict=True))
    ]
    constants = [f"constexpr int {name} = {int(value)};" for name, value in template.items()]
    source = _LAUNCHER.format(
        header=program.header("cpp"),
        arguments="\n  ".join(arguments),
        constants="\n  ".join(constants),
        call=program.call,
    )
    launch = _compile(("#define METAL_LAYOUT\n" if metal_layout else "") + source)
    arrays = [np.ascontiguousarray(np.array(x)) for x in inputs]
    arrays += [np.array(mx.full(shape, _POISON[dtype], dtype=dtype)) for shape, dtype in outputs]
    pointers = (ctypes.c_void_p * len(arrays))(*(a.ctypes.data for a in arrays))
    launch((ctypes.c_int * 3)(*blocks), threads, pointers)
    return [mx.array(a) for a in arrays[len(inputs) :]]


@pytest.fixture(autouse=True)
def in_cpp(request, monkeypatch, tmp_path):
    """Programs run in C++, with the matrix fragments of CUDA, or of Metal where a test asks; what
    agrees with its twin is remembered for one test."""
    monkeypatch.setattr(trust, "_memory", lambda: tmp_path / "cache" / "trusted-kernels.txt")
    layout = partial(run, metal_layout=getattr(request, "param", "") == "metal layout")
    monkeypatch.setattr(
        Program, "__call__", lambda self, inputs, **how: layout(self, inputs, **how)
    )
    mx.disable_compile()  # the C++ programs want real arrays, not traces
    yield
    mx.enable_compile()


both_layouts = pytest.mark.parametrize("in_cpp", ["cuda layout", "metal layout"], indirect=True)


@cache
def _compile(source: str):
    library = _kept(source, ".so", _build)
    return ctypes.CDLL(str(library)).launch


def _build(source: str, folder: Path) -> Path:
    code, built = folder / "kernel.cpp", folder / "kernel.so"
    code.write_text(source)
    before = ["-include", _kept(_LIBRARY, ".h", _precompile) / "library.h"]
    subprocess.run([COMPILER, *_FLAGS, *before, "-shared", code, "-o", built], check=True)
    return built


def _precompile(source: str, folder: Path) -> Path:
    made = folder / "made"
    made.mkdir()
    (made / "library.h").write_text(source)
    command = [COMPILER, *_FLAGS, "-x", "c++-header", made / "library.h"]
    subprocess.run([*command, "-o", made / "library.h.gch"], check=True)
    return made


def _kept(source: str, suffix: str, build) -> Path:
    """What was built of this source, by an earlier test run or now."""
    CACHE.mkdir(exist_ok=True)
    path = CACHE / f"{hashlib.sha256(source.encode()).hexdigest()[:16]}{suffix}"
    if not path.exists():
        with tempfile.TemporaryDirectory(dir=CACHE) as folder:
            built = build(source, Path(folder))
            with suppress(OSError):  # a test run beside this one was faster
                built.rename(path)
    return path
