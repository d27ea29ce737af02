"""`tqstack doctor`: what is installed, what it runs on, and what would be served."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated, Any

import typer

from tqstack.cli import checks, ranks
from tqstack.cli.checks import Finding
from tqstack.cli.common import console, openblas, preload_openblas
from tqstack.machine import accelerator
from tqstack.settings import Settings, SettingsError, config_path, load_settings

PACKAGES = ("tqstack", "mlx", "mlx-lm", "transformers", "fastapi", "uvicorn", "httpx")
MARKS = {"ok": "[green]ok[/]", "note": "[yellow]note[/]", "wrong": "[red]wrong[/]"}


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
) -> None:
    """Check this installation. The exit code is 1 if something is wrong."""
    preload_openblas()
    findings = list(examine())
    if as_json:
        typer.echo(json.dumps([asdict(finding) for finding in findings], indent=2))
    else:
        for finding in findings:
            console.print(f"{MARKS[finding.state]:>14}  [bold]{finding.what}[/]: {finding.detail}")
            if finding.advice:
                console.print(f"{'':9}→ {finding.advice}")
    raise SystemExit(any(finding.state == "wrong" for finding in findings))


def examine() -> Iterator[Finding]:
    """All findings, cheap ones first."""
    yield Finding("python", "ok", sys.version.split()[0])
    yield from _packages()
    yield _device()
    try:
        settings = load_settings()
    except SettingsError as error:
        yield Finding("settings", "wrong", str(error), f"edit {config_path()} or the environment")
        return
    path = config_path()
    yield Finding(
        "settings", "ok", str(path) if path.exists() else f"defaults ({path} is not there)"
    )
    yield from checks.permissions(settings)
    yield from checks.ports(settings)
    yield checks.services()
    yield from _backends(settings)
    yield from _model(settings)


def _packages() -> Iterator[Finding]:
    found, missing = [], []
    for name in PACKAGES:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            missing.append(name)
    if found:
        yield Finding("packages", "ok", ", ".join(found))
    if missing:
        yield Finding(
            "packages", "wrong", f"missing: {', '.join(missing)}", "install tqstack again"
        )


def _device() -> Finding:
    kind = accelerator()
    if kind != "cpu":
        return Finding("accelerator", "ok", kind)
    library = openblas()
    if library:
        return Finding("accelerator", "ok", f"none: the CPU, with {library}")
    return Finding(
        "accelerator",
        "note",
        "none: the CPU, without OpenBLAS",
        "prompts are read about five times more slowly without it: "
        "apt-get install libopenblas0-pthread",
    )


def _backends(settings: Settings) -> Iterator[Finding]:
    """All of the router's but this machine's sidecar, which is told of with its port."""
    from tqstack.router.backends.definition import definitions

    try:
        found = definitions(settings)
    except SettingsError as error:
        yield Finding("backends", "wrong", str(error), "edit that file")
        return
    for one in found:
        if one.kind != "sidecar" or one.url != settings.sidecar_url:
            advice = "start it: ollama serve" if one.kind == "ollama" else "start it"
            yield _backend(one.name, one.url, one.key.get_secret_value(), advice)


def _backend(name: str, url: str, key: str, advice: str) -> Finding:
    import httpx

    headers = {"authorization": f"Bearer {key}"} if key else {}
    try:
        with httpx.Client(trust_env=False, timeout=2, headers=headers) as client:
            client.get(f"{url}/v1/models").raise_for_status()
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        return Finding(name, "note", f"{url} does not answer ({type(error).__name__})", advice)
    return Finding(name, "ok", f"{url} answers")


def _model(settings: Settings) -> Iterator[Finding]:
    """Load the model as the sidecar would: the proof of compression and the plan come with it.

    A sidecar that runs has done so, and tells: two models may be more than the memory holds.
    """
    if not settings.runs_sidecar:
        yield Finding("model", "note", "the sidecar is off (SIDECAR_ENABLED)")
        return
    running = checks.health(settings.sidecar_url)
    if running and "codec" in running["cache"]:
        yield Finding("model", "ok", _told(running["model"], running["cache"]["codec"]))
        if "memory_plan" in running:  # or it is made when the model is loaded
            yield _memory(running["memory_plan"], running["model"]["context_length"])
        return
    yield (files := checks.files(settings.model_name))
    if files.state != "ok":
        return
    if settings.divides_model:
        yield from ranks.examine(settings)
        return
    from tqstack.attention.kernels import trust
    from tqstack.models.runtime import load_runtime

    try:
        trust.forget()
        runtime = load_runtime(settings)
    except Exception as error:  # whatever keeps the sidecar from starting is the finding
        yield Finding("model", "wrong", f"{settings.model_name}: {error}", "set SIDECAR_MODEL")
        return
    about, plan = runtime.describe(), runtime.plan
    yield Finding("model", "ok", _told(about, runtime.codec))
    yield _memory(plan.as_dict(), about["context_length"])
    yield from _kernels()


def _told(about: dict[str, Any], codec: str) -> str:
    proven = about.get("compressed_layers")
    if "layers" not in about:
        return f"{about['id']}: its layers are told when it is loaded; codec {codec}"
    return (
        f"{about['id']}: {about['recurrent_layers']} recurrent and "
        f"{len(about['softmax_layers'])} softmax layers, codec {codec}, "
        + (f"layers {proven} proven compressed" if proven else "loaded when it is needed")
    )


def _kernels() -> Iterator[Finding]:
    """What came out when kernels were compared with plain operations, while the model was loaded:
    just the variants that it uses."""
    from tqstack.attention.kernels.program import gpu_dialect
    from tqstack.attention.kernels.trust import report

    if gpu_dialect() is None:
        yield Finding("kernels", "ok", "none without a GPU: plain operations")
        return
    for name, reason in report().items():
        if reason is None:
            yield Finding("kernels", "ok", f"{name}: agrees with plain operations")
        else:
            yield Finding(
                "kernels",
                "note",
                f"{name}: {reason}",
                "it is switched off and plain operations run instead: please report this",
            )


def _memory(plan: dict[str, Any], context: int) -> Finding:
    fits = min(plan["max_tokens"], context)
    detail = (
        f"weights {plan['weights'] / 1e6:,.0f} MB, {plan['per_token']:,} bytes a token "
        f"({plan['per_token_fp16']:,} in 16 bits); {fits:,} of {context:,} tokens fit in "
        f"{plan['budget'] / 1e9:,.1f} GB"
    )
    if fits >= context:
        return Finding("memory", "ok", detail)
    return Finding(
        "memory", "note" if fits else "wrong", detail, "fewer TQ_KV_BITS, or a smaller model"
    )
