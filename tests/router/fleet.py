"""A router and as many scripted backends as a test wants, by way of a `backends.toml`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from router.scripted import Scripted, says
from router.stack import HYBRID, Stack


class Fleet(Stack):
    """`with Fleet(folder, desk={...}, shed={...}) as fleet:`; a backend is `fleet["desk"]`.

    What is said of a backend is its entry in the file, but for name and url. Each says its name.
    """

    def __init__(self, folder: Path, settings: dict[str, Any] | None = None, **entries: Any):
        self.file = folder / "backends.toml"
        self.entries = {name: {"kind": "openai", **entry} for name, entry in entries.items()}
        super().__init__(False, False, router_backends=str(self.file), **settings or {})
        for name in entries:
            self.add(name)

    def add(self, name: str) -> Scripted:
        health = {**HYBRID} if self.entries[name]["kind"] == "sidecar" else {}
        backend = Scripted(name, says("from ", name), ["m"], health)
        self.scripted.append(backend)
        return backend

    def __getitem__(self, name: str) -> Scripted:
        return next(b for b in self.scripted[2:] if b.name == name)

    async def _up(self) -> None:
        for backend in self.scripted[2:]:
            await backend.start()
        self.write()
        await super()._up()

    def write(self) -> None:
        self.file.write_text(
            "".join(
                toml({"name": name, "url": f"http://127.0.0.1:{self[name].port}", **entry})
                for name, entry in self.entries.items()
            )
        )


def toml(entry: dict[str, Any]) -> str:
    lines = [f"{name} = {_value(value)}" for name, value in entry.items()]
    return "\n".join(["[[backend]]", *lines, "", ""])


def _value(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name} = {_value(one)}" for name, one in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_value, value)) + "]"
    if isinstance(value, str):
        return "'" + value + "'"
    return str(value).lower()
