"""What the supervisor tells a rank at its start, as plain data on the rank's standard input."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

import orjson

from tqstack.settings import Settings

Backend = Literal["ring", "jaccl", "jaccl-ring", "nccl"]


@dataclass(frozen=True)
class Role:
    """
    Attributes:
        beside: ranks on this rank's machine, this one included; they share its memory.
        address: where rank 0 takes the others' connections: host, port.
        key: that both ends of those connections must know; of one start.
        environment: MLX's own variables.
        files: variables whose values are files with this content.
        settings: those of rank 0, so that all ranks compute the same.
        listener: of rank 0: the descriptor of the socket that listens at `address`.
    """

    rank: int
    ranks: int
    beside: int
    backend: Backend
    address: tuple[str, int]
    key: str
    environment: dict[str, str]
    files: dict[str, str]
    settings: dict[str, Any]
    listener: int | None = None

    def to_line(self) -> bytes:
        return orjson.dumps(asdict(self)) + b"\n"

    @classmethod
    def from_line(cls, line: bytes) -> Role:
        told = orjson.loads(line)
        return cls(**{**told, "address": tuple(told["address"])})

    def own_settings(self) -> Settings:
        """The settings of this rank: what is for one machine is shared by those on it."""
        from tqstack.models.device import this_machine  # supervisors need no MLX
        from tqstack.models.plan import MIB

        given = Settings(**self.settings)
        share = {
            "sidecar_prefix_cache_mb": given.sidecar_prefix_cache_mb // self.beside,
            "sidecar_prefix_disk_gb": given.prefix_disk_bytes / 1e9 / self.beside,
        }
        if self.beside > 1:
            budget = this_machine(given.sidecar_memory_mb).budget
            share["sidecar_memory_mb"] = max(1, budget // MIB // self.beside)
        return given.model_copy(update=share)


def settings_of_others(settings: Settings) -> dict[str, Any]:
    """What ranks other than 0 are told: no key, for they serve nobody."""
    return {**settings.model_dump(mode="json"), "tqstack_api_key": "", "sidecar_host": "127.0.0.1"}
