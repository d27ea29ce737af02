"""Tiny random models of every family: configs, and models made of them."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map
from mlx_lm.utils import _get_classes

from tqstack.models.adapt import adapt

VOCABULARY = 128
COMMON = {
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": VOCABULARY,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 4096,
    "rope_theta": 10_000.0,
    "tie_word_embeddings": True,
}
# Small sizes of the 35B geometry: experts, three recurrent layers and a softmax layer.
SMALL_35B = {
    "hidden_size": 128,
    "num_experts": 16,
    "vocab_size": 256,
    "moe_intermediate_size": 64,
    "shared_expert_intermediate_size": 64,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
MIXTURE = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "shared_expert_intermediate_size": 64,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}
DELTA = {
    "num_hidden_layers": 4,
    "full_attention_interval": 4,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
    "linear_conv_kernel_dim": 4,
    "partial_rotary_factor": 0.5,
}
WINDOWS = ["sliding_attention", "full_attention"]


def of(model_type: str, layers: int = 2, **changes) -> dict:
    return {"model_type": model_type, **COMMON, "num_hidden_layers": layers, **changes}


def nested(model_type: str, text: dict) -> dict:
    return {"model_type": model_type, "vocab_size": VOCABULARY, "text_config": text}


CONFIGS = {
    "llama": of("llama"),
    "mistral": of("mistral", layer_types=WINDOWS, sliding_window=32),
    "ministral3": of(
        "ministral3",
        rope_parameters={
            "type": "default",
            "rope_theta": 10_000.0,
            "llama_4_scaling_beta": 0.1,
            "original_max_position_embeddings": 4096,
        },
    ),
    # mlx-lm's Qwen 2 has no windows, whatever its config says; its heads follow from the width.
    "qwen2": of("qwen2", head_dim=32, layer_types=WINDOWS, sliding_window=32),
    "qwen3": of("qwen3"),
    # Its fourth layer has no positions; mlx-lm keeps all keys of all of them.
    "smollm3": of("smollm3", layers=4, layer_types=2 * WINDOWS, sliding_window=32),
    "qwen3-moe": of("qwen3_moe", **MIXTURE),
    "granite": of(
        "granite",
        head_dim=32,
        **dict.fromkeys(("embedding_multiplier", "attention_multiplier"), 0.2),
        **dict.fromkeys(("logits_scaling", "residual_multiplier"), 0.5),
        attention_bias=False,
        mlp_bias=False,
    ),
    "mixtral": of("mixtral", head_dim=32, num_local_experts=4, num_experts_per_tok=2),
    "qwen3-next": of("qwen3_next", **MIXTURE, **{**DELTA, "full_attention_interval": 2}),
    "qwen3.5": nested("qwen3_5", of("qwen3_5_text", **{**DELTA, "num_hidden_layers": 5})),
    "qwen3.5-moe": nested("qwen3_5_moe", of("qwen3_5_moe_text", **MIXTURE, **DELTA)),
    "gemma3": nested("gemma3", of("gemma3_text", 4, sliding_window=32, sliding_window_pattern=2)),
    "gemma4": nested(
        "gemma4",
        of(
            "gemma4_text",
            6,
            layer_types=[*WINDOWS, *WINDOWS, *WINDOWS],
            num_kv_shared_layers=3,
            global_head_dim=128,
            sliding_window=32,
            hidden_size_per_layer_input=16,
            vocab_size_per_layer_input=VOCABULARY,
        ),
    ),
    "gpt-oss": of(
        "gpt_oss",
        layer_types=WINDOWS,
        num_local_experts=4,
        num_experts_per_tok=2,
        sliding_window=32,
    ),
    "nemotron-h": of(
        "nemotron_h",
        hybrid_override_pattern="M-*EM*",
        mamba_num_heads=4,
        mamba_head_dim=32,
        ssm_state_size=16,
        conv_kernel=4,
        n_groups=2,
        n_group=1,
        topk_group=1,
        n_routed_experts=4,
        n_shared_experts=1,
        num_experts_per_tok=2,
        moe_intermediate_size=64,
        moe_shared_expert_intermediate_size=64,
        routed_scaling_factor=1.0,
        norm_topk_prob=True,
        layer_norm_epsilon=1e-5,
        use_conv_bias=True,
        **dict.fromkeys(("attention_bias", "mlp_bias", "mamba_proj_bias", "use_bias"), False),
    ),
    "granite-hybrid": of(
        "granitemoehybrid",
        3,
        head_dim=32,
        layer_types=["mamba", "attention", "mamba"],
        num_local_experts=4,
        num_experts_per_tok=2,
        shared_intermediate_size=64,
        mamba_n_heads=4,
        mamba_d_head=32,
        mamba_d_state=16,
        mamba_d_conv=4,
        mamba_n_groups=1,
        mamba_conv_bias=True,
        mamba_proj_bias=False,
        attention_bias=False,
        position_embedding_type="nope",
        **dict.fromkeys(("embedding_multiplier", "attention_multiplier"), 0.2),
        **dict.fromkeys(("logits_scaling", "residual_multiplier"), 0.5),
    ),
    "deepseek-v2": of(
        "deepseek_v2",
        kv_lora_rank=32,
        q_lora_rank=None,
        qk_nope_head_dim=64,
        qk_rope_head_dim=32,
        v_head_dim=64,
        moe_intermediate_size=64,
        n_routed_experts=4,
        n_shared_experts=1,
        num_experts_per_tok=2,
        first_k_dense_replace=1,
        rope_scaling={"factor": 1.0, "original_max_position_embeddings": 4096},
        attention_bias=False,
    ),
    "lfm2": of(
        "lfm2",
        4,
        layer_types=["conv", "full_attention", "conv", "full_attention"],
        norm_eps=1e-5,
        conv_bias=False,
        conv_L_cache=3,
        block_dim=128,
        block_multiple_of=64,
        block_ffn_dim_multiplier=1.0,
        block_auto_adjust_ff_dim=False,
    ),
}


def build(name: str, vocabulary: int = VOCABULARY, dtype: mx.Dtype = mx.float32) -> nn.Module:
    """The model, with noise in every weight, made ready for this machine."""
    model = unadapted({**CONFIGS[name], "vocab_size": vocabulary})
    model.set_dtype(dtype)
    mx.eval(model.parameters())
    adapt(model)
    return model


def unadapted(config: dict) -> nn.Module:
    mx.random.seed(7)
    model_class, arguments = _get_classes(config)
    model = model_class(arguments.from_dict(_copied(config)))
    model.update(tree_map(lambda w: w + 0.02 * mx.random.normal(w.shape), model.parameters()))
    mx.eval(model.parameters())
    model.eval()
    return model


def _copied(config: dict) -> dict:
    """mlx-lm's classes write into what they are given."""
    return {key: _copied(v) if isinstance(v, dict) else v for key, v in config.items()}
