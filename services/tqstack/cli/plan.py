"""`tqstack plan`: what a context of a model needs in memory, before anything is loaded."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from dataclasses import replace
from io import StringIO
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tqstack.cli.common import console, fail, settings, size
from tqstack.machine import machine_memory
from tqstack.settings import Settings

if TYPE_CHECKING:
    from tqstack.models.plan import Plan
    from tqstack.models.spec import ModelSpec

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
    from tqstack.models.device import this_machine
    from tqstack.models.plan import mac
    from tqstack.models.planning import plan_spec

    total = int(memory * 1e9) or machine_memory()
    machine = mac(total) if memory else this_machine(config.sidecar_memory_mb)
    try:
        spec, weights = source(shape, model or config.model_name)

        def planned(changed: Settings) -> Plan:
            return plan_spec(changed, spec, machine, weights)

        report = make_report(config, spec, planned, context, total)
    except ValueError as error:
        fail(str(error))
    if as_json:
        typer.echo(json.dumps(report, indent=2))
    else:
        for line in lines(report):
            console.print(line, highlight=False)
    raise SystemExit(not report["fits"])


def source(shape: str, name: str) -> tuple[ModelSpec, int | None]:
    """The model that is planned, and bytes of its weights where no files tell them.

    Raises:
        ValueError: there is no such model or shape; the message says what to do.
    """
    from mlx.utils import tree_flatten

    from tqstack.bench import shapes
    from tqstack.models.spec import ModelSpec, read_spec

    if not shape:
        return read_spec(name), None
    if shape not in shapes.SHAPES:
        raise ValueError(f"--shape {shape}: allowed: {', '.join(shapes.SHAPES)}")
    config = shapes.shape(shape)
    with redirect_stdout(StringIO()):  # mlx-lm prints the bits per weight
        model = shapes.unbuilt(config)
    weights = sum(array.nbytes for _, array in tree_flatten(model.parameters()))  # pyright: ignore
    return ModelSpec.of(shape, "", config), weights


def make_report(
    config: Settings,
    spec: ModelSpec,
    planned: Callable[[Settings], Plan],
    context: int,
    memory: int,
) -> dict[str, Any]:
    """The plan as plain numbers: bytes and tokens."""
    plan, longest = planned(config), spec.context_length
    tokens = context or longest
    about = spec.describe()
    del about["compressed_layers"]  # nothing is proven yet
    return {
        **about,
        "context": tokens,
        "cache": cache_name(config),
        "fits": plan.fits(tokens) and tokens <= longest,
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
        "max_tokens": min(plan.max_tokens(), longest),
        "advice": list(advice(config, planned, plan, longest, tokens)),
    }


def cache_name(config: Settings) -> str:
    version = config.tq_cache_version
    return version if version in ("none", "native") else f"{version}, {config.tq_kv_bits} bits"


def advice(
    config: Settings, planned: Callable[[Settings], Plan], plan: Plan, longest: int, tokens: int
) -> Iterator[str]:
    """What would make `tokens` fit, best first; nothing if they do.

    Args:
        longest: tokens that the model takes.
    """
    if tokens > longest:
        yield f"--context {longest}: the model takes no more"
        tokens = longest
    if plan.fits(tokens):
        return
    for bits in SMALLER_CACHES:
        changed = {"tq_cache_version": "turboquant", "tq_kv_bits": bits}
        smaller = planned(config.model_copy(update=changed))
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
