"""The adapter that is to leave, its student, and what of either a target cannot take.

Read from the adapter's file, and of the student from its config and the headers of its weights.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from true_kd import adapters
from true_kd.errors import CacheError, InputError
from true_kd.finding import FoundAdapter
from true_kd.models import ModelOptions, card_base, describe, layer_kinds, open_stored


class CannotExport(InputError):
    """A target cannot take this adapter, with the reason and what can."""

    def __init__(self, target: str, found: str, expected: str, advice: str) -> None:
        super().__init__(f"--to {target}: {found}, expected {expected}. {advice}")


@dataclass(frozen=True)
class Layer:
    """A layer of the student, and what the adapter adds to it, in float32 and mlx-lm's orientation."""

    name: str
    """Dotted, as mlx-lm has it."""
    kind: str
    """See `models.layer_kinds`."""
    a: np.ndarray
    """[input, rank]; of an embedding [vocab, rank]; of experts with one dimension more."""
    b: np.ndarray
    """[rank, output]."""
    m: np.ndarray | None
    """The magnitudes of DoRA, [output]."""


@dataclass(frozen=True)
class Adapter:
    """An adapter, whole and checked."""

    found: FoundAdapter
    type: str
    """lora or dora."""
    scale: float
    dropout: float
    layers: tuple[Layer, ...]
    config: Mapping[str, Any]
    """The student's config.json."""
    student_folder: Path
    is_tied: bool
    """Whether the student has no output head but its embedding."""

    @property
    def folder(self) -> Path:
        """Where it lies."""
        return self.found.folder

    @property
    def student(self) -> ModelOptions:
        """The model that it is of."""
        return self.found.config.student

    @property
    def rank(self) -> int:
        """Of its update."""
        return self.layers[0].a.shape[-1]

    @property
    def alpha(self) -> float | int:
        """What other tools call lora_alpha: a whole number where it is one, which is all that some of them read."""
        alpha = self.scale * self.rank
        return round(alpha) if alpha == round(alpha) else alpha

    @property
    def model_type(self) -> str:
        """The student's family, as its config names it."""
        return str(self.config.get("model_type", ""))

    @property
    def is_quantised(self) -> bool:
        """Whether the student's weights are packed into a few bits."""
        return "quantization" in self.config or "quantization_config" in self.config

    @property
    def local_path(self) -> str | None:
        """The folder by which this machine alone knows the student; None for one of the hub."""
        named = self.student.model
        is_id = not Path(named).expanduser().exists() and named.count("/") == 1 and not named.startswith((".", "~"))
        return None if is_id else str(self.student_folder.resolve())

    @property
    def name(self) -> str:
        """Of its domain, or of its folder."""
        return self.found.domain or self.folder.resolve().name


def read_adapter(found: FoundAdapter) -> Adapter:
    """Read an adapter and what its student is.

    Raises
    ------
    CacheError
        when a file of it is damaged.
    InputError
        when it is no LoRA or DoRA adapter, or the student is not there.
    """
    folder = found.folder
    adapters.require_whole(folder)
    try:
        tensors = {
            name: np.array(value.astype(mx.float32)) for name, value in mx.load(str(folder / adapters.WEIGHTS)).items()
        }
    except (OSError, ValueError, RuntimeError) as error:
        raise CacheError(f"{folder}: not a whole adapter ({error}). Distil it again.") from error
    settings = adapters.read_json(folder / adapters.CONFIG)
    kind, scale, dropout = _settings(folder, settings)
    module, config = open_stored(found.config.student, "student")
    names = sorted({name.rpartition(".")[0] for name in tensors})
    kinds = layer_kinds(module, names)
    layers = []
    for name in names:
        a, b = (tensors.get(f"{name}.{part}") for part in ("lora_a", "lora_b"))
        if a is None or b is None or name not in kinds:
            why = "not of this student" if name not in kinds else "without lora_a or lora_b"
            raise CacheError(f"{folder / adapters.WEIGHTS}: {name} is {why}. Distil it again.")
        layers.append(Layer(name, kinds[name], a, b, tensors.get(f"{name}.m")))
    if not layers:
        raise CacheError(f"{folder / adapters.WEIGHTS}: no tensors, expected those of an adapter. Distil it again.")
    path = describe(found.config.student, "student").path
    is_tied = not any(name.rpartition(".")[2] == "lm_head" for name, _ in module.named_modules())
    return Adapter(found, kind, scale, dropout, tuple(layers), config, path, is_tied)


def _settings(folder: Path, settings: Any) -> tuple[str, float, float]:
    """Type, scale and dropout of an adapter's config."""
    where = folder / adapters.CONFIG
    if not isinstance(settings, dict):
        raise InputError(f"{where}: no JSON object, expected the config of an mlx-lm adapter. Check the path.")
    kind = settings.get("fine_tune_type", "lora")
    if kind not in ("lora", "dora"):
        raise InputError(
            f"{where}: fine_tune_type {str(kind)[:20]!r}, expected lora or dora: only an adapter can be exported. "
            "Use mlx_lm.fuse."
        )
    parameters = settings.get("lora_parameters")
    numbers = [parameters.get(key) if isinstance(parameters, dict) else None for key in ("scale", "dropout")]
    if not all(isinstance(number, (int, float)) and not isinstance(number, bool) for number in numbers):
        raise InputError(f"{where}: no lora_parameters with scale and dropout, expected mlx-lm's. Check the path.")
    return kind, float(numbers[0]), float(numbers[1])


def check_layers(adapter: Adapter, target: str, known: Collection[str]) -> None:
    """Refuse what a format of other tools cannot say of an adapter.

    Parameters
    ----------
    known
        the families whose layers are known to have the same names there.

    Raises
    ------
    CannotExport
        with the layer and the reason.
    """
    fuse = "Use --to fused, which any tool reads."
    for layer in adapter.layers:
        if layer.kind == "experts" or layer.a.ndim > 2:
            raise CannotExport(
                target,
                f"{layer.name} is a layer of experts, whose order in one tensor other tools do not agree on",
                "an adapter of linear layers",
                fuse,
            )
        if layer.kind == "embedding" and adapter.is_tied:
            raise CannotExport(
                target,
                f"{layer.name} is also the student's output head, and mlx-lm adapts both where other tools adapt one",
                "no LoRA on tied embeddings",
                fuse,
            )
        if layer.kind == "other":
            raise CannotExport(target, f"{layer.name} is of a kind of its own", "an adapter of linear layers", fuse)
    if adapter.model_type not in known:
        raise CannotExport(
            target,
            f"students of type {adapter.model_type[:30]!r} have not been compared with it",
            f"one of {', '.join(sorted(known))}",
            fuse,
        )


def base_model(adapter: Adapter, given: str | None) -> tuple[str, str]:
    """The id of the student before it was quantised, for tools that open it themselves; and how it is known.

    Raises
    ------
    InputError
        when nobody knows it.
    """
    if given is not None:
        if not given.strip():
            raise InputError("--base-model '': empty, expected a hub id or a folder. Name the unquantised student.")
        return given, "--base-model"
    named = adapter.student.model
    if not adapter.is_quantised:
        return adapter.local_path or named, "the student itself"
    from_card = card_base(adapter.student_folder)
    if from_card is not None and from_card != named:
        return from_card, "the model card of the student"
    raise InputError(
        f"student {named}: quantised, and no card names what it was made from. Other tools need the model before "
        "quantisation. Give --base-model ID, such as Qwen/Qwen2.5-3B-Instruct."
    )
