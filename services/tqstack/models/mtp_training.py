"""How the embedded model's multi-token prediction head was trained, and how another is.

The body is frozen, and so are embedding and output head, which both share. At every position the
head reads the body's hidden state and the token that came next, and learns to say what the body
itself will say one token later: the body's own distribution is the target, so that each position
tells it more than a token would. It begins as a copy of the body's last softmax layer. What the
body says of a text is used twice, for that takes as long as the head's step does; matrices are
trained by Muon, which needs fewer steps than AdamW.

Text is Python's standard library, found on any machine, and a recall task: "The secret code of NAME
is 5 digits.", asked for later. Files that share lines with the held-out text are left out.
"""

from __future__ import annotations

import random
import sysconfig
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten

from tqstack import demo_model
from tqstack.models.layers import convolution, gated_delta
from tqstack.models.mtp import Head, text_model
from tqstack.weights.mtp import FILE
from tqstack.weights.shards import write_whole

LENGTH, SEQUENCES = 512, 2  # of a step
RATE, OTHERS = 0.02, 2e-3  # of Muon, of AdamW for vectors
WARM_UP = 20  # steps until they are reached
KEPT = 64  # batches that are used again
RECALL = 0.3  # of the sequences
SHARED_LINES = 0.05  # of a file's long lines that the held-out text may have, too
BITS, GROUP = 4, 64
NAMES = "alpha bravo charlie delta echo foxtrot golf hotel india juliet kilo lima mike november"


def train(
    model: nn.Module,
    tokenizer: Any,
    seconds: float,
    folder: Path | None = None,
    tell: Callable[[str], None] = print,
) -> Head:
    """Train a head for a model for so long.

    Args:
        model: loaded with its layers as mlx-lm has them.
        folder: of Python files; None: the standard library's.
        tell: gets a line of progress now and then.
    """
    gated_delta.install(model)  # of what makes layers fast that alone: gates have no derivative
    convolution.install(model)
    body = text_model(model)
    head = Head(body.args)
    _begin(head, body)
    batches = _batches(
        _text(tokenizer, folder), tokenizer, random.Random(0), np.random.default_rng(0)
    )
    muon: Any = optim.Muon(RATE, weight_decay=0)
    adam: Any = optim.AdamW(OTHERS, betas=[0.9, 0.95], weight_decay=0)
    optimizer: Any = optim.MultiOptimizer([muon, adam], [lambda _, x: x.ndim == 2])
    step = nn.value_and_grad(head, _loss)
    began, count, seen, kept = time.monotonic(), 0, 0, []
    average: list[float] = []
    rng = random.Random(0)
    while (done := (time.monotonic() - began) / seconds) < 1:
        if count % 2 == 0:
            tokens = mx.array(next(batches))
            hidden = body.model(tokens).astype(mx.float16)
            mx.eval(hidden)
            kept = [*kept[1 - KEPT :], (tokens, hidden)]
        else:
            tokens, hidden = rng.choice(kept)
        scale = min(1, (count + 1) / WARM_UP) * min(1, 0.02 + 1.4 * (1 - done))
        muon.learning_rate, adam.learning_rate = RATE * scale, OTHERS * scale
        (loss, same), gradients = step(head, body, tokens, hidden.astype(mx.float32))
        optimizer.update(head, gradients)
        mx.eval(head.parameters(), optimizer.state, loss, same)
        count, seen = count + 1, seen + tokens.size
        average.append(same.item())
        if count % 20 == 0:
            speed, last = seen / (time.monotonic() - began), average[-20:]
            tell(
                f"{count} steps, {done:.0%}: loss {loss.item():.3f}, "
                f"as the body {sum(last) / len(last):.3f}, {speed:.0f} tokens/s"
            )
    return head


def save(head: Head, folder: Path) -> Path:
    """Write a head beside its model, its matrices in 4 bits, under Qwen's names."""
    nn.quantize(head, group_size=GROUP, bits=BITS)
    named: Any = tree_flatten(head.parameters())
    weights = {
        f"mtp.{name}": x.astype(mx.bfloat16) if x.dtype == mx.float32 else x for name, x in named
    }
    write_whole(
        folder / FILE,
        lambda path: mx.save_safetensors(
            str(path), weights, metadata={"format": "mlx", "norms": "whole"}
        ),
    )
    return folder / FILE


def _begin(head: Head, body: Any) -> None:
    """As the body's last softmax layer, which reads the hidden state; of the token a little."""
    last = [layer for layer in body.model.layers if not layer.is_linear][-1]
    own = dict(tree_flatten(last.parameters()))
    head.layers[0].load_weights(list(own.items()))
    width = body.args.hidden_size
    token = mx.random.normal((width, width)) * 0.3 * width**-0.5
    head.fc.weight = mx.concatenate([token, mx.eye(width)], axis=1)
    head.norm.weight = mx.array(body.model.norm.weight)


def _loss(head: Head, body: Any, tokens: mx.array, hidden: mx.array) -> tuple[mx.array, mx.array]:
    """Cross entropy with the body's own distribution, and how often both have the same likeliest
    token."""
    embed = body.model.embed_tokens
    want = mx.softmax(mx.stop_gradient(embed.as_linear(hidden[:, 1:])), axis=-1)
    logits = embed.as_linear(head(hidden[:, :-1], embed(tokens[:, 1:])))
    logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    same = mx.mean(logits.argmax(-1) == want.argmax(-1))
    return -(want * logprobs).sum(axis=-1).mean(), same


# -- text --------------------------------------------------------------------------------------


def _text(tokenizer: Any, folder: Path | None) -> np.ndarray:
    """Tokens of all Python files, in an order that is the same everywhere."""
    root = folder or Path(sysconfig.get_paths()["stdlib"])
    held = set(_long(tokenizer.decode(demo_model.held_out_tokens().astype(int).tolist())))
    files = [f for f in sorted(root.rglob("*.py")) if "site-packages" not in f.parts]
    random.Random(0).shuffle(files)
    parts: list[int] = []
    for file in files:
        text = file.read_text(errors="ignore")
        lines = _long(text)
        if sum(line in held for line in lines) <= SHARED_LINES * len(lines):
            parts += tokenizer.encode(text, add_special_tokens=False)
    if len(parts) <= LENGTH:
        raise ValueError(
            f"{root} holds {len(parts)} tokens of Python; more than {LENGTH} are needed"
        )
    return np.array(parts, np.int32)


def _long(text: str) -> list[str]:
    return [line for line in text.splitlines() if len(line) > 30]


def _batches(
    text: np.ndarray, tokenizer: Any, rng: random.Random, numbers: np.random.Generator
) -> Iterator[np.ndarray]:
    """(SEQUENCES, LENGTH) int32, for ever."""
    while True:
        rows = []
        for _ in range(SEQUENCES):
            at = int(numbers.integers(0, len(text) - LENGTH))
            row = text[at : at + LENGTH]
            rows.append(_recall(row, tokenizer, rng) if rng.random() < RECALL else row)
        yield np.stack(rows)


def _recall(filler: np.ndarray, tokenizer: Any, rng: random.Random) -> np.ndarray:
    """(LENGTH,) facts in a text, and questions behind it."""
    facts = [
        (name, str(rng.randint(10000, 99999)))
        for name in rng.sample(NAMES.split(), rng.choice((1, 2, 4)))
    ]

    def tokens(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False)

    body, answers = filler.tolist(), []
    for name, code in facts:
        at = rng.randint(0, len(body) // 2)
        body[at:at] = tokens(f"\nThe secret code of {name} is {code}.\n")
    for name, code in rng.sample(facts, len(facts)):
        asked = f"<|im_start|>user\nWhat is the secret code of {name}?<|im_end|>\n"
        answers += tokens(f"{asked}<|im_start|>assistant\n{code}<|im_end|>\n")
    return np.array([*body[: LENGTH - len(answers)], *answers][:LENGTH], np.int32)
