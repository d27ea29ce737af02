"""`tqstack config ...`: write the settings' file, and show what applies."""

from __future__ import annotations

import difflib
import os
import re
from pathlib import Path
from typing import Annotated, Any, get_args

import typer
from pydantic.fields import FieldInfo

from tqstack.cli.common import console, errors, fail, settings
from tqstack.service.definition import write as replace_file
from tqstack.settings import Settings, SettingsError, config_path, load_settings

app = typer.Typer(help="Write and show the settings.", no_args_is_help=True)

HEADER = """\
# The settings of tqstack. A line NAME=value sets one; behind a # stands the default.
# The environment wins over this file. After a change: tqstack doctor; tqstack service restart
"""
SECRET = ("tqstack_api_key",)


@app.command()
def show() -> None:
    """Print every setting that applies; those that are not the default are marked with a *."""
    config = settings()
    for name, field in Settings.model_fields.items():
        value = getattr(config, name)
        mark = " " if value == field.default else "*"
        text = "(set)" if name in SECRET and value else value
        typer.echo(f"{mark} {name.upper()}={text}")


@app.command()
def path() -> None:
    """Print where the settings' file is."""
    typer.echo(config_path())


@app.command()
def reload() -> None:
    """Have the running router read backends.toml again. Requests that run are not touched."""
    import httpx

    chosen = settings()
    key = chosen.tqstack_api_key
    headers = {"authorization": f"Bearer {key}"} if key else {}
    try:
        answer = httpx.post(
            f"{chosen.router_url}/reload", headers=headers, timeout=10, trust_env=False
        )
        told = answer.json()
    except (httpx.HTTPError, ValueError) as error:
        fail(f"the router at {chosen.router_url} does not answer ({error})")
    if answer.status_code != 200:
        fail(told["error"]["message"])
    console.print(f"{chosen.backends_file}: {told['change']}", markup=False, highlight=False)


@app.command()
def write(
    changes: Annotated[
        list[str] | None, typer.Option("--set", help="NAME=value; may be repeated")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Change nothing.")] = False,
) -> None:
    """Make the settings' file, or add what it lacks; all that you wrote stays. Shows the change."""
    target = config_path()
    old = target.read_text() if target.exists() else ""
    new = updated(old, dict(_change(text) for text in changes or []))
    diff = difflib.unified_diff(
        old.splitlines(), new.splitlines(), f"{target} (now)", str(target), lineterm="", n=0
    )
    for line in diff if old else ():
        errors.print(line, markup=False, highlight=False)
    verb = "would be" if dry_run else "is"
    if new == old:
        console.print(f"{target} {verb} left as it is")
        return
    if not dry_run:
        save(target, new)
    console.print(f"{target} {verb} {'changed' if old else 'made'}")


def save(target: Path, text: str) -> None:
    """Replace the file, for its owner's eyes alone, unless its settings cannot be used."""
    before = target.read_bytes() if target.exists() else None
    replace_file(target, text.encode())
    target.chmod(0o600)  # it may hold a key
    try:
        load_settings()
    except SettingsError as error:
        if before is None:
            target.unlink()
        else:
            replace_file(target, before)
            target.chmod(0o600)
        fail(f"{error}; {target} stays as it was")


def updated(text: str, changes: dict[str, str]) -> str:
    """The file's text with these settings changed, and those that it lacks added as comments."""
    lines: list[str] = (text or HEADER).splitlines()
    for name, field in Settings.model_fields.items():
        name = name.upper()
        present = _line_of(lines, name)
        if present is None:
            lines += ["", comment(field), f"#{name}={_quoted(str(field.default))}"]
            present = len(lines) - 1
        if name in changes:
            lines[present] = f"{name}={_quoted(changes[name])}"
    return "\n".join(lines) + "\n"


def comment(field: FieldInfo) -> str:
    """What a setting is for, and what it can be."""
    words = _choices(field.annotation)
    return f"# {field.description}" + (f" (allowed: {', '.join(words)})" if words else "")


def _choices(annotation: Any) -> list[str]:
    """Words of a Literal."""
    arguments = get_args(annotation)
    return list(arguments) if arguments and all(isinstance(a, str) for a in arguments) else []


def _line_of(lines: list[str], name: str) -> int | None:
    """The line that sets `name`, the last if there are several; else the one that shows it."""
    for prefix in ("", "#"):
        setting = re.compile(rf"\s*{prefix}\s*(export\s+)?{name}\s*=", re.IGNORECASE)
        found = [i for i, line in enumerate(lines) if setting.match(line)]
        if found:
            return found[-1]
    return None


def _quoted(value: str) -> str:
    if re.fullmatch(r"[\w./:@%+,-]*", value):
        return value
    escaped = value.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"


def _change(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or name.lower() not in Settings.model_fields:
        known = ", ".join(sorted(field.upper() for field in Settings.model_fields))
        fail(f"--set {text}: give NAME=value, NAME one of {known}")
    return name.upper(), os.path.expanduser(value)
