"""A zoo of tiny models of random weights, one and more for each way that mlx-lm's families end in logits.

`FAMILIES` is to parametrize a test with, `build` makes a fresh module of one of its names.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map

VOCAB = 320
SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "intermediate_size": 64,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "rms_norm_eps": 1e-6,
    "vocab_size": VOCAB,
    "max_position_embeddings": 128,
    "rope_theta": 10000.0,
}
TIED, UNTIED = {"tie_word_embeddings": True}, {"tie_word_embeddings": False}
EMBEDDING = "model.embed_tokens"
ATTENTION = ("self_attn.q_proj", "self_attn.v_proj")
GRANITE = {
    "logits_scaling": 4.0,
    "attention_multiplier": 0.25,
    "embedding_multiplier": 2.0,
    "residual_multiplier": 0.5,
    "attention_bias": False,
    "mlp_bias": False,
}
MINICPM = {"dim_model_base": 16, "scale_depth": 1.4, "scale_emb": 2.0}
GEMMA3 = {"query_pre_attn_scalar": 16, "sliding_window_pattern": 2, "sliding_window": 4}
GEMMA3N = {
    "rope_local_base_freq": 10000.0,
    "activation_sparsity_pattern": [0.5, 0.0],
    "altup_num_inputs": 2,
    # A number here makes mlx-lm's forward pass write clipped weights back into the model.
    "altup_coef_clip": None,
    "altup_correct_scale": True,
    "altup_active_idx": 0,
    "laurel_rank": 4,
    "num_kv_shared_layers": 0,
    "layer_types": ["sliding_attention", "full_attention"],
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": VOCAB,
    "sliding_window": 4,
    "final_logit_softcapping": 5.0,
}
GPT_BIGCODE = {"n_embd": 32, "n_layer": 2, "n_inner": 64, "n_head": 2, "n_positions": 128, "layer_norm_epsilon": 1e-5}
MAMBA = {"state_size": 8, "conv_kernel": 4, "use_bias": False, "use_conv_bias": True, "time_step_rank": 4}


@dataclass(frozen=True)
class Family:
    """How to build a model of a family, and what its head is."""

    kind: str
    """The module of mlx_lm.models."""
    layer: str
    """What holds the output weights."""
    config: dict[str, Any] = field(default_factory=dict)
    plain: bool = True
    """Whether the head is that layer alone."""
    keys: tuple[str, ...] | None = None
    """What can bear any adapter: layers of a block, None for every linear one."""


def _wrapped(kind: str, **config: object) -> dict[str, Any]:
    """The config of a model whose language model lies in a wrapper."""
    return {"text_config": {"model_type": kind, **SIZES, **config}}


FAMILIES: dict[str, Family] = {
    "cohere": Family("cohere", EMBEDDING, {"logit_scale": 0.25, "layer_norm_eps": 1e-5}, plain=False),
    "falcon_h1": Family("falcon_h1", "lm_head", {**UNTIED, "mamba_d_ssm": 32, "mamba_n_heads": 2, "mamba_d_head": 16}),
    "gemma": Family("gemma", EMBEDDING),
    "gemma2": Family("gemma2", EMBEDDING, {"query_pre_attn_scalar": 16, "final_logit_softcapping": 5.0}, plain=False),
    "gemma3": Family("gemma3", "language_model.lm_head", {**_wrapped("gemma3_text", **GEMMA3), "vocab_size": VOCAB}),
    "gemma3 text": Family("gemma3_text", "lm_head", GEMMA3),
    "gemma3n": Family(
        "gemma3n", "model.language_model.embed_tokens", _wrapped("gemma3n", **GEMMA3N), plain=False, keys=ATTENTION
    ),
    "gpt_bigcode": Family("gpt_bigcode", "transformer.wte", {**GPT_BIGCODE, **TIED}),
    "gpt_neox": Family(
        "gpt_neox", "model.embed_out", {"layer_norm_eps": 1e-5, "rotary_emb_base": 10000, "rotary_pct": 0.5}
    ),
    "granite tied": Family("granite", EMBEDDING, {**GRANITE, **TIED}, plain=False),
    "granite untied": Family("granite", "lm_head", {**GRANITE, **UNTIED}, plain=False),
    "internlm2": Family("internlm2", "output", UNTIED),
    "llama tied": Family("llama", EMBEDDING, TIED),
    "llama untied": Family("llama", "lm_head", UNTIED),
    "mamba": Family("mamba", "backbone.embeddings", {**MAMBA, **TIED}),
    "minicpm tied": Family("minicpm", EMBEDDING, {**MINICPM, **TIED}),
    "minicpm untied": Family("minicpm", "lm_head", {**MINICPM, **UNTIED}, plain=False),
    "mistral3": Family("mistral3", "language_model.model.embed_tokens", _wrapped("llama", **TIED)),
    "mixtral": Family(
        "mixtral", "lm_head", {**UNTIED, "num_local_experts": 2, "num_experts_per_tok": 1}, keys=ATTENTION
    ),
    "nanochat": Family("nanochat", "lm_head", plain=False),
    "olmo2": Family("olmo2", "lm_head", UNTIED),
    "phi": Family("phi", "lm_head", {"partial_rotary_factor": 0.5}),
    "phi3": Family("phi3", "lm_head", UNTIED),
    "qwen2 tied": Family("qwen2", EMBEDDING, TIED),
    "qwen2 untied": Family("qwen2", "lm_head", UNTIED),
    "qwen3 tied": Family("qwen3", EMBEDDING, TIED),
    "qwen3 untied": Family("qwen3", "lm_head", UNTIED),
    "smollm3": Family("smollm3", EMBEDDING, {**TIED, "no_rope_layer_interval": 2}),
    "stablelm": Family(
        "stablelm", "lm_head", {"layer_norm_eps": 1e-5, "partial_rotary_factor": 0.5, "use_qkv_bias": True}
    ),
    "starcoder2": Family("starcoder2", EMBEDDING, TIED),
}


def build(name: str, seed: int = 4, stretch: float = 3.0) -> nn.Module:
    """A fresh model of a family, in evaluation mode; matrices are stretched, so that its logits are not all alike."""
    family = FAMILIES[name]
    architecture = importlib.import_module(f"mlx_lm.models.{family.kind}")
    arguments = architecture.ModelArgs.from_dict({"model_type": family.kind, **SIZES, **family.config})
    mx.random.seed(seed)
    module = architecture.Model(arguments)
    module.update(tree_map(lambda value: _random(value, stretch), module.parameters()))
    module.eval()
    mx.eval(module.parameters())
    return module


def _random(value: mx.array, stretch: float) -> mx.array:
    """Matrices larger, gains and biases no longer all ones and zeros."""
    return stretch * value if value.ndim > 1 else value + 0.1 * mx.random.normal(value.shape)
