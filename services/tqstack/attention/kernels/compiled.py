"""CUDA kernels as machine code, made once and kept from start to start.

`mx.fast.cuda_kernel` compiles at every start, behind headers of MLX's that take longer than our
kernels: 1 to 3 s for each. MLX's folder of compiled code (MLX_PTX_CACHE_DIR) is read for every
kernel all the same, precompiled ones included: we put ours there, and launch them by name, without
any source.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import threading
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx

if TYPE_CHECKING:
    from tqstack.attention.kernels.program import Program

log = logging.getLogger(__name__)

# The C++ names of MLX's types; NVRTC knows no <cstdint>.
TYPES = {
    mx.bool_: "bool",
    mx.uint8: "unsigned char",
    mx.int32: "int",
    mx.uint32: "unsigned int",
    mx.float16: "__half",
    mx.bfloat16: "__nv_bfloat16",
    mx.float32: "float",
}
# MLX keeps a kernel as <name>_<hash of its source>: of an empty one, by libstdc++.
NO_SOURCE = "553e93901e462a6e"
# Of the compiler, the disk, types and devices that are not known here: then MLX compiles.
_FAILURES = OSError, RuntimeError, KeyError, ValueError


def kept(program: Program, template: Mapping[str, Any], types: Sequence[mx.Dtype]) -> str | None:
    """The name under which MLX finds this kernel, which is compiled if it is not there yet. None:
    MLX has to compile it.

    types: of inputs, then of outputs.
    """
    if not usable():
        return None
    try:
        return _keep(program.name, *source(program, template, types))
    except _FAILURES as error:
        log.warning("the %s kernel is left to MLX's compiler: %s", program.name, error)
        return None


def launch(name: str, inputs: Sequence[mx.array], shared_memory: int, **options: Any) -> list[Any]:
    """Launch a kernel that is kept; options as those of `mx.fast.precompiled_cuda_kernel`."""
    return mx.fast.precompiled_cuda_kernel(
        name=name,
        compiled_source=b"",
        inputs=list(inputs),
        scalars=[],
        shared_memory=shared_memory,
        ensure_row_contiguous=True,
        **options,
    )


@cache
def usable() -> bool:
    """Whether kernels compile here and this MLX finds what is kept: a small one is tried."""
    text = 'extern "C" __global__ void KERNEL(const float* x, float* y) { *y = *x + 1; }'
    one = {"grid": (1, 1, 1), "threadgroup": (1, 1, 1)}
    shapes = {"output_shapes": [(1,)], "output_dtypes": [mx.float32]}
    try:
        (y,) = launch(_keep("probe", text, text), [mx.ones(1)], 0, **one, **shapes)
        if y.item() != 2:
            raise RuntimeError("MLX does not run what is kept")
    except _FAILURES as error:
        log.warning("kernels are compiled anew at every start: %s", error)
        return False
    return True


def source(
    program: Program, template: Mapping[str, Any], types: Sequence[mx.Dtype]
) -> tuple[str, str]:
    """A kernel named KERNEL, and all that decides what it does, headers included."""
    names = zip((*program.inputs, *program.outputs), types, strict=True)
    inputs = len(program.inputs)
    parameters = [
        f"{'const ' if i < inputs else ''}{TYPES[dtype]}* {name}"
        for i, (name, dtype) in enumerate(names)
    ]
    constants = "".join(_constant(name, value) for name, value in template.items())
    text = (
        f'extern "C" __global__ void KERNEL({", ".join(parameters)}) {{\n'
        f"{constants}{program.body('cuda')}\n}}\n"
    )
    bodies = "".join(path.read_text() for path in program.files("cuda"))
    return program.header("cuda") + text, bodies + text


def _constant(name: str, value: Any) -> str:
    if isinstance(value, mx.Dtype):
        return f"using {name} = {TYPES[value]};\n"
    kind = "bool" if isinstance(value, bool) else "int"
    return f"constexpr {kind} {name} = {int(value)};\n"


def _keep(kernel: str, text: str, decides: str) -> str:
    target = architecture()
    name = f"tqstack_{kernel}_{hashlib.sha256(f'{target} {decides}'.encode()).hexdigest()[:16]}"
    folder = Path(os.environ["MLX_PTX_CACHE_DIR"])
    code = folder / f"{name}_{NO_SOURCE}.ptx"
    functions = code.with_suffix(".txt")
    if not (code.exists() and functions.exists()):
        result = machine_code(text.replace("KERNEL", name), target, nvrtc(), headers())
        folder.mkdir(parents=True, exist_ok=True)
        _write(functions, f"{name}\t{name}\n".encode())
        _write(code, result)
    return name


def _write(path: Path, content: bytes) -> None:
    """At once: other processes may be reading or writing it."""
    beside = path.with_suffix(f".{os.getpid()}-{threading.get_ident()}")
    beside.write_bytes(content)
    beside.replace(path)


def architecture() -> str:
    """What MLX compiles for too: this device, with what only its generation has."""
    name = str(mx.device_info()["architecture"])  # sm_90
    return name + "a" * (int(name.removeprefix("sm_")) >= 90)


@cache
def nvrtc() -> ctypes.CDLL:
    """The compiler that MLX has loaded.

    Raises:
        OSError: there is none.
    """
    loaded = os.RTLD_NOW | os.RTLD_NOLOAD
    try:
        return ctypes.CDLL("libnvrtc.so.13", loaded)
    except OSError:
        return ctypes.CDLL("libnvrtc.so.12", loaded)


@cache
def headers() -> tuple[Path, ...]:
    """Where CUDA's headers may be, in MLX's order."""
    package = Path(mx.__file__).parent
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    folders = (
        package / "include/cccl",
        *(package.parent / "nvidia" / name / "include" for name in ("cu13", "cuda_runtime")),
        *(Path(home) / name for name in ("include", "include/cccl")),
    )
    return tuple(folder for folder in folders if folder.is_dir())


def machine_code(text: str, target: str, compiler: ctypes.CDLL, folders: Sequence[Path]) -> bytes:
    """CUDA C++ -> cubin.

    Raises:
        RuntimeError: with what the compiler says.
    """
    program, size = ctypes.c_void_p(), ctypes.c_size_t()
    options = [f"--gpu-architecture={target}", *(f"--include-path={path}" for path in folders)]
    listed = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
    if compiler.nvrtcCreateProgram(ctypes.byref(program), text.encode(), b"k.cu", 0, None, None):
        raise RuntimeError("NVRTC does not start")
    try:
        failed = compiler.nvrtcCompileProgram(program, len(options), listed)
        kind = "ProgramLog" if failed else "CUBIN"
        getattr(compiler, f"nvrtcGet{kind}Size")(program, ctypes.byref(size))
        result = ctypes.create_string_buffer(size.value)
        getattr(compiler, f"nvrtcGet{kind}")(program, result)
    finally:
        compiler.nvrtcDestroyProgram(ctypes.byref(program))
    if failed:
        raise RuntimeError(result.value.decode(errors="replace"))
    return result.raw
