"""The one seam to mlx-lm: opening models, splitting body from head, adding LoRA, generating.

Nothing outside this package imports `mlx_lm`, which changes often and takes nearly a second to import: inside it,
imports of `mlx_lm` stand in the functions that need them.
"""

from true_kd.models.branching import Branches
from true_kd.models.finite import is_finite
from true_kd.models.fusing import fuse_layers, layer_kinds, save_model
from true_kd.models.generation import (
    DecodingStep,
    Reply,
    SamplingOptions,
    cache_bytes,
    generate_replies,
    seed_of,
    uniforms_of,
)
from true_kd.models.heads import Split, load_head, save_head, split_head
from true_kd.models.hub_access import HubAccess, hub_access
from true_kd.models.inspection import card_base, check_safetensors, read_card
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
    NotDownloaded,
    describe,
    known_digests,
    locate,
    open_model,
    open_skeleton,
    open_stored,
    open_tokenizer,
    open_tokenizer_here,
    release_memory,
    save_stand_in,
    take_over_digests,
)
from true_kd.models.recomputation import recompute_layers
from true_kd.models.shallow import UnknownDepth, count_layers, write_shallow
from true_kd.models.speed import decoding_speed
from true_kd.models.stand_in import STAND_IN, TEXT_FILES, StandIn, read_stand_in
from true_kd.models.templates import (
    TemplateRefusal,
    TemplateStopped,
    apply_template,
    bind_template,
    is_coded,
    template_text,
)
from true_kd.models.text import token_pieces

__all__ = [
    "STAND_IN",
    "TEXT_FILES",
    "Branches",
    "DecodingStep",
    "HubAccess",
    "LanguageModel",
    "LoraOptions",
    "ModelFiles",
    "ModelOptions",
    "ModelTokenizer",
    "NotDownloaded",
    "Reply",
    "SamplingOptions",
    "Split",
    "StandIn",
    "TemplateRefusal",
    "TemplateStopped",
    "UnknownDepth",
    "add_lora",
    "apply_template",
    "attach_adapter",
    "bind_template",
    "cache_bytes",
    "card_base",
    "check_keys",
    "check_safetensors",
    "count_layers",
    "decoding_speed",
    "describe",
    "fuse_layers",
    "generate_replies",
    "hub_access",
    "is_coded",
    "is_finite",
    "known_digests",
    "layer_kinds",
    "load_head",
    "locate",
    "lora_parameters",
    "open_model",
    "open_skeleton",
    "open_stored",
    "open_tokenizer",
    "open_tokenizer_here",
    "parameter_count",
    "read_card",
    "read_stand_in",
    "recompute_layers",
    "release_memory",
    "save_head",
    "save_model",
    "save_stand_in",
    "seed_of",
    "split_head",
    "take_over_digests",
    "template_text",
    "token_pieces",
    "trainable",
    "uniforms_of",
    "write_shallow",
]
