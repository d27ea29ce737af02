"""`tqstack plan`: what a context of a model needs in memory, before anything is loaded."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from dataclasses import replace
from io import StringIO
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tqstack.cli.common import console, fail, settings
from tqstack.machine import machine_memory
from tqstack.settings import Settings

if TYPE_CHECKING:
    from tqstack.sidecar.memory import Machine
    from tqstack.sidecar.planning import Planned

# Less and less exact; the first that fits is the advice.
SMALLER_CACHES = ("8", "6", "4", "3.5", "3", "2.5", "2")


def plan(
    model: Annotated[str, typer.Argument(help="demo, a folder or a hub name")] = "",
    context: Annotated[int, typer.Option(min=0, help="tokens; 0: all the model takes")] = 0,
    shape: Annotated[str, typer.Option(help="a known geometry in 4 bits, in place of MODEL")] = "",
    memory: Annotated[
        float, typer.Option(min=0, help="for a Mac with so many GB, not this machine")
    ] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON.")] = False,
) -> None:
    """Say whether a context fits in memory, and which settings would make it fit.

    The exit code is 1 if it does not fit.
    """
    config = settings()
    from tqstack.sidecar.memory import mac
    from tqstack.sidecar.planning import plan_model
    from tqstack.sidecar.runtime import this_machine

    total = int(memory * 1e9) or machine_memory()
    machine = mac(total) if memory else this_machine()

    def planned(changed: Settings) -> Planned:
        if shape:
            return plan_shape(changed, shape, machine)
        return plan_model(changed, model or None, machine)

    try:
        report = make_report(config, planned, context, total)
    except ValueError as error:
        fail(str(error))
    if as_json:
        typer.echo(json.dumps(report, indent=2))
    else:
        for line in lines(report):
            console.print(line, highlight=False)
    raise SystemExit(not report["fits"])


def plan_shape(config: Settings, name: str, machine: Machine) -> Planned:
    from mlx.utils import tree_flatten

    from tqstack.bench import shapes
    from tqstack.sidecar.planning import plan_config

    if name not in shapes.SHAPES:
        raise ValueError(f"--shape {name}: allowed: {', '.join(shapes.SHAPES)}")
    with redirect_stdout(StringIO()):  # mlx-lm prints the bits per weight
        model = shapes.unbuilt(shapes.shape(name))
    weights = sum(array.nbytes for _, array in tree_flatten(model.parameters()))  # pyright: ignore
    return plan_config(config, name, shapes.shape(name), weights, machine)


def make_report(
    config: Settings, planned: Callable[[Settings], Planned], context: int, memory: int
) -> dict[str, Any]:
    """The plan as plain numbers: bytes and tokens."""
    one = planned(config)
    plan, tokens = one.plan, context or one.geometry.context_length
    return {
        **one.describe(),
        "context": tokens,
        "cache": cache_name(config),
        "fits": plan.fits(tokens) and tokens <= one.geometry.context_length,
        "needed": plan.total(tokens),
        "needed_fp16": replace(plan, per_token=plan.per_token_fp16).total(tokens),
        "weights": plan.weights,
        "kv_per_token": plan.per_token,
        "kv_per_token_fp16": plan.per_token_fp16,
        "kv": tokens * plan.per_token,
        "kv_fp16": tokens * plan.per_token_fp16,
        "exact_tail": plan.tail,
        "recurrent_state": plan.recurrent,
        "workspace": plan.workspace,
        "memory": memory,
        "reserve": memory - plan.budget,
        "budget": plan.budget,
        "max_tokens": min(plan.max_tokens(), one.geometry.context_length),
        "advice": list(advice(config, planned, one, tokens)),
    }


def cache_name(config: Settings) -> str:
    version = config.tq_cache_version
    return version if version in ("none", "native") else f"{version}, {config.tq_kv_bits} bits"


def advice(
    config: Settings, planned: Callable[[Settings], Planned], one: Planned, tokens: int
) -> Iterator[str]:
    """What would make `tokens` fit, best first; nothing if they do."""
    plan, longest = one.plan, one.geometry.context_length
    if tokens > longest:
        yield f"--context {longest}: the model takes no more"
        tokens = longest
    if plan.fits(tokens):
        return
    for bits in SMALLER_CACHES:
        changed = {"tq_cache_version": "turboquant", "tq_kv_bits": bits}
        smaller = planned(config.model_copy(update=changed)).plan
        if smaller.per_token < plan.per_token and smaller.fits(tokens):
            yield f"TQ_KV_BITS={bits} TQ_CACHE_VERSION=turboquant"
            break
    if most := plan.max_tokens():
        yield f"--context {most}: what fits as it is set now"
    else:
        yield "a smaller model, or one of fewer bits: the weights alone take too much"


def lines(report: dict[str, Any]) -> Iterator[str]:
    """The report for people."""

    def row(name: str, key: str, note: str = "") -> str:
        return f"  {name:<24}{size(report[key]):>10}  {note}".rstrip()

    layers, softmax = report["layers"], len(report["softmax_layers"])
    yield (
        f"[bold]{report['id']}[/]: {layers} layers, {softmax} of them with a KV cache; "
        f"{report['context']:,} tokens, cache: {report['cache']}"
    )
    each, plain = report["kv_per_token"], report["kv_per_token_fp16"]
    yield row("weights", "weights")
    yield row("keys and values", "kv", f"{each:,} bytes a token")
    yield row("  in 16 bits", "kv_fp16", f"{plain:,} bytes a token; not counted")
    yield row("newest tokens, exact", "exact_tail")
    yield row("recurrent state", "recurrent_state")
    yield row("prefill workspace", "workspace")
    yield row("needed", "needed", f"({size(report['needed_fp16'])} with a cache of 16 bits)")
    note = f"of {size(report['memory'])}; the rest is for the system"
    yield row("budget", "budget", note)
    if report["fits"]:
        yield f"[green]It fits[/]; up to {report['max_tokens']:,} tokens would."
        return
    yield "[red]It does not fit.[/] What would:"
    for line in report["advice"]:
        yield f"  {line}"


def size(count: int) -> str:
    """Bytes for people, in decimal units, as disks and macOS count."""
    return f"{count / 1e9:.2f} GB" if abs(count) >= 1e9 else f"{count / 1e6:.1f} MB"
