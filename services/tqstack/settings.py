"""Every setting, once: `config.env`, then the environment, which wins.

The file is `~/ai/turboquant/config.env`, or the one that `TQSTACK_CONFIG` names. A name that is
not a setting, or a value that is not possible, is a `SettingsError` that says which, and what is
allowed.
"""

from __future__ import annotations

import os
import re
from functools import cached_property
from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import Field, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from tqstack.kv_bits import parse_widths
from tqstack.machine import DEFAULT_MAC_MODEL, SMALL_MEMORY, accelerator, machine_memory

DEFAULT_CONFIG = "~/ai/turboquant/config.env"
LOOPBACK = ("127.0.0.1", "::1", "localhost")
# In the environment, only a misspelled name with one of these prefixes can be meant for us.
OUR_PREFIXES = ("TQ_", "TQSTACK_", "SIDECAR_", "ROUTER_", "PROMPT_TOKEN_")

# sysexits.h EX_CONFIG: starting again will not help, so supervisors do not.
EXIT_CONFIG = 78

Port = Annotated[int, Field(ge=1, le=65535)]
Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Switch = Literal["auto", "1", "0"]


class SettingsError(ValueError):
    """A setting that cannot be used; the message names it, its value and what is allowed."""


class Settings(BaseSettings):
    """All settings. Field names are the variables' names in lower case."""

    model_config = SettingsConfigDict(frozen=True, extra="forbid", env_ignore_empty=True)

    sidecar_enabled: Switch = Field(
        "auto", description="run the sidecar; auto: not on a Mac with less than 32 GB"
    )
    sidecar_model: str = Field(
        "auto", min_length=1, description="model of the sidecar: demo, a folder, or a hub name"
    )
    ollama_model: str = Field(
        "", description="Ollama's model for requests that name none of its own; empty: its first"
    )
    ollama_base_url: str = Field(
        "http://127.0.0.1:11434", description="Ollama, or any OpenAI-compatible server"
    )
    prompt_token_threshold: Literal["auto"] | Annotated[int, Field(ge=1)] = Field(
        "auto", description="prompts of at least so many tokens go to the sidecar"
    )
    router_host: str = Field("127.0.0.1", min_length=1, description="address the router listens on")
    router_port: Port = Field(8000, description="port the router listens on")
    router_allowed_hosts: str = Field(
        "", description="names, with commas, that clients and web pages may use for this machine"
    )
    router_backends: str = Field(
        "", description="file of the router's backends; empty: backends.toml beside this file"
    )
    router_body_limit_mb: Annotated[int, Field(ge=1)] = Field(
        64, description="largest request body, also after decompression"
    )
    router_max_queue: Annotated[int, Field(ge=0)] = Field(
        64, description="requests that may wait where all backends are full; more get a 429"
    )
    router_connect_seconds: Seconds = Field(3, description="limit for connecting to a backend")
    router_first_token_seconds: Seconds = Field(
        180, description="limit for a stream's first token, beside 1 s for every 20 prompt tokens"
    )
    router_stall_seconds: Seconds = Field(60, description="limit for a gap between tokens")
    router_hung_seconds: Seconds = Field(
        10, description="a backend that answers neither a request nor probes for so long is left"
    )
    router_answer_seconds: Seconds = Field(
        3600, description="limit for an answer that is not streamed"
    )
    router_ping_seconds: Seconds = Field(
        10, description="a stream without a token yet gets a comment this often"
    )
    sidecar_host: str = Field("127.0.0.1", min_length=1, description="the sidecar's address")
    sidecar_port: Port = Field(8001, description="the sidecar's port")
    sidecar_max_batch: Annotated[int, Field(ge=1, le=256)] = Field(
        16, description="requests that the sidecar generates for at once; more wait"
    )
    sidecar_max_tokens: Annotated[int, Field(ge=1)] = Field(
        4096, description="tokens of an answer, where the request sets no limit"
    )
    sidecar_memory_mb: Literal["auto"] | Annotated[int, Field(ge=1)] = Field(
        "auto",
        description="memory for all that the sidecar holds, in MiB; auto: what the GPU may use, "
        "or 80 % of the machine's",
    )
    sidecar_prefix_cache_mb: Annotated[int, Field(ge=0)] = Field(
        2048, description="memory for prompts kept for their next turn, in MiB; 0: none"
    )
    sidecar_prefix_disk_gb: Literal["auto"] | Annotated[float, Field(ge=0, allow_inf_nan=False)] = (
        Field(
            "auto",
            description="disk for prompts that are kept across restarts, in GB; 0: none; "
            "auto: 8 on a Mac, else none",
        )
    )
    sidecar_max_queue: Annotated[int, Field(ge=1)] = Field(
        64, description="requests that may wait for their turn; more get a 429"
    )
    sidecar_stream_gap_ms: Literal["auto"] | Annotated[int, Field(ge=10)] = Field(
        "auto",
        description="how long reading others' prompts may hold a stream up; "
        "auto: 250 on a GPU, 1000 on a CPU",
    )
    sidecar_speculation: Literal["auto", "mtp", "lookup", "0"] = Field(
        "auto",
        description="draft tokens and verify several in a step, where that is faster: lookup, what "
        "came before in prompt and answer; mtp, the model's own head beside it; auto: lookup, "
        "where the cache can take drafts back; 0: never",
    )
    sidecar_lazy_load: Switch = Field(
        "auto", description="load the model at the first request; auto: on a Mac with 32 GB or less"
    )
    sidecar_idle_unload_seconds: Annotated[float, Field(ge=0, allow_inf_nan=False)] = Field(
        0, description="give the model's memory back after so long without a request; 0: never"
    )
    sidecar_frees_ollama: Switch = Field(
        "auto",
        description="before loading, ask Ollama to give back its models' memory; "
        "auto: if both do not fit",
    )
    sidecar_ranks: Annotated[int, Field(ge=1, le=64)] = Field(
        1,
        description="processes that divide the sidecar's model between the devices of this "
        "machine, experimental; 1: none does",
    )
    sidecar_hosts: str = Field(
        "",
        description="hosts.json of mlx.distributed_config: machines that divide the sidecar's "
        "model, this one first, experimental; empty: none do",
    )
    tqstack_api_key: str = Field("", description="key that clients must send; empty: none")
    tqstack_log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="how much is logged"
    )
    tqstack_log_dir: str = Field(
        "", description="folder for router.log and sidecar.log, rotated; empty: log to the terminal"
    )
    tq_kv_bits: str = Field("4", description="bits per cached value: 1-8, 3.5, k4v3, ...")
    tq_kv_code: Literal["auto", "lloyd", "trellis"] = Field(
        "auto",
        description="lloyd, the paper's scalar code, or the closer and slower trellis; "
        "auto: trellis where encoding it costs less than 3 % of the time here, else lloyd",
    )
    tq_kv_group_size: Literal["auto"] | Annotated[int, Field(ge=8, le=512)] = Field(
        "auto", description="values that share a scale; auto: all (turboquant), 64 (affine)"
    )
    tq_use_rotation: Literal["1", "0", "qr"] = Field("1", description="rotate: 1, 0 or qr")
    tq_use_normalization: Literal["1", "0"] = Field("1", description="store a norm per vector")
    tq_boundary_layers: Annotated[int, Field(ge=0)] = Field(
        0, description="softmax layers kept in 16 bits at either end"
    )
    tq_exact_tokens: int = Field(
        128,
        description="newest tokens beside a query's own block of 128 that stay exact, "
        "a multiple of 128; 0: every token is coded at once, as the paper does",
    )
    tq_cache_version: Literal["turboquant", "affine", "native", "none"] = Field(
        "turboquant", description="which code the cache uses"
    )

    @field_validator("tq_kv_bits")
    @classmethod
    def _bits_are_known(cls, value: str) -> str:
        parse_widths(value)
        return value.strip().lower()

    @field_validator("tq_exact_tokens")
    @classmethod
    def _exact_tokens_are_whole_blocks(cls, value: int) -> int:
        if value not in range(0, 1025, 128):
            raise ValueError("allowed: multiples of 128, from 0 to 1024")
        return value

    @field_validator("ollama_base_url")
    @classmethod
    def _url_is_http(cls, value: str) -> str:
        return base_url(value)

    @model_validator(mode="after")
    def _other_addresses_need_a_key(self) -> Settings:
        for name in ("router_host", "sidecar_host"):
            if getattr(self, name) not in LOOPBACK and not self.tqstack_api_key:
                raise ValueError(
                    f"{name.upper()}={getattr(self, name)!r} is not a loopback address: "
                    "set TQSTACK_API_KEY as well, or use 127.0.0.1"
                )
        return self

    @model_validator(mode="after")
    def _ranks_have_one_place_and_stay(self) -> Settings:
        if self.sidecar_ranks > 1 and self.sidecar_hosts:
            raise ValueError(
                f"SIDECAR_RANKS={self.sidecar_ranks} is for ranks on this machine and "
                f"SIDECAR_HOSTS={self.sidecar_hosts!r} for several: set one of them"
            )
        if self.divides_model and (
            self.sidecar_lazy_load == "1" or self.sidecar_idle_unload_seconds
        ):
            raise ValueError(
                "SIDECAR_LAZY_LOAD=1 and SIDECAR_IDLE_UNLOAD_SECONDS are for a model on one "
                "device: unset them, or SIDECAR_RANKS and SIDECAR_HOSTS"
            )
        return self

    @property
    def divides_model(self) -> bool:
        """Whether the sidecar is several processes."""
        return self.sidecar_ranks > 1 or bool(self.sidecar_hosts)

    @cached_property
    def model_name(self) -> str:
        """The sidecar's model, with `auto` resolved: the demo wherever there is no accelerator."""
        if self.sidecar_model != "auto":
            return self.sidecar_model
        return DEFAULT_MAC_MODEL if accelerator() == "metal" else "demo"

    @property
    def runs_sidecar(self) -> bool:
        if self.sidecar_enabled != "auto":
            return self.sidecar_enabled == "1"
        enough = accelerator() != "metal" or machine_memory() >= SMALL_MEMORY
        return enough or self.model_name == "demo"

    @property
    def loads_lazily(self) -> bool:
        if self.sidecar_lazy_load != "auto":
            return self.sidecar_lazy_load == "1"
        if self.divides_model:
            return False
        small = accelerator() == "metal" and machine_memory() <= SMALL_MEMORY
        return small and self.model_name != "demo"

    @property
    def prefix_disk_bytes(self) -> int:
        gigabytes = self.sidecar_prefix_disk_gb
        if gigabytes == "auto":
            gigabytes = 8 if accelerator() == "metal" else 0
        return int(gigabytes * 1e9)

    @property
    def sidecar_url(self) -> str:
        return _url(self.sidecar_host, self.sidecar_port)

    def known_hosts(self, host: str) -> list[str]:
        """Names under which a service that listens on `host` may be reached."""
        return [*LOOPBACK, host, *self.router_allowed_hosts.split(",")]

    @property
    def backends_file(self) -> Path:
        """The file of backends, which need not be there."""
        if self.router_backends:
            return Path(self.router_backends).expanduser()
        return config_path().with_name("backends.toml")

    @property
    def keys_file(self) -> Path:
        """The file of the router's client keys, which need not be there."""
        return config_path().with_name("keys.json")

    @property
    def router_url(self) -> str:
        return _url(self.router_host, self.router_port)


def _url(host: str, port: int) -> str:
    host = {"0.0.0.0": "127.0.0.1", "::": "::1", "localhost": "127.0.0.1"}.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def base_url(value: str) -> str:
    """A server's address as it is dialled, without `/v1`.

    Raises:
        ValueError: it is none.
    """
    url = urlsplit(value)
    if url.scheme not in ("http", "https") or not url.hostname or not _is_port(url.netloc):
        raise ValueError("allowed: an http:// or https:// address, such as http://127.0.0.1:11434")
    # `localhost` may resolve to ::1, where Ollama does not listen: dial the address.
    value = value.replace("//localhost", "//127.0.0.1", 1)
    return value.rstrip("/").removesuffix("/v1")


def _is_port(netloc: str) -> bool:
    port = re.search(r":(\d*)$", netloc.rpartition("@")[2])
    return port is None or not port[1] or 0 < int(port[1]) < 65536


def config_path() -> Path:
    return Path(os.environ.get("TQSTACK_CONFIG") or DEFAULT_CONFIG).expanduser()


def load_settings() -> Settings:
    """Read the file and the environment.

    Raises:
        SettingsError: an unknown setting, or a value that is not allowed.
    """
    path = config_path()
    # Services name the file, which need not be there where it always is.
    if not path.exists() and path != Path(DEFAULT_CONFIG).expanduser():
        raise SettingsError(f"TQSTACK_CONFIG={str(path)!r}: there is no such file")
    for name in os.environ:
        if name.startswith(OUR_PREFIXES) and name not in (*_names(), "TQSTACK_CONFIG"):
            raise SettingsError(_unknown(name))
    try:
        return Settings(_env_file=path)  # pyright: ignore[reportCallIssue]
    except ValidationError as error:
        raise SettingsError(_explain(error, path)) from None


def _names() -> list[str]:
    return [name.upper() for name in Settings.model_fields]


def _unknown(name: str) -> str:
    return f"{name.upper()} is not a setting; allowed: {', '.join(sorted(_names()))}"


def _explain(error: ValidationError, path: Path) -> str:
    lines = []
    for problem in error.errors():
        field = str(problem["loc"][0]) if problem["loc"] else ""
        message = problem["msg"].removeprefix("Value error, ")
        line = f"{field.upper()}={problem['input']!r}: {message}" if field else message
        if problem["type"] == "extra_forbidden":
            line = _unknown(field)
        line = _where(field, path) + line
        if line not in lines:
            lines.append(line)
    return "; ".join(lines)


def _where(field: str, path: Path) -> str:
    """`FILE:LINE: ` of the setting in the file, unless it came from the environment."""
    if not field or os.environ.get(field.upper()) or not path.exists():
        return ""
    setting = re.compile(rf"\s*(export\s+)?{re.escape(field)}\s*=", re.IGNORECASE)
    found = [
        number
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if setting.match(line)
    ]
    return f"{path}:{found[-1]}: " if found else ""
