"""`tqstack generate` and `tqstack compare`: answers in the terminal, no server."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import typer
from rich.columns import Columns
from rich.live import Live
from rich.panel import Panel

from tqstack.cli import drafts
from tqstack.cli.common import console, fail, preload_openblas

Model = Annotated[str, typer.Argument(help="demo, a folder or a hub name")]
Prompt = Annotated[str, typer.Argument(help="the question; - reads standard input")]
Bits = Annotated[str, typer.Option(help="of turboquant: 4, k4v3, or codecs by name")]
MaxTokens = Annotated[int, typer.Option(min=1)]
Raw = Annotated[bool, typer.Option("--raw", help="continue the text, without the chat template")]


def generate(
    model: Model,
    prompt: Prompt,
    backend: Annotated[
        Literal["baseline", "mlx_quant", "turboquant"], typer.Option(help="which cache")
    ] = "turboquant",
    bits: Bits = "4",
    max_tokens: MaxTokens = 256,
    temperature: Annotated[float, typer.Option(min=0.0, max=2.0)] = 0.0,
    min_tokens: Annotated[int, typer.Option(min=0, help="before the answer may end")] = 0,
    speculation: Annotated[
        Literal["auto", "mtp", "lookup", "0"],
        typer.Option(help="draft tokens, as SIDECAR_SPECULATION does, by the sidecar's engine"),
    ] = "0",
    raw: Raw = False,
) -> None:
    """Write one answer, and tell speed and bytes."""
    preload_openblas()
    if min_tokens > max_tokens:
        fail(f"--min-tokens {min_tokens} are more than --max-tokens {max_tokens}", 2)
    if speculation != "0":
        if backend != "turboquant":
            fail(f"--speculation {speculation}: --backend {backend} cannot take drafts back", 2)
        _drafted(model, prompt, bits, speculation, max_tokens, temperature, min_tokens, raw)
        return
    loaded, tokens = _prepare(model, prompt, raw)
    run = Run(loaded, tokens, backend, bits, max_tokens, temperature, min_tokens)
    for text in run.steps():
        typer.echo(text, nl=False)
    typer.echo()
    console.print(run.summary(), highlight=False, style="dim")


def _drafted(
    model: str,
    prompt: str,
    bits: str,
    mode: str,
    max_tokens: int,
    temperature: float,
    min_tokens: int,
    raw: bool,
) -> None:
    """One answer with drafts."""
    text = _text(prompt)
    runtime = drafts.runtime_of(model, bits, mode)
    from tqstack.engine.sampling import Sampling

    options = {
        "max_tokens": max_tokens,
        "sampling": Sampling(temperature),
        "min_tokens": min_tokens,
    }
    *pieces, told = drafts.answer(runtime, _tokens(runtime.tokenizer, text, raw), options)
    typer.echo("".join(pieces))
    console.print(told, highlight=False, style="dim")


def compare(
    model: Model,
    prompt: Prompt,
    bits: Bits = "4",
    max_tokens: MaxTokens = 128,
    raw: Raw = False,
) -> None:
    """The plain and the compressed cache side by side: text, bytes, and where they first differ."""
    preload_openblas()
    loaded, tokens = _prepare(model, prompt, raw)
    runs = [Run(loaded, tokens, name, bits, max_tokens) for name in ("baseline", "turboquant")]
    with Live(console=console, refresh_per_second=8) as live:
        for _ in itertools.zip_longest(*(run.steps() for run in runs)):
            live.update(_side_by_side(runs))
    plain, packed = (run.tokens for run in runs)
    at = next((i for i, (a, b) in enumerate(zip(plain, packed, strict=False)) if a != b), None)
    if at is None:
        console.print(f"The same {min(len(plain), len(packed))} tokens.")
    else:
        console.print(f"The first difference is token {at + 1} of {len(plain)}.")


def _side_by_side(runs: list[Run]) -> Columns:
    width = max(20, console.width // 2 - 2)
    return Columns(
        [Panel(run.text, title=run.name, subtitle=run.summary(), width=width) for run in runs]
    )


def _prepare(model: str, prompt: str, raw: bool) -> tuple[Any, list[int]]:
    from tqstack.models.load import load_model

    text = _text(prompt)
    try:
        loaded = load_model(model)
    except (ValueError, OSError) as error:
        fail(str(error), 2)
    return loaded, _tokens(loaded.tokenizer, text, raw)


def _text(prompt: str) -> str:
    text = sys.stdin.read() if prompt == "-" else prompt
    if not text.strip():
        fail("the prompt is empty", 2)
    return text


def _tokens(tokenizer: Any, text: str, raw: bool) -> list[int]:
    if raw or not tokenizer.has_chat_template:
        return tokenizer.encode(text)
    messages = [{"role": "user", "content": text}]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True)


@dataclass
class Run:
    """One answer in the making."""

    loaded: Any
    prompt: list[int]
    name: str
    bits: str
    max_tokens: int
    temperature: float = 0.0
    min_tokens: int = 0
    text: str = ""

    def steps(self) -> Iterator[str]:
        """Generate; pieces of text as they come."""
        from mlx_lm import stream_generate
        from mlx_lm.sample_utils import make_sampler

        from tqstack.bench.caches import cached_models

        try:
            cached = cached_models([self.name], self.loaded.model, self.bits)[self.name]
            self.cache = cached.make_cache()
        except ValueError as error:
            fail(str(error), 2)
        self.tokens: list[int] = []
        self.drawn = 0
        for response in stream_generate(
            self.loaded.model,
            self.loaded.tokenizer,
            self.prompt,
            max_tokens=self.max_tokens,
            sampler=make_sampler(self.temperature),
            prompt_cache=self.cache,
            logits_processors=[self._put_off] if self.min_tokens else None,
        ):
            self.last = response
            self.tokens.append(response.token)
            self.text += response.text
            yield response.text

    def _put_off(self, _: Any, logits: Any) -> Any:
        """Logits without the answer's end, while that would come too early."""
        import mlx.core as mx

        self.drawn += 1
        if self.drawn > self.min_tokens:
            return logits
        return logits.at[:, mx.array(sorted(self.loaded.tokenizer.eos_token_ids))].add(-mx.inf)

    def summary(self) -> str:
        from tqstack.bench.speed import cache_bytes

        kv, recurrent = cache_bytes(self.cache)
        return (
            f"prompt {self.last.prompt_tokens:,} tokens at {self.last.prompt_tps:,.0f}/s, answer "
            f"{len(self.tokens):,} at {self.last.generation_tps:,.1f}/s; keys and values "
            f"{kv / 1e6:,.2f} MB, recurrent state {recurrent / 1e6:,.2f} MB"
        )
