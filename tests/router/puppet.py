"""A model of one empty layer for Ollama: its head is a table from the last token to the next.

So the last word of a prompt decides what is said, by greedy choice and by chance alike.
"""

from __future__ import annotations

import struct
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

WIDTH, INNER = 256, 64
CONTEXT = 8192  # what it says it was trained for
CALL = '\n{{"name": "look", "arguments": {{"at": "{}"}}}}'
SECOND = ["\n<tool_call>", CALL.format("two"), "\n</tool_call>"]
# The word that a prompt ends with, and what follows; each token has one successor.
LINES = [
    ["SAY", "Hello", " there", " friend", "<|end|>"],
    ["LOOP", " round", " and", " about", " round"],
    ["CALL", "<tool_call>", CALL.format("one") + "\n", "</tool_call>", *SECOND, "<|end|>"],
    ["THINK", "<think>", "hmm", "</think>", "42", "<|end|>"],
]
TEMPLATE = """
{%- if tools %}{{ '<|start|>system\\n<tools>' }}
{%- for tool in tools %}{{ tool | tojson }}{%- endfor %}{{ '</tools>\\n<tool_call>\\n' }}
{{- '{"name": <function-name>, "arguments": <args-json-object>}\\n</tool_call><|end|>\\n' }}
{%- endif %}
{%- for m in messages %}{{ '<|start|>' + m.role + '\\n' }}
{%- if m.reasoning_content %}{{ '<think>' + m.reasoning_content + '</think>' }}{%- endif %}
{%- if m.content %}{{ m.content }}{%- endif %}
{%- for c in m.tool_calls or [] %}{{ '<tool_call>\\n{"name": "' + c.function.name + '", ' }}
{{- '"arguments": ' + (c.function.arguments | tojson) + '}\\n</tool_call>' }}{%- endfor %}
{{- '<|end|>\\n' }}{%- endfor %}
{%- if add_generation_prompt %}{{ '<|start|>assistant\\n' + messages[-1].content.split(' ')[-1] }}
{%- endif %}"""
_CONTROL, _OWN, _USUAL = 3, 4, 1  # kinds of tokens


def write(path: Path, embeds: bool = False) -> None:
    """The model as a GGUF file (version 3: head, facts, tensors' names and places, tensors).

    Args:
        embeds: it says of itself that it is for embeddings: the mean over the tokens.
    """
    words = list(dict.fromkeys(word for line in LINES for word in line))
    tokens = [*_letters(), "<|start|>", *words]
    places = {word: place for place, word in enumerate(tokens)}
    kinds = [_USUAL] * 256 + [_OWN] * (len(tokens) - 256)
    kinds[256] = kinds[places["<|end|>"]] = _CONTROL
    embedding = np.random.default_rng(0).choice([-1.0, 1.0], (len(tokens), WIDTH))
    head = np.zeros_like(embedding)
    for line in LINES:
        for word, following in pairwise(line):
            head[places[following]] += embedding[places[word]] / 2
    facts = {
        "general.architecture": "llama",
        "llama.context_length": CONTEXT,
        "llama.embedding_length": WIDTH,
        "llama.block_count": 1,
        "llama.feed_forward_length": INNER,
        "llama.attention.head_count": 4,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.merges": ["Ġ Ġ"],
        "tokenizer.ggml.bos_token_id": 256,
        "tokenizer.ggml.eos_token_id": places["<|end|>"],
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": TEMPLATE,
    }
    if embeds:
        facts["llama.pooling_type"] = 1
    empty = {"attn_q": WIDTH, "attn_k": WIDTH, "attn_v": WIDTH, "attn_output": WIDTH}
    empty |= {"ffn_gate": INNER, "ffn_up": INNER}
    tensors = {
        "token_embd.weight": embedding,
        "output.weight": head,
        "blk.0.ffn_down.weight": np.zeros((WIDTH, INNER)),
        **{f"blk.0.{name}.weight": np.zeros((rows, WIDTH)) for name, rows in empty.items()},
        **{name: np.ones(WIDTH) for name in ("output_norm.weight", *_norms())},
    }
    path.write_bytes(_gguf(facts, tensors))


def _norms() -> list[str]:
    return ["blk.0.attn_norm.weight", "blk.0.ffn_norm.weight"]


def _letters() -> list[str]:
    """A character for each byte, as GPT-2's vocabulary has them."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(byte if byte in shown else next(others)) for byte in range(256)]


def _gguf(facts: dict[str, Any], tensors: dict[str, np.ndarray]) -> bytes:
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(facts))
    head += b"".join(_text(name) + _value(value) for name, value in facts.items())
    body = b""
    for name, tensor in tensors.items():
        shape = tensor.shape[::-1]
        head += _text(name) + struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
        head += struct.pack("<IQ", 0, len(body))  # float32, and where it begins
        body += tensor.astype("<f4").tobytes()
        body += b"\0" * (-len(body) % 32)
    return head + b"\0" * (-len(head) % 32) + body


def _text(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _value(value: Any) -> bytes:
    """A fact with its type before it. Numbers have no sign, but in lists."""
    if isinstance(value, list):
        kind, data = (5 if isinstance(value[0], int) else 8), b"".join(_value(v)[4:] for v in value)
        return struct.pack("<IIQ", 9, kind, len(value)) + data
    if isinstance(value, str):
        return struct.pack("<I", 8) + _text(value)
    kind, form = {bool: (7, "?"), int: (4, "I"), float: (6, "f")}[type(value)]
    return struct.pack(f"<I{form}", kind, value)
