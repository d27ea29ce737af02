"""Kernels from one source in three dialects: what Metal and CUDA compile, and how it is launched.

A body (`attend.h`, ...) is written in the words of a dialect header; the kernel itself is a line
that calls it. Programs compile lazily, because `mx.fast.cuda_kernel` raises without CUDA and
`mx.fast.metal_kernel` with it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import mlx.core as mx

from tqstack.attention.kernels import compiled

FOLDER = Path(__file__).parent
# Names that the call of a body uses: the block's indices and the thread within it.
PRELUDES = {
    "cuda": "const uint3 block = blockIdx; const int tid = threadIdx.x;",
    "metal": (
        "const uint3 block = threadgroup_position_in_grid; "
        "const int tid = thread_position_in_threadgroup.x;"
    ),
}


log = logging.getLogger(__name__)


def gpu_dialect() -> str | None:
    """The dialect of the default device: "cuda", "metal", or None on a CPU."""
    if mx.default_device().type != mx.DeviceType.gpu:
        return None
    return "metal" if mx.metal.is_available() else "cuda"


def fault(kernel: str, error: Callable[[], float], tolerance: float) -> str | None:
    """Why a kernel must not be used, or None: it does not run, or is farther from its twin, plain
    operations, than the tolerance. Warns."""
    try:
        found = error()
    except Exception as failure:  # whatever the compiler says
        reason = f"does not run: {failure}"
    else:
        if abs(found) <= tolerance:  # not NaN either
            return None
        reason = f"is wrong by {found:.1e}, allowed {tolerance:.0e}"
    log.warning("the %s %s; plain operations are used instead", kernel, reason)
    return reason


@dataclass(frozen=True)
class Program:
    """A kernel: the header files of its body, the statement that calls it, and its arguments.
    Headers are files of this folder, or paths."""

    name: str
    headers: tuple[str | Path, ...]
    call: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    shared_words: int = 0  # of `SHARED_MEMORY`, where the launch sets it: CUDA

    def header(self, dialect: str) -> str:
        """The dialect and the bodies. CUDA's compiler includes them by itself: MLX copies and
        hashes the source at every launch, so what it sees is kept short."""
        files = self.files(dialect)
        if dialect == "cuda":
            return "".join(f'#include "{file}"\n' for file in files)
        return "\n".join(file.read_text() for file in files)

    def files(self, dialect: str) -> list[Path]:
        return [FOLDER / file for file in (f"dialect_{dialect}.h", *self.headers)]

    def body(self, dialect: str) -> str:
        """Of the kernel's function."""
        return PRELUDES[dialect] + self.call

    @cached_property
    def _kept(self) -> dict[Any, str | None]:
        """Names of compiled variants, by their constants and types (`compiled.py`)."""
        return {}

    @cached_property
    def _kernel(self) -> Any:
        dialect = gpu_dialect()
        assert dialect is not None, "kernels need a GPU"
        make: Any = mx.fast.metal_kernel
        if dialect == "cuda":
            make = partial(mx.fast.cuda_kernel, shared_memory=4 * self.shared_words)
        return make(
            name=f"tqstack_{self.name}",
            input_names=self.inputs,
            output_names=self.outputs,
            source=self.body(dialect),
            header=self.header(dialect),
        )

    def __call__(
        self,
        inputs: Sequence[mx.array],
        *,
        template: Mapping[str, int | bool | mx.Dtype],
        blocks: tuple[int, int, int],
        threads: int,
        outputs: Sequence[tuple[tuple[int, ...], mx.Dtype]],
    ) -> list[mx.array]:
        """Launch `blocks` of `threads` each; outputs are (shape, dtype)."""
        options: dict[str, Any] = {
            "grid": (blocks[0] * threads, *blocks[1:]),
            "threadgroup": (threads, 1, 1),
            "output_shapes": [shape for shape, _ in outputs],
            "output_dtypes": [dtype for _, dtype in outputs],
        }
        if gpu_dialect() == "cuda":
            types = *(x.dtype for x in inputs), *options["output_dtypes"]
            variant = *template.items(), *types
            if variant not in self._kept:
                self._kept[variant] = compiled.kept(self, template, types)
            name = self._kept[variant]
            if name is not None:
                return compiled.launch(name, inputs, 4 * self.shared_words, **options)
        return self._kernel(inputs=list(inputs), template=list(template.items()), **options)
