"""What the machine has of memory, and what a training step needs of it.

Both are functions of the hardware, the model and shapes, never of what happens to be free: a budget cuts micro-batches
into parts, and the same run must be cut the same way each time. The estimate is of what a step *needs*. MLX takes more
where it may, as it hands out the memory of operations before those ahead of them have run; `set_guards` bounds that.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

METAL_SHARE = 0.9
"""Of the working set that Metal recommends, itself two thirds to three quarters of a Mac's memory; also the most that
is wired. Kernel panics came with all of it wired: https://github.com/ml-explore/mlx/issues/3186."""

CUDA_SHARE = 0.9
"""Of the memory of the GPU; the rest is for the context and the libraries' workspaces."""

HOST_SHARE = 0.8
"""Of the memory that this process may have, where a CPU computes: as MLX's own limit, the rest is for all others."""

CACHE_SHARE = 0.125
"""Of the budget, for freed buffers that a GPU's allocator keeps to use again. A choice, not a measurement: without any
each array would be allocated anew, with all of them the memory of the largest micro-batch would be kept for good."""


def budget_bytes(memory_gb: float | None) -> int:
    """The bytes a run may take, weights included: `memory_gb` times 10^9, or `default_budget` for None."""
    return default_budget() if memory_gb is None else int(memory_gb * 1e9)


def default_budget() -> int:
    """The share of this machine's memory that a run takes unless told otherwise, in bytes.

    Of the GPU where MLX computes on one, else of the host or its control group. The Metal part is untested on a Mac.
    """
    if mx.default_device() == mx.Device(mx.gpu):
        info = mx.device_info()
        for key, share in (("max_recommended_working_set_size", METAL_SHARE), ("total_memory", CUDA_SHARE)):
            if info.get(key):
                return int(share * info[key])
    return int(HOST_SHARE * host_memory())


def host_memory(files: Path = Path("/")) -> int:
    """Bytes of memory that this process may have: the machine's, or less where its control groups say so."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min([total, *_group_limits(files)])


def _group_limits(files: Path) -> Iterator[int]:
    """Limits of the Linux control groups of this process, and of those around them; versions 2 and 1."""
    membership = files / "proc" / "self" / "cgroup"
    groups = membership.read_text().splitlines() if membership.is_file() else []
    for line in groups:
        _, controllers, inside = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        root = files / "sys" / "fs" / "cgroup" / controllers
        folder = root / inside.lstrip("/")
        # In a container the path may be the host's, of which only the upper end is here: hence every folder up to it.
        for place in (folder, *folder.parents):
            limit = place / ("memory.limit_in_bytes" if controllers else "memory.max")
            if limit.is_file() and (text := limit.read_text().strip()).isdigit():
                yield int(text)
            if place == root:
                break


def set_guards(budget: int) -> None:
    """Have MLX keep this process within the budget as far as it can: it waits, and reuses, before it takes more.

    Measured on a CPU: steps that took 1.2 to 2.3 times what they need without a limit kept to one that they fit in,
    give or take a quarter of the need. A limit below the need is no error, MLX then takes what it must. On Metal
    (untested on a Mac) the budget is also wired, so that it is not swapped, up to `METAL_SHARE` of the recommended
    working set.
    """
    mx.set_memory_limit(budget)
    if mx.default_device() != mx.Device(mx.gpu):
        return
    mx.set_cache_limit(int(CACHE_SHARE * budget))
    recommended = mx.device_info().get("max_recommended_working_set_size")
    if mx.metal.is_available() and recommended:
        mx.set_wired_limit(min(budget, int(METAL_SHARE * recommended)))


LAYER_KEPT = {"inputs": 0.35, "attention": 0.4, "others": 3.5, "scores": 1.0}
"""How many times its `LayerWidths` a layer keeps until the backward pass reaches it.

Fitted, with `LAYER_LIVE`, to the peaks of 158 steps on a CPU: LoRA students of qwen2, qwen3, llama, gemma2, gemma3 and
phi3, hidden 64 to 512, 2 to 8 layers, float32, bfloat16 and 4 bits, 1 to 8 sequences of 32 to 1,024 tokens, with and
without recomputation, at a memory limit so low that MLX took only what it needs. Estimate by measurement: 0.93 to 1.45,
1.14 in the middle. For 56 steps that the fit had not seen (olmo2, starcoder2, granite, a mixture of experts): 0.98 to
1.41. Without a limit MLX ran ahead to more: 0.57 to 1.23, the least with recomputation.
"""

LAYER_LIVE = {"widths": 0.45, "scores": 1.9}
"""How many times its widths, and its scores, a layer takes in addition while the backward pass is in it."""

SPARSE_COPIES = 3.0
"""Copies of a chunk of logits, float32, that the loss needs at once against sparse targets, with each divergence."""

DENSE_COPIES = 15.0
"""The same against a teacher's output head: 6 with forward_kl, 8 to 10 with others, 15 with jensen_shannon."""

TRAINABLE_COPIES = 4
"""Of the trainable parameters: two moments of Adam, the gradient of the step so far and that of a micro-batch."""


@dataclass(frozen=True)
class StepMemory:
    """What a micro-batch needs above the weights: a function of the model's structure and of shapes, without a run.

    Body activations are kept by all layers, or by one at a time where they are recomputed. Attention is taken to keep
    all its scores, as MLX does in training on a CPU and on Metal; a GPU with a fused backward pass needs less.
    """

    token: float
    """Bytes for each token, from the forward pass on."""
    pair: float
    """Bytes for each two tokens of a sequence, from the forward pass on."""
    live_token: float
    """Bytes for each token, while the backward pass is in a layer."""
    live_pair: float
    """Bytes for each two tokens of a sequence, while the backward pass is in a layer."""
    row: int
    """Bytes for each response token: what enters the head, and its gradient."""
    logits: float
    """Bytes for each response token of a chunk, while the loss has it."""
    chunk: int
    """Response tokens in a chunk."""
    fixed: int
    """Bytes whatever the micro-batch: gradients, optimizer, unpacked weights."""

    @classmethod
    def of(cls, module: nn.Module, vocab: int, chunk: int, recompute: bool, dense_teacher: bool = False) -> StepMemory:
        """Of a student with its adapter on.

        Parameters
        ----------
        vocab, chunk
            how many logits a token has, and how many tokens pass the head at a time.
        recompute
            whether the layers recompute (see `models.recompute_layers`).
        dense_teacher
            whether targets are the teacher's hidden states, which its head turns into logits.
        """
        trained = [bool(tree_flatten(layer.trainable_parameters())) for layer in module.layers]
        # No gradient passes a layer below the first that learns: it keeps nothing.
        first = trained.index(True) if any(trained) else 0
        size = _compute_size(module.layers[-1])
        layers = [LayerWidths.of(layer, size) for layer in module.layers[first:]]
        at_once = max(layers, key=lambda layer: layer.kept)
        states = layers[0].states
        copies = DENSE_COPIES if dense_teacher else SPARSE_COPIES
        return cls(
            token=len(layers) * states if recompute else sum(layer.kept for layer in layers),
            pair=0.0 if recompute else LAYER_KEPT["scores"] * sum(layer.scores for layer in layers),
            live_token=at_once.live + (at_once.kept if recompute else 0.0),
            live_pair=at_once.scores * (LAYER_LIVE["scores"] + (LAYER_KEPT["scores"] if recompute else 0.0)),
            row=2 * 4 * states // size,
            logits=copies * 4 * vocab,
            chunk=chunk,
            fixed=TRAINABLE_COPIES * _nbytes(module.trainable_parameters())
            + (max if recompute else sum)(layer.weights for layer in layers),
        )

    def bytes(self, sequences: int, width: int, rows: int) -> int:
        """Peak bytes above the weights.

        Parameters
        ----------
        sequences, width
            of the micro-batch, tokens with padding.
        rows
            response tokens that pass the output head.
        """
        tokens = sequences * width
        pairs = tokens * width
        loss = self.logits * min(self.chunk, rows)
        backward = self.live_token * tokens + self.live_pair * pairs
        return int(self.fixed + self.row * rows + self.token * tokens + self.pair * pairs + max(loss, backward))


METAL_TOKENS = 4096
"""The most tokens, padding included, that a micro-batch of several sequences has on Metal: macOS stops GPU work that
takes seconds while a display is lit. A guess, untested on a Mac."""


def split_micro_batch(
    lengths: Sequence[int],
    rows: Sequence[int],
    memory: StepMemory,
    budget: int,
    most_tokens: int | None = None,
) -> list[list[int]]:
    """The positions of a micro-batch's sequences in as few parts as fit the budget, neighbours in length together.

    Parameters
    ----------
    lengths, rows
        tokens of each sequence, and those of them that pass the output head.
    budget
        bytes left above the weights. A sequence that does not fit alone stands alone.
    most_tokens
        tokens of a part, padding included; None for no limit.
    """

    def fits(part: Sequence[int]) -> bool:
        width = max(lengths[at] for at in part)
        if most_tokens is not None and len(part) * width > most_tokens:
            return False
        return memory.bytes(len(part), width, sum(rows[at] for at in part)) <= budget

    everything = list(range(len(lengths)))
    if not everything or fits(everything):
        return [everything] if everything else []
    parts: list[list[int]] = [[]]
    # More or longer sequences never need less, so filling each part to the brim gives the fewest.
    for at in sorted(everything, key=lambda at: lengths[at]):
        if parts[-1] and not fits([*parts[-1], at]):
            parts.append([])
        parts[-1].append(at)
    return parts


@dataclass(frozen=True)
class LayerWidths:
    """What a token leaves behind in one decoder layer, in bytes, as far as the layer's structure tells."""

    states: int
    """What enters the layer."""
    inputs: int
    """What enters its linear layers, with the copies that adapters make."""
    attention: int
    """What leaves linear layers of the attention."""
    others: int
    """What leaves all other linear layers: activation functions work on it, and keep more of it."""
    scores: int
    """All heads' scores with one other token of the sequence."""
    weights: int
    """Not by token: weights that DoRA unpacks in the forward pass, for the backward pass as well."""

    @classmethod
    def of(cls, layer: nn.Module, size: int) -> LayerWidths:
        """Of a decoder layer that computes in numbers of `size` bytes."""
        parts = {path: part for path, part in layer.named_modules() if path}
        attentions = {path: part for path, part in parts.items() if _first(part, _HEADS)}
        experts = max(_first(part, _EXPERTS) for part in (layer, *parts.values()))
        states = inputs = attention = others = weights = 0
        for path, part in parts.items():
            if (widths := _linear_widths(part)) is None:
                continue
            # Of a stack of experts, a token passes through some.
            times = experts if experts and part.weight.ndim > 2 else 1
            entering, leaving = times * widths[0], times * widths[1]
            states = states or widths[0] * size
            adapter = parts.get(path.rpartition(".")[0], {})
            inputs += entering * (size + _adapter_copies(adapter, size))
            if "m" in adapter and "scales" in part:
                weights += widths[0] * widths[1] * size
            if any(path.startswith(f"{outer}.") for outer in attentions):
                attention += leaving * size
            else:
                others += leaving * size
        scores = sum(_first(part, _HEADS) * _score_arrays(part) * size for part in attentions.values())
        return cls(states, inputs, attention, others, scores, weights)

    @property
    def kept(self) -> float:
        """Bytes for each token until the backward pass has been here, without the scores."""
        widths = {"inputs": self.inputs, "attention": self.attention, "others": self.others}
        return sum(LAYER_KEPT[name] * width for name, width in widths.items())

    @property
    def live(self) -> float:
        """Bytes for each token in addition, while the backward pass is here, without the scores."""
        return LAYER_LIVE["widths"] * (self.inputs + self.attention + self.others)


_HEADS = ("n_heads", "num_heads", "num_attention_heads", "n_head")
_EXPERTS = ("top_k", "num_experts_per_tok")
_ADAPTER_LEAVES = ("lora_a", "lora_b", "m")


def _first(part: nn.Module, names: Sequence[str]) -> int:
    """The first of some attributes that a module has, as mlx-lm's families spell one thing in several ways; or 0."""
    found = (getattr(part, name, None) for name in names)
    return next((value for value in found if isinstance(value, int)), 0)


def _linear_widths(part: nn.Module) -> tuple[int, int] | None:
    """Numbers that enter and leave a linear layer, quantised or not, for a token; None for any other module."""
    weight = part.get("weight")
    if weight is None or weight.ndim < 2:
        return None
    # Packed into words of 32 bits; numbers of 3, 5 and 6 bits lie across them.
    width = weight.shape[-1] * 32 // part.bits if "scales" in part else weight.shape[-1]
    return width, weight.shape[-2]


def _adapter_copies(adapter: Any, size: int) -> int:
    """Bytes for each number that enters an adapted layer: a copy in the adapter's type, and one by dropout."""
    if "lora_a" not in adapter:
        return 0
    own = adapter.lora_a.dtype.size
    dropped = any(isinstance(part, nn.Dropout) and part._p_1 < 1 for part in adapter.modules())
    return (own if own != size else 0) + (size + 1 if dropped else 0)


def _score_arrays(attention: nn.Module) -> int:
    """Arrays of scores that the backward pass reads: the softmax, and the tanh before it where they are capped."""
    return 1 + any("softcap" in name and bool(value) for name, value in vars(attention).items())


def _compute_size(layer: nn.Module) -> int:
    """Bytes of the numbers that a layer computes in: those of its largest array of them, adapters aside."""
    floats = [
        leaf
        for name, leaf in tree_flatten(layer.parameters())
        if mx.issubdtype(leaf.dtype, mx.floating) and name.rpartition(".")[2] not in _ADAPTER_LEAVES
    ]
    return max(floats, key=lambda leaf: leaf.size).dtype.size


def _nbytes(tree: Any) -> int:
    return sum(leaf.nbytes for _, leaf in tree_flatten(tree))
