"""`hosts.json`: the machines of SIDECAR_HOSTS, in the format that `mlx.distributed_config` writes.

    {"backend": "jaccl", "envs": ["MLX_METAL_FAST_SYNCH=1"],
     "hosts": [{"ssh": "studio", "ips": ["10.0.0.1"], "rdma": [null, "rdma_en2"]}, ...]}

or the list of hosts alone. The first one is this machine.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import orjson
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from tqstack.settings import SettingsError

HERE = ("127.0.0.1", "localhost", "::1")


class Host(BaseModel):
    """
    Attributes:
        ssh: how `ssh` reaches it.
        ips: its addresses, over which numbers go.
        rdma: for jaccl, its devices towards each host, null for itself.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    ssh: Annotated[str, Field(min_length=1, pattern=r"^[^-\s][^\s]*$")]
    ips: Annotated[tuple[str, ...], Field(min_length=1)]
    rdma: tuple[str | tuple[str, ...] | None, ...] = ()


class Hosts(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    hosts: Annotated[tuple[Host, ...], Field(min_length=2, max_length=64)]
    backend: Literal["", "ring", "jaccl", "jaccl-ring"] = ""
    envs: tuple[Annotated[str, Field(pattern=r"^[A-Z_][A-Z0-9_]*=")], ...] = ()

    @model_validator(mode="after")
    def _links_are_complete(self) -> Hosts:
        n = len(self.hosts)
        for i, host in enumerate(self.hosts if self.links.startswith("jaccl") else ()):
            near = {(i - 1) % n, (i + 1) % n} if self.links == "jaccl-ring" else set(range(n))
            if len(host.rdma) != n or any(host.rdma[j] is None for j in near - {i}):
                raise ValueError(f"{host.ssh} has no rdma device for each other host")
        return self

    @property
    def links(self) -> Literal["ring", "jaccl", "jaccl-ring"]:
        """What collectives go over."""
        return self.backend or "ring"

    @property
    def environment(self) -> dict[str, str]:
        return dict(one.split("=", 1) for one in self.envs)


def read_hosts(name: str) -> Hosts:
    """
    Raises:
        SettingsError: the file is not there, or not such a file.
    """
    path = Path(name).expanduser()
    try:
        told: Any = orjson.loads(path.read_bytes())
        return Hosts.model_validate(told if isinstance(told, dict) else {"hosts": told})
    except OSError as error:
        raise SettingsError(f"SIDECAR_HOSTS={name!r}: {error.strerror}") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        message = first["msg"].removeprefix("Value error, ")
        raise SettingsError(
            f"SIDECAR_HOSTS={name!r}: {where + ': ' if where else ''}{message}; the file is that "
            "of mlx.distributed_config, with this machine first"
        ) from None
    except ValueError as error:
        raise SettingsError(f"SIDECAR_HOSTS={name!r} is no JSON: {error}") from None
