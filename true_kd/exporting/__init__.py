"""Takes an adapter out of true-kd: for mlx-lm, PEFT and llama.cpp, or fused for Ollama, LM Studio and all else.

Every export is compared with the original by logits before it takes its place, and refused where it cannot be right.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import true_kd.exporting.fused as _fused
import true_kd.exporting.gguf as _gguf
import true_kd.exporting.lmstudio as _lmstudio
import true_kd.exporting.mlx as _mlx
import true_kd.exporting.ollama as _ollama
import true_kd.exporting.peft as _peft
from true_kd import __version__
from true_kd.adapters import WEIGHTS
from true_kd.errors import InputError
from true_kd.exporting.checking import Measured, NotTheSame, hear_original, held_out_prompts
from true_kd.exporting.folders import RECORD, check_destination, destination, new_folder
from true_kd.exporting.reading import LOCAL, Adapter, CannotExport, base_model, read_adapter
from true_kd.files import digest_file, write_json
from true_kd.finding import FoundAdapter
from true_kd.models import card_base, open_tokenizer, release_memory
from true_kd.prompts import Prompt

__all__ = ["RECORD", "TARGETS", "CannotExport", "Exported", "Measured", "NotTheSame", "Request", "Target", "export"]

Target = Literal["mlx", "peft", "gguf", "fused", "ollama", "lmstudio"]
TARGETS: tuple[Target, ...] = get_args(Target)
_FUSED = ("fused", "ollama", "lmstudio")
"""Targets that are a model of its own."""


@dataclass(frozen=True)
class Request:
    """What is exported to where."""

    target: Target
    output: str | None = None
    """The folder; None for exports/<domain>-<target>, and LM Studio's own."""
    force: bool = False
    """Replace an earlier export, and keep a fused model that lost too much."""
    keep_bits: bool = False
    """Quantise a fused model as the student was."""
    base_model: str | None = None
    """The student before it was quantised; None to look it up."""
    prompts: Sequence[Prompt] | None = None
    """What the export is checked on; None for prompts of the domain."""
    system: str | None = None
    """The system message of a Modelfile."""


@dataclass(frozen=True)
class Exported:
    """What was written, and how far it is from the original."""

    target: Target
    folder: Path
    adapter: Path
    domain: str | None
    student: str
    student_folder: Path
    base_model: str | None
    """For tools that open the student themselves: what it was before it was quantised."""
    files: dict[str, int]
    """Bytes by name."""
    measured: Measured
    checked_on: str
    """Which prompts."""
    notes: tuple[str, ...]
    """What a person should know before trusting it."""


def export(found: FoundAdapter, request: Request) -> Generator[str, None, Exported]:
    """Write an adapter for another tool, and compare it with the original; yields what is done next, for who waits.

    Raises
    ------
    InputError
        when the target cannot take the adapter, or something lies at the destination.
    NotTheSame
        when the export is not what the adapter is; nothing is left of it.
    """
    target = request.target
    yield "reading the adapter"
    adapter = read_adapter(found)
    base, notes = _look_before(adapter, request)
    place = _place(adapter, request)
    check_destination(place, request.force)
    prompts, checked_on = (request.prompts, "given prompts") if request.prompts else held_out_prompts(found)
    yield "listening to the student, with its adapter and without"
    original, plain = hear_original(adapter, prompts)
    if target not in ("peft", "gguf"):
        del plain
        release_memory()
    with new_folder(place, request.force) as folder:
        yield "writing"
        if target == "mlx":
            _mlx.write(adapter, folder)
        elif target == "peft":
            _peft.write(adapter, folder, str(base))
        elif target == "gguf":
            _gguf.write(adapter, folder, base)
        else:
            _fused.write(adapter, folder, request.keep_bits)
        yield "comparing it with the original"
        if target == "mlx":
            measured = _mlx.measure(adapter, folder, original)
        elif target == "peft":
            measured = _peft.measure(folder, original, plain.module)
        elif target == "gguf":
            measured = _gguf.measure(adapter, folder, original, plain.module)
        else:
            measured = _fused.measure(folder, original)
        notes += _judge(measured, request)
        if target == "ollama":
            notes += _ollama.write(
                folder, open_tokenizer(adapter.student, "student"), adapter.config.get("architectures"), request.system
            )
        record = _record(adapter, target, base, measured, checked_on, notes)
        write_json(folder / RECORD, record)
        files = {path.name: path.stat().st_size for path in sorted(folder.iterdir()) if not path.name.startswith(".")}
    return Exported(
        target,
        place,
        found.folder,
        found.domain,
        adapter.student.model,
        adapter.student_folder,
        base,
        files,
        measured,
        checked_on,
        notes,
    )


def _look_before(adapter: Adapter, request: Request) -> tuple[str | None, tuple[str, ...]]:
    """Refuse what the target cannot take; returns the student's id for other tools where they need it, and notes."""
    target = request.target
    if request.keep_bits and target not in _FUSED:
        raise InputError(f"--quantize: given with --to {target}, which has no weights of the student. Leave it out.")
    if request.base_model is not None and target not in ("peft", "gguf"):
        raise InputError(f"--base-model: given with --to {target}, which names no other model. Leave it out.")
    if target == "mlx":
        return None, ()
    if target in _FUSED:
        if target == "ollama" and request.keep_bits:
            raise CannotExport(
                target,
                "--quantize is given, and Ollama does not read the bits of MLX",
                "plain weights",
                "Leave it out; `ollama create --quantize q4_K_M` quantises.",
            )
        _fused.check(adapter, target, request.keep_bits)
        return None, ()
    if target == "peft":
        _peft.check(adapter)
        base, source = base_model(adapter, request.base_model)
    else:
        _gguf.check(adapter)
        known = request.base_model is not None or not adapter.is_quantised or card_base(adapter.student_folder)
        base, source = base_model(adapter, request.base_model) if known else (None, "")
    if not adapter.is_quantised:
        if target == "peft" and source == LOCAL:
            return base, (
                f"adapter_config.json names this machine's {base}. Give --base-model ID before you share it.",
            )
        return base, ()
    named = f"Apply it to {base} ({source})." if base is not None else "Apply it to the student before quantisation."
    return base, (
        f"The adapter was trained on a quantised student. {named} There its effect is near, not equal: the base "
        "itself differs.",
    )


def _place(adapter: Adapter, request: Request) -> Path:
    if request.target == "lmstudio":
        return _lmstudio.place(adapter, request.output)
    if request.output is not None:
        return destination(request.output)
    return Path("exports") / f"{adapter.name}-{request.target}"


def _judge(measured: Measured, request: Request) -> tuple[str, ...]:
    """What there is to say of the comparison; NotTheSame for an export that is not to be kept."""
    is_fused = request.target in _FUSED
    if not measured.holds:
        if not (is_fused and request.force):
            advice = "Please report it."
            if is_fused:
                advice = "Leave out --quantize." if request.keep_bits else "Give --force to keep it all the same."
            raise NotTheSame(request.target, measured, advice)
        return ("The fused model lost more of the adapter than is sound; it was kept because of --force.",)
    if not measured.is_telling:
        return ("The adapter changes next to nothing here, so the comparison says little. Was it trained?",)
    return ()


def _record(
    adapter: Adapter, target: Target, base: str | None, measured: Measured, checked_on: str, notes: tuple[str, ...]
) -> dict[str, Any]:
    return {
        "target": target,
        "true_kd": __version__,
        "domain": adapter.found.domain,
        "student": adapter.student.model,
        "base_model": base,
        "adapter_sha256": digest_file(adapter.folder / WEIGHTS),
        "check": {**asdict(measured), "prompts": checked_on},
        "notes": list(notes),
    }
