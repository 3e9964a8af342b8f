"""The one seam to mlx-lm: opening models, splitting body from head, adding LoRA, generating.

Nothing outside this package imports `mlx_lm`, which changes often and takes nearly a second to import: inside it,
imports of `mlx_lm` stand in the functions that need them.
"""

from true_kd.models.generation import (
    DecodingStep,
    Reply,
    SamplingOptions,
    generate_replies,
    seed_of,
    uniforms_of,
)
from true_kd.models.heads import Split, split_head
from true_kd.models.lora import (
    LoraOptions,
    add_lora,
    attach_adapter,
    check_keys,
    lora_parameters,
    parameter_count,
    trainable,
)
from true_kd.models.opening import (
    LanguageModel,
    ModelFiles,
    ModelOptions,
    ModelTokenizer,
    describe,
    locate,
    open_model,
    open_skeleton,
    open_tokenizer,
    release_memory,
)

__all__ = [
    "DecodingStep",
    "LanguageModel",
    "LoraOptions",
    "ModelFiles",
    "ModelOptions",
    "ModelTokenizer",
    "Reply",
    "SamplingOptions",
    "Split",
    "add_lora",
    "attach_adapter",
    "check_keys",
    "describe",
    "generate_replies",
    "locate",
    "lora_parameters",
    "open_model",
    "open_skeleton",
    "open_tokenizer",
    "parameter_count",
    "release_memory",
    "seed_of",
    "split_head",
    "trainable",
    "uniforms_of",
]
