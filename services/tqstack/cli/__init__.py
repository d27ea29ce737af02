"""`tqstack COMMAND`. Every command's module is light: what is heavy is imported when it runs."""

from __future__ import annotations

from importlib.metadata import version
from typing import Annotated

import typer

from tqstack.cli.bench import app as bench
from tqstack.cli.bench_router import bench_router
from tqstack.cli.bench_serving import bench_agent, bench_serving
from tqstack.cli.config import app as config
from tqstack.cli.convert import convert
from tqstack.cli.doctor import doctor
from tqstack.cli.evaluate import evaluate
from tqstack.cli.generate import compare, generate
from tqstack.cli.key import app as key
from tqstack.cli.model import app as model
from tqstack.cli.plan import plan
from tqstack.cli.rank import rank
from tqstack.cli.router import router
from tqstack.cli.service import app as service
from tqstack.cli.sidecar import sidecar
from tqstack.cli.top import top
from tqstack.cli.up import up

app = typer.Typer(
    help="One OpenAI-compatible endpoint; Ollama and a compressed-cache sidecar behind it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
)
for command in (up, router, sidecar, generate, compare, convert, evaluate, top, doctor, plan):
    app.command()(command)
app.command(hidden=True)(rank)
bench.command("router")(bench_router)
bench.command("serving")(bench_serving)
bench.command("agent")(bench_agent)
groups = {"bench": bench, "config": config, "key": key, "model": model, "service": service}
for name, group in groups.items():
    app.add_typer(group, name=name)


def _tell_version(wanted: bool) -> None:
    if wanted:
        typer.echo(version("tqstack"))
        raise typer.Exit


@app.callback()
def _options(
    tell_version: Annotated[
        bool,
        typer.Option("--version", callback=_tell_version, is_eager=True, help="Print the version."),
    ] = False,
) -> None:
    pass


def main() -> None:
    app()
