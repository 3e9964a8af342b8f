"""A whole student as a GGUF file, from its MLX weights alone: what llama.cpp loads beneath an exported adapter.

The tests' own, and only for the shapes that they compare: float32, no tokenizer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np

ARCHITECTURES = {
    **{"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"},
    **{"gemma": "gemma", "gemma2": "gemma2", "gemma3_text": "gemma3"},
}


def write_base(path: Path, config: Mapping[str, Any], weights: Mapping[str, np.ndarray]) -> Path:
    """Write the file; `config` is the student's config.json."""
    kind = ARCHITECTURES[config["model_type"]]
    writer = gguf.GGUFWriter(path, kind)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_vocab_size(config["vocab_size"])
    if "final_logit_softcapping" in config:
        writer.add_final_logit_softcapping(config["final_logit_softcapping"])
        writer.add_attn_logit_softcapping(50.0)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    writer.add_tokenizer_model("none")
    [number] = [key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == kind]
    table = gguf.get_tensor_name_map(number, config["num_hidden_layers"])
    for name, values in weights.items():
        if kind == "llama" and name.endswith(("q_proj.weight", "k_proj.weight")):
            heads = config["num_attention_heads" if "q_proj" in name else "num_key_value_heads"]
            values = neighbours(values, heads)
        if kind.startswith("gemma") and name.endswith("norm.weight"):
            # Gains are kept as what they are more than 1, and llama.cpp has them whole.
            values = values + 1
        writer.add_tensor(table.get_name(name, try_suffixes=(".weight", ".bias")), np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def neighbours(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rows of each head so that those rotated together are neighbours, written as llama.cpp says what it rotates."""
    size = rows.shape[0] // heads
    found = np.empty_like(rows)
    for head in range(heads):
        for pair in range(size // 2):
            found[head * size + 2 * pair] = rows[head * size + pair]
            found[head * size + 2 * pair + 1] = rows[head * size + pair + size // 2]
    return found


def llama_cpp_logits(base: Path, tokens: Sequence[int], adapter: Path | None = None) -> np.ndarray:
    """What llama.cpp itself says at each token: float32 [tokens, vocab]."""
    from llama_cpp import Llama

    model = Llama(
        model_path=str(base),
        lora_path=str(adapter) if adapter is not None else None,
        n_ctx=64,
        n_batch=64,
        n_threads=1,
        logits_all=True,
        type_k=0,
        type_v=0,
        verbose=False,
    )
    try:
        model.eval(list(tokens))
        return np.array(model.scores[: len(tokens)], dtype=np.float32)
    finally:
        model.close()
