"""A compressed cache as arrays, and back: mlx-lm's `save_prompt_cache`, `load_prompt_cache`.

A layer's state is a text that says what it is, and for each sequence the exact tail (keys, values)
and its packed blocks. Layers are loaded one by one; a key per sequence brings them together again.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from tqstack.attention.blocks import BLOCK_TOKENS, BlockLayout
from tqstack.attention.pool import Pool
from tqstack.attention.table import PerLayer, Table
from tqstack.attention.tail import Tails
from tqstack.turboquant.kv_codecs import KVCodecs

if TYPE_CHECKING:
    from tqstack.attention.cache import TurboQuantKVCache

FORMAT = 2  # 1 was a padded array for each plane
_meeting: dict[str, PerLayer] = {}  # tables of loaded sequences, by key


def state_of(cache: TurboQuantKVCache) -> tuple[Any, ...]:
    """The text, then a list of arrays for each sequence: tail, then blocks; views, no copies."""
    layout, sequences = cache.layout, range(len(cache.lengths))
    parts = [cache.tails.part(i) for i in sequences]
    about = {
        "format": FORMAT,
        "block_tokens": cache.pool.block_tokens,
        "codecs": [cache.codecs.keys, cache.codecs.values],
        "exact_tokens": cache.exact_tokens,
        "layer": cache.layer,
        "layers": cache.pool.layers,
        "shape": layout and [layout.kv_heads, layout.key_codec.dim, layout.value_codec.dim],
        "batch": cache.is_batch,
        "lengths": cache.lengths,
        "packed": cache.packed,
        "starts": cache.tails.starts,
        "tails": [part is not None for part in parts],
        "sequences": [table.key for table in cache.tables],
    }
    arrays = []
    for i, part in enumerate(parts):
        blocks = cache.tables[i].ids[: cache.packed[i]]
        arrays.append([*(part or (mx.zeros(0),)), *cache.pool.views(cache.layer, blocks)])
    return json.dumps(about), *arrays


def restore(cache: TurboQuantKVCache, state: Any) -> None:
    """Make `cache` what `state_of` told.

    Raises:
        ValueError: another version wrote it, or it is damaged.
    """
    text, *sequences = state
    about = _read(text)
    codecs, layer, layers = KVCodecs(*about["codecs"]), about["layer"], about["layers"]
    pool = Pool(layers)  # of the sequences that no other layer has brought yet
    tables = [
        _meeting.setdefault(key, PerLayer(layers)).take(layer, (), lambda: Table(pool))
        for key in about["sequences"]
    ]
    cache.__init__(codecs, about["exact_tokens"], tables[0], layer)
    cache.tables, cache.is_batch = tables, about["batch"]
    cache.lengths, cache.packed = about["lengths"], about["packed"]
    if about["shape"] is not None:
        heads, *dims = about["shape"]
        layout = BlockLayout(*codecs.codecs(*dims), heads, BLOCK_TOKENS)
        cache.pool.declare(layer, layout)
        for arrays, table, count in zip(sequences, tables, cache.packed, strict=True):
            if count:
                rows = mx.concatenate(arrays[2:])
                if rows.shape != (count, layout.words):
                    raise ValueError(
                        f"this saved cache is damaged: blocks of shape {rows.shape}, not "
                        f"{(count, layout.words)}"
                    )
                cache.pool.write(layer, table.to_write(layer, 0, count), rows)
    parts = [
        (arrays[0], arrays[1]) if has_tail else None
        for arrays, has_tail in zip(sequences, about["tails"], strict=True)
    ]
    cache.tails = Tails(about["starts"], parts, cache.tails.slots)


def _read(text: Any) -> dict[str, Any]:
    """What a saved cache says about itself.

    Raises:
        ValueError: this version cannot read it.
    """
    try:
        about = json.loads(text)
    except (TypeError, ValueError):
        about = None
    found = about if isinstance(about, dict) else {}
    for name, wanted in (("format", FORMAT), ("block_tokens", BLOCK_TOKENS)):
        if found.get(name) != wanted:
            raise ValueError(
                f"this saved cache has {name} {found.get(name)}, and this version of tqstack reads "
                f"{wanted}: read the prompt again and save it anew"
            )
    return found
