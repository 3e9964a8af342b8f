"""Takes an adapter out of true-kd: for mlx-lm, PEFT and llama.cpp, or fused for Ollama, LM Studio and all else.

Every export is compared with the original by logits before it takes its place, and refused where it cannot be right.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

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
from true_kd.exporting.exporter import Exporter, Request, Target
from true_kd.exporting.folders import RECORD, check_destination, destination, new_folder
from true_kd.exporting.reading import Adapter, CannotExport, base_model, read_adapter
from true_kd.files import digest_file, write_json
from true_kd.finding import FoundAdapter
from true_kd.models import card_base, release_memory

__all__ = ["RECORD", "TARGETS", "CannotExport", "Exported", "Measured", "NotTheSame", "Request", "Target", "export"]

TARGETS: tuple[Target, ...] = get_args(Target)
_EXPORTERS: Mapping[Target, Exporter] = {
    "mlx": _mlx.EXPORTER,
    "peft": _peft.EXPORTER,
    "gguf": _gguf.EXPORTER,
    "fused": _fused.EXPORTER,
    "ollama": _ollama.EXPORTER,
    "lmstudio": _lmstudio.EXPORTER,
}


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
    exporter = _EXPORTERS[request.target]
    yield "reading the adapter"
    adapter = read_adapter(found)
    _check_flags(exporter, request)
    exporter.check(adapter, request)
    base, notes = _base(exporter, adapter, request)
    place = _place(adapter, request)
    check_destination(place, request.force)
    prompts, checked_on = (request.prompts, "given prompts") if request.prompts else held_out_prompts(found)
    yield "listening to the student, with its adapter and without"
    original, student = hear_original(adapter, prompts)
    plain = student.module if exporter.on_plain else None
    del student
    release_memory()
    with new_folder(place, request.force) as folder:
        yield "writing"
        notes += exporter.write(adapter, folder, request, base)
        yield "comparing it with the original"
        measured = exporter.measure(adapter, folder, original, plain)
        notes += _judge(measured, exporter, request)
        write_json(folder / RECORD, _record(adapter, request, base, measured, checked_on, notes))
        files = {path.name: path.stat().st_size for path in sorted(folder.iterdir()) if not path.name.startswith(".")}
    return Exported(
        request.target,
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


def _check_flags(exporter: Exporter, request: Request) -> None:
    """Refuse flags that mean nothing for the target."""
    if request.keep_bits and not exporter.is_model:
        raise InputError(
            f"--quantize: given with --to {request.target}, which has no weights of the student. Leave it out."
        )
    if request.base_model is not None and exporter.base == "none":
        raise InputError(f"--base-model: given with --to {request.target}, which names no other model. Leave it out.")


def _base(exporter: Exporter, adapter: Adapter, request: Request) -> tuple[str | None, tuple[str, ...]]:
    """The unquantised student's id, where the target's tool opens that by itself; and what there is to say of it."""
    if exporter.base == "none":
        return None, ()
    is_known = request.base_model is not None or not adapter.is_quantised or card_base(adapter.student_folder)
    if exporter.base == "if known" and not is_known:
        base, where = None, "the student before quantisation"
    else:
        base, source = base_model(adapter, request.base_model)
        where = f"{base} ({source})"
    if not adapter.is_quantised:
        return base, ()
    return base, (
        f"The adapter was trained on a quantised student. Apply it to {where}: there its effect is near, not equal, as "
        "the base differs.",
    )


def _place(adapter: Adapter, request: Request) -> Path:
    if request.target == "lmstudio":
        return _lmstudio.place(adapter, request.output)
    if request.output is not None:
        return destination(request.output)
    return Path("exports") / f"{adapter.name}-{request.target}"


def _judge(measured: Measured, exporter: Exporter, request: Request) -> tuple[str, ...]:
    """What there is to say of the comparison; NotTheSame for an export that is not to be kept."""
    if not measured.holds:
        if not (exporter.is_model and request.force):
            advice = "Please report it."
            if exporter.is_model:
                advice = "Leave out --quantize." if request.keep_bits else "Give --force to keep it all the same."
            raise NotTheSame(request.target, measured, advice)
        return ("The fused model lost more of the adapter than is sound; it was kept because of --force.",)
    if not measured.is_telling:
        return ("The adapter changes next to nothing here, so the comparison says little. Was it trained?",)
    return ()


def _record(
    adapter: Adapter, request: Request, base: str | None, measured: Measured, checked_on: str, notes: tuple[str, ...]
) -> dict[str, Any]:
    return {
        "target": request.target,
        "true_kd": __version__,
        "domain": adapter.found.domain,
        "student": adapter.student.model,
        "base_model": base,
        "adapter_sha256": digest_file(adapter.folder / WEIGHTS),
        "check": {**asdict(measured), "prompts": checked_on},
        "notes": list(notes),
    }
