"""`tqstack bench serving` and `tqstack bench agent`: servers as their clients see them."""

from __future__ import annotations

import secrets
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import Progress

from tqstack.cli.bench import Output, numbers, show, write
from tqstack.cli.common import console, errors, fail, settings

Model = Annotated[
    str, typer.Argument(help="of the sidecar that is started: demo, a folder or a hub name")
]
Urls = Annotated[
    list[str] | None,
    typer.Option(
        "--url",
        metavar="URL[,MODEL]",
        help="another server, measured beside in the same run; may be given several times",
    ),
]
StartsSidecar = Annotated[
    bool, typer.Option("--sidecar/--no-sidecar", help="start a sidecar, or measure --url alone")
]
ApiKey = Annotated[str, typer.Option(help="key that the servers of --url want")]
_OTHER_SERVER = """\b
To compare with mlx_lm.server on a CPU, give it the weights as the sidecar
uses them there (MLX multiplies quantised matrices slowly on a CPU):
  python -m mlx_lm convert --model FOLDER --mlx-path COPY -d --dtype float32
  python -m mlx_lm server --model COPY --port 8080
  tqstack bench {name} FOLDER --url http://127.0.0.1:8080,default_model
On Linux start it with OpenBLAS in LD_PRELOAD, as the sidecar starts itself.
The embedded model's FOLDER is services/tqstack/demo_model, or demo."""


def bench_serving(
    model: Model = "demo",
    concurrency: Annotated[str, typer.Option(help="streams at once, by commas")] = "1,4,8",
    prompt_tokens: Annotated[int, typer.Option(min=16)] = 500,
    generation_tokens: Annotated[int, typer.Option(min=2)] = 64,
    rounds: Annotated[int, typer.Option(min=1, help="how often each measure is taken")] = 3,
    long_prompt: Annotated[
        int, typer.Option(min=0, help="instead: what a prompt of so many tokens does to others")
    ] = 0,
    schema: Annotated[
        bool, typer.Option("--schema", help="also with answers forced into a JSON schema")
    ] = False,
    url: Urls = None,
    sidecar: StartsSidecar = True,
    api_key: ApiKey = "",
    output: Output = None,
) -> None:
    """Tokens per second, first token and gaps of many streams, servers interleaved."""
    from tqstack.bench import fairness, serving

    plan = serving.Plan(numbers(concurrency), prompt_tokens, generation_tokens, rounds, schema)
    if min(plan.concurrency) < 1:
        fail(f"--concurrency {concurrency}: streams at once must be at least 1", 2)
    long = fairness.Plan(long_prompt, prompt_tokens, generation_tokens, rounds)
    with _servers(model, url or [], sidecar, api_key) as servers:
        text = _text(model, secrets.token_hex(4))
        if long_prompt:
            steps = long.steps(len(servers))
            with _progress(steps) as advance:
                rows: Sequence[Any] = fairness.run(servers, text, long, advance)
            _show_fairness(rows)
            about: dict[str, Any] = {"long_prompt": long_prompt}
        else:
            with _progress(plan.steps(len(servers))) as advance:
                rows = serving.run(servers, text, plan, advance)
            _show_serving(rows)
            about = {"generation_tokens": generation_tokens}
    _tell_errors(rows)
    about = {"model": model, "prompt_tokens": prompt_tokens, "rounds": rounds, **about}
    write(output, serving.as_json(rows, servers, **about))
    if any(row.errors and row.errors == getattr(row, "requests", rounds) for row in rows):
        fail("a server answered nothing: see the errors above", 1)


def bench_agent(
    model: Model = "demo",
    turns: Annotated[int, typer.Option(min=2, help="of the tool session")] = 12,
    scenarios: Annotated[str, typer.Option(help="names by commas; empty: all")] = "",
    system_tokens: Annotated[int, typer.Option(min=1, help="of an agent's system prompt")] = 2500,
    document_tokens: Annotated[int, typer.Option(min=1, help="of the long prompts")] = 8000,
    answer_tokens: Annotated[int, typer.Option(min=2, help="at most, of every answer")] = 48,
    seed: Annotated[
        str, typer.Option(help="the same texts again; empty: texts that no server has seen")
    ] = "",
    url: Urls = None,
    sidecar: StartsSidecar = True,
    api_key: ApiKey = "",
    output: Output = None,
) -> None:
    """Scripted sessions of coding agents: prompt tokens used again, and the time that saves."""
    from tqstack.bench import agent, agent_scripts

    names = scenarios.replace(",", " ").split() or list(agent_scripts.SCRIPTS)
    if unknown := [name for name in names if name not in agent_scripts.SCRIPTS]:
        fail(f"--scenarios {unknown[0]}: allowed: {', '.join(agent_scripts.SCRIPTS)}", 2)
    run = seed or secrets.token_hex(4)
    with _servers(model, url or [], sidecar, api_key) as servers:
        text = _text(model, run)
        writer = agent_scripts.Writer(text, turns, system_tokens, document_tokens)
        steps = len(servers) * sum(agent_scripts.turns(name, writer) for name in names)
        with _progress(steps) as advance:
            rows = agent.run(servers, writer, names, answer_tokens, _folder(model), advance)
    summaries = agent.summaries(rows)
    _show_turns(rows)
    _show_summaries(summaries)
    _tell_errors(rows)
    sizes = {"system_tokens": system_tokens, "document_tokens": document_tokens}
    about = {"model": model, "turns": turns, **sizes, "answer_tokens": answer_tokens, "seed": run}
    write(output, agent.as_json(rows, summaries, servers, about))
    if rows and all(row.error for row in rows):
        fail("no server answered: see the errors above", 1)


for _command, _name in ((bench_serving, "serving"), (bench_agent, "agent")):
    _command.__doc__ = f"{_command.__doc__}\n\n{_OTHER_SERVER.format(name=_name)}"


@contextmanager
def _servers(model: str, urls: list[str], own: bool, key: str) -> Iterator[list[Any]]:
    """The servers to measure; ends the sidecar however the block is left."""
    from tqstack.bench.servers import ServerError, find_all, sidecar

    if not own and not urls:
        fail("nothing to measure: give --url, or leave out --no-sidecar", 2)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with ExitStack() as stack:
        try:
            servers = find_all(urls, key)  # before a model is loaded for nothing
            if own:
                with console.status(f"starting a sidecar with {model}"):
                    started = sidecar(model, settings().tqstack_api_key)
                    servers.insert(0, stack.enter_context(started))
        except ServerError as error:
            fail(str(error), 1)
        yield servers


@contextmanager
def _progress(steps: int) -> Iterator[Callable[[], None]]:
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("measuring", total=steps)
        yield lambda: progress.advance(task)


def _folder(model: str) -> Path | None:
    """The model's folder, if it is on this machine by name."""
    from tqstack import demo_model

    folder = demo_model.PATH if model == "demo" else Path(model).expanduser()
    return folder if folder.is_dir() else None


def _text(model: str, run: str) -> Any:
    from tqstack.bench.prompts import HeldOutText

    return HeldOutText(_folder(model), run)


def _tell_errors(rows: Sequence[Any]) -> None:
    for message in dict.fromkeys(f"{row.server}: {row.error}" for row in rows if row.error):
        errors.print(message, highlight=False)


def _number(value: float | None, form: str = ",.0f") -> str:
    return "-" if value is None else format(value, form)


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f} s"


def _show_serving(rows: Sequence[Any]) -> None:
    show(
        rows,
        {
            "server": lambda row: row.server,
            "streams": lambda row: f"{row.concurrency}{', schema' * row.schema}",
            "prompt": lambda row: _number(row.prompt_tokens),
            "output tok/s": lambda row: _number(row.output_tps, ",.1f"),
            "a stream's": lambda row: _number(row.decode_tps, ",.1f"),
            "first token": lambda row: _seconds(row.first_token_s),
            "p95": lambda row: _seconds(row.first_token_s_p95),
            "gap, ms": lambda row: _number(row.gap_ms, ",.1f"),
            "p99": lambda row: _number(row.gap_ms_p99, ",.1f"),
            "max": lambda row: _number(row.gap_ms_max),
            "overhead": lambda row: _number(row.overhead, "+.1%"),
            "errors": lambda row: f"{row.errors}/{row.requests}",
        },
    )


def _show_fairness(rows: Sequence[Any]) -> None:
    show(
        rows,
        {
            "server": lambda row: row.server,
            "long prompt": lambda row: _number(row.long_prompt_tokens),
            "stream before, tok/s": lambda row: _number(row.before_tps, ",.1f"),
            "during": lambda row: _number(row.during_tps, ",.1f"),
            "ratio": lambda row: _number(row.ratio, ".2f"),
            "longest gap, ms": lambda row: _number(row.longest_gap_ms),
            "short's first token": lambda row: _seconds(row.short_first_token_s),
            "long's": lambda row: _seconds(row.long_first_token_s),
            "errors": lambda row: str(row.errors),
        },
    )


def _show_turns(rows: Sequence[Any]) -> None:
    show(
        rows,
        {
            "scenario": lambda row: row.scenario,
            "turn": lambda row: str(row.turn),
            "server": lambda row: row.server,
            "prompt": lambda row: _number(row.prompt_tokens),
            "reusable": lambda row: _number(row.reusable_tokens),
            "reused": lambda row: _number(row.cached_tokens),
            "first token": lambda row: _seconds(row.first_token_s),
            "": lambda row: row.note,
        },
    )


def _show_summaries(rows: Sequence[Any]) -> None:
    show(
        rows,
        {
            "scenario": lambda row: row.scenario,
            "server": lambda row: row.server,
            "reusable": lambda row: _number(row.reusable_tokens),
            "reused": lambda row: _number(row.reused_tokens),
            "share": lambda row: _number(row.share, ".1%"),
            "first token, cold": lambda row: _seconds(row.cold_first_token_s),
            "warm": lambda row: _seconds(row.warm_first_token_s),
            "warm/cold": lambda row: _number(row.ratio, ".2f"),
        },
    )
