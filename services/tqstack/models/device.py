"""What MLX computes on here: the one place that asks."""

from __future__ import annotations

from typing import Literal

import mlx.core as mx

from tqstack.attention.kernels.program import gpu_dialect
from tqstack.machine import machine_memory
from tqstack.models.plan import MIB, Machine

CPU_SHARE = 0.8  # of the memory, for the sidecar: the rest is for the system and other programs


def this_machine(memory_mb: int | Literal["auto"] = "auto") -> Machine:
    """This machine.

    Args:
        memory_mb: MiB that the sidecar may use (SIDECAR_MEMORY_MB); auto: the GPU's working set, or
            a share of the memory.
    """
    on_cpu = gpu_dialect() is None
    return Machine(
        budget=_budget() if memory_mb == "auto" else memory_mb * MIB,
        # A step delays every other stream: on the CPU, keep it near a second.
        prefill_step=512 if on_cpu else 2048,
        value_bytes=4 if on_cpu else 2,
    )


def _budget() -> int:
    info = mx.device_info()
    limit = info.get("max_recommended_working_set_size") or info.get("total_memory")
    return int(limit) if limit else int(machine_memory() * CPU_SHARE)
