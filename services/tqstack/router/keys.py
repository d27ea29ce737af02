"""Keys of the router's clients, each with a name and limits. On disk there are hashes only."""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
import secrets
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tqstack.settings import Settings, SettingsError

log = logging.getLogger(__name__)

OWNER = "owner"  # who sends TQSTACK_API_KEY
KeyName = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_.-]{0,31}$")]
Limit = Annotated[int, Field(ge=1)] | None


class ClientKey(BaseModel):
    """
    Attributes:
        sha256: of the key, in hexadecimal. A key is 32 random bytes: no slower hash is needed.
        at_once: the most requests at a time; none: any number.
        tokens_a_minute: of prompts and answers.
        made_at: seconds since 1970.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: KeyName
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    at_once: Limit = None
    tokens_a_minute: Limit = None
    made_at: float = 0


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid")

    keys: list[ClientKey]


def read_keys(path: Path) -> dict[str, ClientKey] | None:
    """The keys by name; `None` without a file.

    Raises:
        SettingsError: the file cannot be used.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise SettingsError(f"{path} cannot be read ({error.strerror})") from None
    try:
        keys = _File.model_validate_json(data).keys
    except ValidationError as error:
        problem = error.errors(include_url=False, include_input=False)[0]
        place = " ".join(map(str, problem["loc"]))
        raise SettingsError(f"{path}: {place} {problem['msg']}".replace("  ", " ")) from None
    return {key.name: key for key in keys}


def write_keys(path: Path, keys: Mapping[str, ClientKey]) -> None:
    """Replaces the file at once, for its owner's eyes alone."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=path.name)  # mode 0600
    with os.fdopen(descriptor, "w") as file:
        file.write(_File(keys=list(keys.values())).model_dump_json(indent=2, exclude_none=True))
    os.replace(name, path)


def new_key(name: str, at_once: Limit, tokens_a_minute: Limit) -> tuple[str, ClientKey]:
    """A key, which is nowhere else, and what is kept of it."""
    key = f"tq-{secrets.token_urlsafe(32)}"
    digest = hashlib.sha256(key.encode()).hexdigest()
    return key, ClientKey(
        name=name,
        sha256=digest,
        at_once=at_once,
        tokens_a_minute=tokens_a_minute,
        made_at=time.time(),
    )


class Keys:
    """Who a key belongs to. The file is looked at for each request: a revoked key ends at once.

    Attributes:
        named: the keys of the file.

    Raises:
        SettingsError: the file cannot be used.
    """

    def __init__(self, settings: Settings):
        self._path = settings.keys_file
        self._owner = settings.tqstack_api_key.encode()
        self._stamp = self._look()
        self._needed = self._stamp is not None
        self.named = read_keys(self._path) or {}

    def name_of(self, key: bytes | None) -> str | None:
        """The client's name; empty where no key is needed; `None` if it may not come in.

        A key is needed if there is `TQSTACK_API_KEY` or a file, also one without any key.
        """
        if (stamp := self._look()) != self._stamp:
            self._stamp = stamp
            self._read_again()
        if not self._owner and not self._needed:
            return ""
        if key is None:
            return None
        found = OWNER if self._owner and hmac.compare_digest(key, self._owner) else None
        digest = hashlib.sha256(key).hexdigest()
        for one in self.named.values():  # all of them: the time tells nothing
            if hmac.compare_digest(digest, one.sha256):
                found = one.name
        return found

    def _read_again(self) -> None:
        try:
            named = read_keys(self._path)
        except SettingsError as error:
            log.warning("the keys stay as they were: %s", error)
            return
        self._needed, self.named = named is not None, named or {}
        log.info("the keys were read again: %s", ", ".join(self.named) or "none")

    def _look(self) -> tuple[int, int] | None:
        try:
            status = os.stat(self._path)
        except OSError:
            return None
        return status.st_mtime_ns, status.st_ino
