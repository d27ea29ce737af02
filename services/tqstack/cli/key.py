"""`tqstack key ...`: keys of the router's clients."""

from __future__ import annotations

import time
from typing import Annotated

import typer
from pydantic import ValidationError
from rich.table import Table

from tqstack.cli.common import console, fail, settings
from tqstack.settings import Settings, SettingsError

app = typer.Typer(help="Make and revoke keys of the router's clients.", no_args_is_help=True)


@app.command()
def add(
    name: str,
    at_once: Annotated[int | None, typer.Option(min=1, help="the most requests at a time")] = None,
    tokens_a_minute: Annotated[
        int | None, typer.Option(min=1, help="the most tokens of prompts and answers")
    ] = None,
) -> None:
    """Make a key, and print it, this once. From the first one on, every client needs one."""
    from tqstack.router.keys import OWNER, new_key, write_keys

    chosen = settings()
    keys = _keys(chosen)
    if name in keys or name == OWNER:
        fail(f"there is a key {name!r} already; revoke it first, or choose another name")
    try:
        key, kept = new_key(name, at_once, tokens_a_minute)
    except ValidationError:
        fail(f"{name!r} is no name for a key; allowed: small letters, digits and . _ - inside")
    write_keys(chosen.keys_file, {**keys, name: kept})
    typer.echo(key)
    if not chosen.tqstack_api_key:
        note = "`tqstack top` and `tqstack config reload` need a TQSTACK_API_KEY from now on"
        typer.echo(note, err=True)


@app.command("list")
def list_() -> None:
    """Show the keys' names and limits."""
    keys = _keys(settings())
    table = Table("name", "made", "at once", "tokens a minute", box=None)
    for key in keys.values():
        made = time.strftime("%Y-%m-%d %H:%M", time.localtime(key.made_at))
        limits = (f"{limit:,}" if limit else "–" for limit in (key.at_once, key.tokens_a_minute))
        table.add_row(key.name, made, *limits)
    console.print(table if keys else "there are no keys")


@app.command()
def revoke(name: str) -> None:
    """Have a key open nothing any more, at once."""
    from tqstack.router.keys import write_keys

    chosen = settings()
    keys = _keys(chosen)
    if keys.pop(name, None) is None:
        fail(f"there is no key {name!r}; `tqstack key list` shows those that there are")
    write_keys(chosen.keys_file, keys)
    typer.echo(f"{name} is revoked")
    if not keys:
        typer.echo(f"no key is left; delete {chosen.keys_file} to need none", err=True)


def _keys(chosen: Settings) -> dict:
    from tqstack.router.keys import read_keys

    try:
        return read_keys(chosen.keys_file) or {}
    except SettingsError as error:
        fail(str(error))
