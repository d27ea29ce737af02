"""`tqstack top`: what the router is doing, in a terminal."""

from __future__ import annotations

import time
from typing import Annotated, Any

import typer
from rich.columns import Columns
from rich.console import Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from tqstack.cli.common import console, settings

_STATE = {"up": "green", "sick": "red", "loading": "yellow", "down": "red", "off": "dim"}
_KIND = {"sidecar": "blue", "ollama": "yellow", "openai": "magenta"}


def top(
    every: Annotated[float, typer.Option(help="seconds between looks", min=0.1)] = 1.0,
    once: Annotated[bool, typer.Option("--once", help="look once, print, and end")] = False,
) -> None:
    """Show backends and requests as they run, like the router's status page."""
    import httpx

    chosen = settings()
    key = chosen.tqstack_api_key
    headers = {"authorization": f"Bearer {key}"} if key else {}
    with httpx.Client(
        base_url=chosen.router_url, headers=headers, timeout=5, trust_env=False
    ) as client:

        def look() -> RenderableType:
            try:
                answer = client.get("/status").raise_for_status()
            except httpx.HTTPError as error:
                return Text(
                    f"the router at {chosen.router_url} does not answer ({error}); "
                    "start it with `tqstack up`",
                    style="red",
                )
            return screen(answer.json(), rows=max(5, console.height - 22))

        if once:
            console.print(look())
            return
        with Live(look(), console=console, screen=True, auto_refresh=False) as live:
            try:
                while True:
                    time.sleep(every)
                    live.update(look(), refresh=True)
            except KeyboardInterrupt:
                return


def screen(status: dict[str, Any], rows: int) -> Group:
    """The whole picture for one answer of the router's `/status`."""
    styles = {name: _KIND[backend["kind"]] for name, backend in status["backends"].items()}
    cards = [_card(name, backend) for name, backend in status["backends"].items()]
    head = Text(
        f"tqstack · {status['threshold']:,} tokens and more go to the sidecar · "
        f"{status['running']} running · {status['waiting']} waiting",
        style="bold",
    )
    return Group(
        head,
        Columns(cards, equal=True, expand=True),
        *([_clients(status["clients"])] if status["clients"] else []),
        _table("now", status["requests"][:rows], styles),
        _table("last", status["recent"][:rows], styles),
    )


def _card(name: str, backend: dict[str, Any]) -> Panel:
    facts = Table.grid(padding=(0, 2))
    facts.add_row("state", Text(backend["state"], style=_STATE[backend["state"]]))
    facts.add_row("model", backend["model"] or "–")
    facts.add_row("context", _count(backend["context_length"]))
    most = f" of {_count(backend['at_once'])}" if backend["at_once"] else ""
    facts.add_row("running", _count(backend["running"]) + most)
    if backend["prefill_speed"]:
        facts.add_row("reads", f"{backend['prefill_speed']:,.0f} tokens/s")
    if ranks := backend["health"].get("ranks"):
        facts.add_row("ranks", _ranks(ranks))
    cache = backend["health"].get("cache") or {}
    if cache.get("bytes_fp16"):
        used, full = cache["bytes"] / 1e6, cache["bytes_fp16"] / 1e6
        facts.add_row("cache", f"{used:,.1f} MB of {full:,.1f} MB in 16 bits")
    elif backend["state"] not in ("up", "off"):
        facts.add_row("why", backend["detail"])
    return Panel(facts, title=name, border_style=_KIND[backend["kind"]], title_align="left")


def _ranks(ranks: dict[str, Any]) -> str:
    """A line for each: where it runs, what it holds, and when it was last heard of."""
    return "\n".join(
        f"{one['host']}: {one['bytes'] / 1e6:,.1f} MB, heard {one['silent_seconds']:.1f} s ago"
        for one in ranks["each"]
    )


def _clients(clients: dict[str, dict[str, Any]]) -> Table:
    table = Table(title="keys", title_justify="left", expand=True, box=None, header_style="dim")
    table.add_column("key", no_wrap=True)
    names = ("running", "requests", "refused", "prompt_tokens", "cached_tokens", "output_tokens")
    for name in names:
        table.add_column(name.replace("_", " "), justify="right", no_wrap=True)
    for name, client in clients.items():
        table.add_row(name, *(_count(client[one]) for one in names))
    return table


def _table(title: str, records: list[dict[str, Any]], styles: dict[str, str]) -> Table:
    table = Table(title=title, title_justify="left", expand=True, box=None, header_style="dim")
    for name in ("time", "asked for", "backend", "why"):
        table.add_column(name, no_wrap=True, overflow="ellipsis")
    for name in ("in", "out", "first", "tok/s", "total"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("outcome", no_wrap=True)
    for record in records:
        backend = record["backend"]
        table.add_row(
            time.strftime("%H:%M:%S", time.localtime(record["began_at"])),
            record["model"] or "auto",
            Text(backend or "–", style=styles.get(backend, "")),
            record["error"] or record["reason"] or "–",
            _tokens(record),
            _count(record["output_tokens"]),
            _seconds(record["first_token"]),
            _count(record["tokens_per_second"]),
            _seconds(record["seconds"]),
            _outcome(record),
        )
    return table


def _outcome(record: dict[str, Any]) -> Text:
    if record["position"]:
        return Text(f"waits, place {record['position']}", style="yellow")
    return Text(record["outcome"], style="" if record["outcome"] in ("ok", "running") else "red")


def _tokens(record: dict[str, Any]) -> str:
    if record["prompt_tokens"] is not None:
        return _count(record["prompt_tokens"])
    return "–" if record["estimate"] is None else f"~{_count(record['estimate'])}"


def _count(value: float | None) -> str:
    return "–" if value is None else f"{value:,}"


def _seconds(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{1000 * value:.0f} ms" if value < 1 else f"{value:.1f} s"
