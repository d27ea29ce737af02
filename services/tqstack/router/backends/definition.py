"""What backends there are: those of `backends.toml`, or the two that the settings name."""

from __future__ import annotations

import os
import ssl
import tomllib
from pathlib import Path
from typing import Annotated, Any

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SecretStr,
    ValidationError,
    field_validator,
    model_validator,
)

from tqstack.router.offers import PREFIXES, Kind, Role
from tqstack.settings import Settings, SettingsError, base_url

_ROLES: dict[Kind, Role] = {"sidecar": "long", "ollama": "short", "openai": "any"}
_KEY_FORM = 'key = {env = "NAME"} or key = {file = "PATH"}; the key itself has no place in the file'


class Definition(BaseModel):
    """One backend, as it is set.

    Attributes:
        name: also the prefix that chooses it.
        key: what it wants to see of us; in the file, where to find it.
        certificate: file of the one that it must show, if it is reached by TLS and no known
            authority has signed it.
        models: those it may be asked for; none: all it has.
        default_model: the one for requests that name none of its own; empty: its first.
        at_once: the most requests at a time; none: any number.
        role: the length of the prompts that it is for. By its kind, if it is not set.
        priority: of those that a prompt may go to, the lowest comes first.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_.-]{0,31}$")]
    kind: Kind
    url: str
    key: SecretStr = SecretStr("")
    certificate: str = ""
    models: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    default_model: str = ""
    at_once: Annotated[int, Field(ge=1)] | None = None
    role: Role = "any"
    priority: int = 0
    enabled: bool = True

    @model_validator(mode="before")
    @classmethod
    def _role_follows_the_kind(cls, value: Any) -> Any:
        if isinstance(value, dict) and isinstance(kind := value.get("kind"), str):
            role = _ROLES.get(kind)  # pyright: ignore[reportArgumentType]
            return {"role": role, **value} if role else value
        return value

    @field_validator("url")
    @classmethod
    def _url_is_http(cls, value: str) -> str:
        return base_url(value)

    @field_validator("key", mode="before")
    @classmethod
    def _key_is_kept_elsewhere(cls, value: Any) -> SecretStr:
        if isinstance(value, SecretStr):
            return value
        if not isinstance(value, dict) or len(value) != 1:
            raise ValueError(f"allowed: {_KEY_FORM}")
        [(where, name)] = value.items()
        if where not in ("env", "file") or not isinstance(name, str) or not name:
            raise ValueError(f"allowed: {_KEY_FORM}")
        key = os.environ.get(name, "") if where == "env" else _read(Path(name).expanduser())
        if not key.strip() or not key.isascii() or not key.strip().isprintable():
            what = "variable" if where == "env" else "file"
            raise ValueError(f"the {what} {name} holds no key")
        return SecretStr(key.strip())

    @field_validator("certificate")
    @classmethod
    def _certificate_is_one(cls, value: str) -> str:
        if not value:
            return value
        path = str(Path(value).expanduser())
        try:
            ssl.create_default_context(cafile=path)
        except (OSError, ValueError) as error:  # SSLError is an OSError
            raise ValueError(f"{path} holds no certificate in PEM form ({error})") from None
        return path

    @model_validator(mode="after")
    def _names_keep_their_meaning(self) -> Definition:
        meant = PREFIXES.get(self.name, self.kind)
        if meant != self.kind:
            raise ValueError(f"{self.name}: means a backend of kind {meant!r}; choose another name")
        if self.default_model and self.models and self.default_model not in self.models:
            raise ValueError(f"default_model {self.default_model!r} is not among its models")
        if self.certificate and not self.url.startswith("https:"):
            raise ValueError("a certificate needs an https:// address")
        return self

    @property
    def prefix(self) -> str:
        """What is written before a model's name to have it from this backend."""
        return "tq:" if self.name == "sidecar" else f"{self.name}:"


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid")

    backend: Annotated[list[Definition], Field(min_length=1, max_length=100)]


def definitions(settings: Settings) -> list[Definition]:
    """The backends that there are, in the order of the file.

    Raises:
        SettingsError: the file cannot be used; the message names it, the backend and the field.
    """
    path = settings.backends_file
    if not path.exists():
        if settings.router_backends:
            raise SettingsError(f"ROUTER_BACKENDS={str(path)!r}: there is no such file")
        return _of_the_settings(settings)
    try:
        found = _File.model_validate(tomllib.loads(_read(path))).backend
    except ValidationError as error:
        raise SettingsError("; ".join(f"{path}: {line}" for line in _explain(error))) from None
    except (ValueError, RecursionError) as error:  # TOML's and UTF-8's errors are ValueErrors
        raise SettingsError(f"{path}: {error}") from None
    names = [one.name for one in found]
    if twice := {name for name in names if names.count(name) > 1}:
        raise SettingsError(f"{path}: there is more than one backend {min(twice)!r}")
    if not any(one.enabled for one in found):
        raise SettingsError(f"{path}: every backend is switched off; leave `enabled` out of one")
    return found


def _of_the_settings(settings: Settings) -> list[Definition]:
    return [
        Definition(
            name="sidecar",
            kind="sidecar",
            url=settings.sidecar_url,
            key=SecretStr(settings.tqstack_api_key),
            enabled=settings.runs_sidecar,
        ),
        Definition(
            name="ollama",
            kind="ollama",
            url=settings.ollama_base_url,
            default_model=settings.ollama_model,
        ),
    ]


def _read(path: Path) -> str:
    if not path.is_file():
        raise ValueError(f"{path} is no file")
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror})") from None


def _explain(error: ValidationError) -> list[str]:
    """A line per problem: where it is, and what is allowed. Values are not shown: one may be a
    key that was written into the wrong place."""
    lines = []
    for problem in error.errors(include_url=False, include_input=False):
        place, message = problem["loc"], problem["msg"].removeprefix("Value error, ")
        if problem["type"] == "extra_forbidden":
            known = sorted(_File.model_fields if len(place) == 1 else Definition.model_fields)
            message = f"is not a setting here; allowed: {', '.join(known)}"
        parts = [f"{part + 1}" if isinstance(part, int) else part for part in place]
        lines.append(f"{' '.join(parts)}: {message}" if parts else message)
    return lines[:10]
