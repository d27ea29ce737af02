"""Latent attention (MLA): DeepSeek, GLM 4.7 Flash, Kimi, ...

Most of mlx-lm's models of this kind cache a latent vector and a rotary part for each token, which
they multiply themselves: there are no keys and values to compress. Some make keys and values of
the latents before they cache them, a pair for each query head; those are softmax layers like any.
Of our faster layers they have the experts and the compiled single tokens of their MLPs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tqstack.models.families.sizes import experts, geometry, size, text_config
from tqstack.models.geometry import Geometry, Layer

EXPANDED = ("deepseek_v2", "youtu_llm", "minicpm3")  # the last one is measured, not planned
# mlx-lm's, where a config leaves them out.
DEFAULTS = {"qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128}


def caches_latents(config: Mapping[str, Any]) -> bool:
    """Whether a model of this config has a cache of latents."""
    latents = text_config(config).get("kv_lora_rank") is not None
    return latents and config.get("model_type") not in EXPANDED


def read(text: Mapping[str, Any]) -> Geometry:
    text = {**DEFAULTS, **text}
    key_dim = size(text, "qk_nope_head_dim") + size(text, "qk_rope_head_dim")
    layer = Layer("softmax", size(text, "num_attention_heads"), key_dim, size(text, "v_head_dim"))
    each = size(text, "moe_intermediate_size", 0)
    mixture = experts(text) + size(text, "n_shared_experts", 0) * each
    return geometry(
        text,
        [layer] * size(text, "num_hidden_layers"),
        head_dim=key_dim,
        feed_forward=max(size(text, "intermediate_size"), mixture),
    )


READERS = dict.fromkeys(("deepseek_v2", "youtu_llm"), read)
