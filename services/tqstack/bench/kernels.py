"""Times the kernels by themselves: `python -m tqstack.bench.kernels` (needs a GPU).

Attention calls form a chain, each call's queries made from the last one's output, as layers do:
that shares what a single call would wait for. The chain's two additions are timed too and stay in.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from itertools import accumulate

import mlx.core as mx

from tqstack.attention.blocks import BlockLayout, Stored
from tqstack.attention.kernels import encode
from tqstack.attention.kernels.choose import attention as attend
from tqstack.attention.kernels.program import gpu_dialect
from tqstack.attention.timing import median_seconds
from tqstack.models.layers import recurrence
from tqstack.models.layers.gated_delta import gated_delta
from tqstack.turboquant.codec import make_codec
from tqstack.turboquant.lloyd import LloydCodec

QUERY_HEADS, KV_HEADS, DIM = 16, 2, 256  # softmax layers of Qwen3.5-35B-A3B
TAIL = 192  # exact tokens of a sequence: between 128 and 256, as it goes
CHAIN = 20
QUERY_TOKENS = (1, 2, 4, 8, 16, 64, 512, 2048)
Step = Callable[[mx.array], mx.array]


def milliseconds(run: Callable[[], object], trials: int = 10) -> float:
    return 1e3 * median_seconds(run, trials, warm_up=2)


def chained(step: Step, queries: mx.array) -> float:
    """Milliseconds of one step among CHAIN that wait for each other."""

    def run() -> mx.array:
        x = queries
        for _ in range(CHAIN):
            x = step(x) * 0.001 + queries
        return x

    return milliseconds(run) / CHAIN


def random_blocks(layout: BlockLayout, count: int) -> mx.array:
    """(blocks, words) of any codes, with scales around 1."""
    planes = []
    for words, (_, dtype) in zip(layout.plane_words, layout.plane_shapes, strict=True):
        if dtype == mx.float16:
            scales = mx.random.uniform(0.75, 1.25, (count, 2 * words)).astype(dtype)
            planes.append(scales.view(mx.uint32))
        else:
            planes.append(mx.random.randint(0, 1 << 31, (count, words)).astype(mx.uint32))
    rows = mx.concatenate(planes, axis=-1)
    mx.eval(rows)
    return rows


def attention_step(
    key_spec: str, value_spec: str, contexts: list[int], query_tokens: int = 1
) -> Step:
    """The newest query tokens of sequences, behind so many others, of which whole blocks are packed
    and the last TAIL exact."""
    key_codec, value_codec = make_codec(key_spec, DIM), make_codec(value_spec, DIM)
    layout = BlockLayout(key_codec, value_codec, KV_HEADS)
    counts = [max(0, tokens - TAIL) // layout.block_tokens for tokens in contexts]
    ends = list(accumulate(counts))
    slots = TAIL + max(layout.block_tokens, query_tokens)
    tails = [
        mx.random.normal((len(contexts), KV_HEADS, slots, DIM)).astype(mx.bfloat16)
        for _ in range(2)
    ]
    mx.eval(tails)
    starts = [count * layout.block_tokens for count in counts]
    stored = Stored(
        layout,
        slabs=(random_blocks(layout, max(1, ends[-1])),),
        tables=tuple(tuple(range(end - n, end)) for n, end in zip(counts, ends, strict=True)),
        tail_keys=tails[0],
        tail_values=tails[1],
        starts=tuple(starts),
        lengths=tuple(start + TAIL + query_tokens - 1 for start in starts),
        counts=(query_tokens,) * len(contexts),
    )
    mask = "causal" if query_tokens > 1 else None
    return lambda queries: attend(queries, stored, scale=DIM**-0.5, mask=mask)


def sdpa_step(tokens: int, query_tokens: int = 1) -> Step:
    keys, values = (
        mx.random.normal((1, KV_HEADS, tokens, DIM)).astype(mx.bfloat16) for _ in range(2)
    )
    mx.eval(keys, values)
    mask = "causal" if query_tokens > 1 else None
    return lambda queries: mx.fast.scaled_dot_product_attention(
        queries, keys, values, scale=DIM**-0.5, mask=mask
    )


def attention(contexts: list[int], specs: list[str]) -> None:
    queries = mx.random.normal((1, QUERY_HEADS, 1, DIM)).astype(mx.bfloat16)
    mx.eval(queries)
    print(f"chain alone: {chained(lambda x: x, queries) * 1e3:.0f} us a step")
    for tokens in contexts:
        plain = chained(sdpa_step(tokens), queries)
        print(f"{tokens:>7} tokens  bf16 SDPA {plain * 1e3:7.0f} us")
        for spec in specs:
            key_spec, _, value_spec = spec.partition("/")
            step = attention_step(key_spec, value_spec or key_spec, [tokens])
            ours = chained(step, queries)
            print(f"{'':>15}{spec:>12} {ours * 1e3:7.0f} us  {plain / ours:.1f}x")
    tokens = contexts[-1]
    lengths = [tokens * (i + 1) // 8 for i in range(8)]
    one = chained(attention_step(specs[0], specs[0], [tokens]), queries)
    eight = chained(
        attention_step(specs[0], specs[0], lengths),
        mx.broadcast_to(queries, (8, *queries.shape[1:])),
    )
    print(
        f"8 sequences of {lengths[0]} to {tokens} tokens {eight * 1e3:.0f} us, one {one * 1e3:.0f}"
    )


def prompts(contexts: list[int], spec: str) -> None:
    """Several query tokens at once: drafts, a chunk's rest, whole chunks."""
    for tokens in contexts:
        for count in QUERY_TOKENS:
            queries = mx.random.normal((1, QUERY_HEADS, count, DIM)).astype(mx.bfloat16)
            plain = milliseconds(partial(sdpa_step(tokens + count, count), queries), trials=5)
            ours = milliseconds(partial(attention_step(spec, spec, [tokens], count), queries), 5)
            print(
                f"{count:>5} query tokens on {tokens:>7}  bf16 SDPA {plain:8.3f} ms  "
                f"{spec} {ours:8.3f} ms  {plain / ours:.1f}x"
            )


def encoding() -> None:
    codec = LloydCodec(DIM, 4)
    for tokens in (1, 2048):
        x = mx.random.normal((1, KV_HEADS, tokens, DIM)).astype(mx.bfloat16)
        mx.eval(x)
        kernel = milliseconds(lambda x=x: encode.encode(x, x, codec, codec))
        plain = milliseconds(lambda x=x: (codec.encode(x), codec.encode(x)))
        print(f"encode {tokens:>5} tokens: {kernel * 1e3:.0f} us, plain {plain * 1e3:.0f} us")


def gated_delta_rule(T: int) -> None:
    Hk, Hv, D = 16, 32, 128  # the recurrent layers of Qwen3.5-35B-A3B

    def normal(*shape: int) -> mx.array:
        return mx.random.normal(shape).astype(mx.bfloat16)

    q, k, v = normal(1, T, Hk, D) * D**-0.5, normal(1, T, Hk, D) * D**-0.5, normal(1, T, Hv, D)
    a, b = normal(1, T, Hv), normal(1, T, Hv)
    A_log, bias, state = mx.zeros(Hv), mx.ones(Hv), mx.zeros((1, Hv, D, D))
    log_g, beta = -mx.logaddexp(a + 1, 0.0), mx.sigmoid(b)
    mx.eval(q, k, v, a, b, log_g, beta, state)
    kernel = milliseconds(
        lambda: recurrence.recurrence(q, k, v, a, b, A_log, bias, state, None), trials=3
    )
    products = milliseconds(lambda: gated_delta(q, k, v, log_g, beta, state), trials=3)
    fast = milliseconds(
        lambda: mx.fast.gated_delta_update(q, k, v, mx.exp(log_g), beta, state), trials=3
    )
    print(
        f"gated delta rule, {T} tokens: kernel {kernel:.3f} ms, matrix products {products:.3f} ms, "
        f"mx.fast.gated_delta_update {fast:.3f} ms"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--context", type=int, nargs="+", default=[1024, 8192, 131072])
    parser.add_argument(
        "--codecs", nargs="+", default=["tq4", "tq3", "tq2", "tq8", "tq4/tq3", "tcq4-l8"]
    )
    arguments = parser.parse_args()
    if gpu_dialect() is None:
        raise SystemExit("kernels need a GPU, and MLX has none here")
    attention(arguments.context, arguments.codecs)
    prompts(arguments.context, arguments.codecs[0])
    encoding()
    if gpu_dialect() == "cuda":
        for tokens in (1, 2048):
            gated_delta_rule(tokens)


if __name__ == "__main__":
    main()
