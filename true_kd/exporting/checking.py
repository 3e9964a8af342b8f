"""How far what was exported is from the original, measured on logits and not believed of a converter.

The original is the student with its adapter as mlx-lm applies it; what it says on a few prompts of the domain is what
the export is held against.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_unflatten

from true_kd.adapters import load_adapter
from true_kd.backend import device_name
from true_kd.comparing import token_kl
from true_kd.errors import TrueKDError
from true_kd.examples import render
from true_kd.exporting.reading import Adapter
from true_kd.finding import FoundAdapter
from true_kd.memory import budget_bytes, set_guards
from true_kd.models import LanguageModel, ModelOptions, SamplingOptions, open_model, release_memory
from true_kd.models.streaming import read_logits, stream_reply
from true_kd.options import record
from true_kd.prompts import Prompt, from_strings, has_split, load_prompts

SAMPLED = 8
"""Prompts that an export is checked on."""
_LONGEST = 32
"""Tokens of each reply. Eight replies of a vocabulary of 152k: 156 MB."""
_GENERAL = (
    "Why is the sky dark at night?",
    "Write a short plan for learning to swim.",
    "What went wrong when the bread did not rise?",
    "Summarise what a library is for in one sentence.",
)
"""For an adapter whose domain's prompts are not there."""


class NotTheSame(TrueKDError):
    """What was exported does not say what the original says. Exit code 5; nothing of it is kept."""

    exit_code = 5

    def __init__(self, target: str, found: Measured, advice: str) -> None:
        super().__init__(
            f"--to {target}: {found.what} is {found.difference:.2g}, expected at most {found.limit:.2g}. "
            f"Nothing was written. {advice}"
        )


@record
class Measured:
    """How far an export is from the original."""

    what: str
    """"largest difference of logits", or "KL(adapter || fused)", whose unit is nats per token."""
    difference: float
    limit: float
    """The most that `difference` may be."""
    effect: float
    """The same measure between the original and the student without adapter: what there was to lose."""
    tokens: int
    """Reply tokens that it was measured at."""

    @property
    def holds(self) -> bool:
        """Whether the export is what it should be."""
        return self.difference <= self.limit

    @property
    def is_telling(self) -> bool:
        """Whether an export without any adapter would have been noticed."""
        return self.effect > self.limit


@dataclass(frozen=True)
class Original:
    """What the student says with its adapter, and without."""

    asked: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]
    """Prompt and reply of each sample, as token ids."""
    adapted: tuple[np.ndarray, ...]
    """Logits at each reply's tokens, [tokens, vocab]."""
    plain: tuple[np.ndarray, ...]

    @property
    def tokens(self) -> int:
        """Of all replies."""
        return sum(len(reply) for _, reply in self.asked)

    def read(self, module: nn.Module) -> tuple[np.ndarray, ...]:
        """What a model says on the same texts."""
        return tuple(read_logits(module, prompt, reply) for prompt, reply in self.asked)

    def compare_logits(self, logits: Sequence[np.ndarray], tolerance: float) -> Measured:
        """The largest difference of a logit; `tolerance` is for logits of size 1 on a CPU."""
        largest = max(float(np.abs(one).max()) for one in self.adapted)
        # A GPU may multiply float32 in fewer bits; not measured on one.
        tolerance = tolerance if device_name() == "cpu" else max(tolerance, _ON_GPU)
        return Measured(
            "largest difference of logits",
            _furthest(self.adapted, logits),
            tolerance * max(1.0, largest),
            _furthest(self.adapted, self.plain),
            self.tokens,
        )

    def compare_kl(self, logits: Sequence[np.ndarray]) -> Measured:
        """Mean KL from the original, of which a tenth of the adapter's own effect may be lost."""
        effect = _mean_kl(self.adapted, self.plain)
        lost = _mean_kl(self.adapted, logits)
        return Measured("KL(adapter || fused)", lost, max(_SHARE * effect, _LEAST_KL), effect, self.tokens)


_ON_GPU = 1e-3
_SHARE = 0.1
_LEAST_KL = 1e-4
"""Nats; what rounding to bfloat16 costs a model is below it."""


def _furthest(ones: Sequence[np.ndarray], others: Sequence[np.ndarray]) -> float:
    # Not max() of floats, which passes over a NaN.
    return float(np.max([np.abs(one - other).max() for one, other in zip(ones, others, strict=True)]))


def _mean_kl(ones: Sequence[np.ndarray], others: Sequence[np.ndarray]) -> float:
    return float(np.mean([kl for one, other in zip(ones, others, strict=True) for kl in token_kl(one, other)]))


def held_out_prompts(found: FoundAdapter) -> tuple[list[Prompt], str]:
    """A few prompts of the adapter's domain, or general ones where they are not there; and which they are."""
    root, domain = found.config.prompts_folder, found.domain
    for split in ("valid", "train"):
        if domain is not None and root.is_dir() and has_split(root, domain, split):
            prompts = load_prompts(root, domain, split)
            if prompts:
                return prompts[:: max(1, len(prompts) // SAMPLED)][:SAMPLED], f"{split} prompts of {domain}"
    return from_strings(_GENERAL, "prompt"), "general prompts"


def hear_original(adapter: Adapter, prompts: Sequence[Prompt]) -> tuple[Original, LanguageModel]:
    """What the student says with its adapter and without, and the student without, in float32.

    Replies are those of the prompts, or written by the student with its adapter.

    Raises
    ------
    CacheError
        when the adapter is not one of this student.
    """
    set_guards(budget_bytes(adapter.found.config.memory_gb))
    model = open_in_float32(adapter.student)
    load_adapter(model.module, adapter.folder)
    asked = tuple(_sample(model, prompt) for prompt in prompts[:SAMPLED])
    adapted = tuple(read_logits(model.module, prompt, reply) for prompt, reply in asked)
    del model
    release_memory()
    model = open_in_float32(adapter.student)
    plain = tuple(read_logits(model.module, prompt, reply) for prompt, reply in asked)
    return Original(asked, adapted, plain), model


def open_in_float32(options: ModelOptions) -> LanguageModel:
    """A student that computes in float32 wherever it does."""
    model = open_model(options, "student")
    model.module.set_dtype(mx.float32)
    return model


def _sample(model: LanguageModel, prompt: Prompt) -> tuple[tuple[int, ...], tuple[int, ...]]:
    rendered = render(prompt, model.tokenizer, model.stop_ids, model.name)
    reply = rendered.response
    if reply is None:
        greedy = SamplingOptions(sampling_temperature=0.0, max_tokens=_LONGEST)
        reply = [token.id for token in stream_reply(model, rendered.prompt, greedy, 0)]
    return tuple(rendered.prompt), tuple(reply[:_LONGEST])


Formula = Callable[[nn.Module, mx.array], mx.array]
"""What another tool computes in place of a layer, from that layer and its input."""


class _Replaced(nn.Module):
    """A layer of which another tool's formula gives the output."""

    def __init__(self, layer: nn.Module, formula: Formula) -> None:
        super().__init__()
        self.layer = layer
        self._formula = formula

    def __call__(self, inputs: mx.array) -> mx.array:
        return self._formula(self.layer, inputs)


def apply_formulas(module: nn.Module, formulas: Mapping[str, Formula]) -> None:
    """Have layers of a plain model, by dotted name, compute what another tool would.

    Raises
    ------
    KeyError
        for a name that no layer has.
    """
    layers = dict(module.named_modules())
    module.update_modules(
        tree_unflatten([(name, _Replaced(layers[name], formula)) for name, formula in formulas.items()])
    )


def dense(layer: nn.Module) -> mx.array:
    """The weights of a linear layer in float32, unpacked."""
    if isinstance(layer, nn.QuantizedLinear):
        unpacked = mx.dequantize(
            layer.weight, layer.scales, layer.biases, group_size=layer.group_size, bits=layer.bits, mode=layer.mode
        )
        return unpacked.astype(mx.float32)
    return layer.weight.astype(mx.float32)
