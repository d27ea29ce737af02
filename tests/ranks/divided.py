"""One of two ranks that compare divided tiny models with whole ones: prints the distances.

Started by `test_models.py`, with MLX's variables in its environment.
"""

from __future__ import annotations

import json

import mlx.core as mx

from models.architectures import CONFIGS, unadapted
from tqstack.attention.hybrid import make_turboquant_cache
from tqstack.models.adapt import adapt
from tqstack.models.spec import ModelSpec
from tqstack.models.split import split

FAMILIES = ("llama", "gpt-oss", "qwen3.5-moe", "qwen3-next")
PROMPT, ANSWER = [(7 * i) % 127 for i in range(300)], [3, 5, 7]


def logits(model) -> mx.array:
    """Of a prompt and three tokens, through a compressed cache."""
    cache, found = make_turboquant_cache(model, 4), []
    for tokens in (PROMPT, *([token] for token in ANSWER)):
        found.append(model(mx.array([tokens]), cache=cache)[:, -1])
        mx.eval(found[-1], [entry.state for entry in cache])
    return mx.concatenate(found)


def main() -> None:
    group, told = mx.distributed.init(strict=True, backend="ring"), {}
    for name in FAMILIES:
        config = CONFIGS[name]
        whole, part = unadapted(config), unadapted(config)
        adapt(whole)
        how = split(ModelSpec.of(name, "", config), part, group).how
        adapt(part)
        told[name] = how, mx.abs(logits(whole) - logits(part)).max().item()
    mx.eval(mx.distributed.all_sum(mx.array(1), group=group))
    print(json.dumps(told))


if __name__ == "__main__":
    main()
