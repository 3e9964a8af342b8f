"""What is uploaded of an adapter: a few files by name, made anew without what is this machine's or somebody's own.

The weights go as they are. The adapter's config and its record are written again with the names by which others know
the models, bear digests of their own, and load as before; prompts, replies and paths are not in them.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safetensors import safe_open

from true_kd import adapters
from true_kd.errors import InputError, TrueKDError
from true_kd.files import write_atomic, write_json
from true_kd.finding import FoundAdapter, is_hub_id, is_public, public_name, system_message
from true_kd.jobs import read_domain
from true_kd.pocket import PREFIX
from true_kd.pocket import locate as locate_pocket
from true_kd.publishing.card import Lineage, Replies, known_files, write_card
from true_kd.publishing.licences import find_licence, warnings
from true_kd.report import build_report, save_report
from true_kd.reporting import KDResult, read_result, write_result
from true_kd.suggest import quote, redact


@dataclass(frozen=True)
class Wishes:
    """What whoever publishes says of it."""

    repo: str
    base_model: str | None = None
    """The hub id of the student, where the run had it under another name."""
    licence: str | None = None
    with_report: bool = False


@dataclass(frozen=True)
class Parcel:
    """Files ready to be uploaded."""

    folder: Path
    names: tuple[str, ...]
    """All that may be uploaded of the folder."""
    card: str
    warnings: tuple[str, ...]

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes by name."""
        return {name: (self.folder / name).stat().st_size for name in self.names}


@contextlib.contextmanager
def packed(found: FoundAdapter, wishes: Wishes) -> Iterator[Parcel]:
    """The files of an adapter as they are uploaded, in a folder that is gone afterwards.

    Raises
    ------
    InputError
        when the student has no name that others know, or a file would tell of this machine or of a secret.
    CacheError
        when the adapter is not what was written.
    """
    adapters.require_whole(found.folder)
    result = read_result(found.folder)
    lineage = _trace(found, wishes, result)
    with tempfile.TemporaryDirectory(prefix="true-kd-") as name:
        folder = Path(name)
        # A copy, so that what is looked at is what goes, whatever a run does meanwhile.
        shutil.copyfile(found.folder / adapters.WEIGHTS, folder / adapters.WEIGHTS)
        write_json(folder / adapters.CONFIG, _config(found, lineage))
        adapters.require_whole(folder)
        told = list(warnings(lineage.teacher_licence, lineage.student_licence, wishes.repo, wishes.licence))
        if result is not None:
            _write_record(folder, result, lineage)
        elif (found.folder / adapters.METRICS).exists():
            told.append(
                f"{adapters.METRICS} is not of these weights, and stays here: the card says nothing was measured."
            )
        if wishes.with_report:
            _write_page(folder, result, lineage)
            told.append(f"{adapters.REPORT} shows held-out prompts and replies: they go with it.")
        card = write_card(lineage)
        write_atomic(folder / "README.md", lambda path: path.write_text(card, encoding="utf-8", newline="\n"))
        names = tuple(file for file in known_files(wishes.with_report) if (folder / file).is_file())
        _look_through(folder, found, result if wishes.with_report else None)
        yield Parcel(folder, names, card, tuple(told))


def _trace(found: FoundAdapter, wishes: Wishes, result: KDResult | None) -> Lineage:
    config = found.config
    student = config.student.model
    base = student if wishes.base_model is None else wishes.base_model
    # What is named here is meant as an id, whatever lies under that name on this machine.
    if not is_hub_id(base) or (wishes.base_model is None and not is_public(base)):
        what = "embedded in true-kd" if base.startswith(PREFIX) else "not an id of the hub"
        flag = "--base-model" if wishes.base_model is not None else "student"
        raise InputError(
            f"{flag} {quote(base)}: {what}, expected that under which others find it. Give --base-model OWNER/NAME."
        )
    teacher = _teacher(found, result)
    run = config if found.domain is not None else None
    return Lineage(
        repo=wishes.repo,
        base_model=base,
        student=public_name(student) if wishes.base_model is None or is_public(student) else base,
        teacher=None if teacher is None else public_name(teacher),
        teacher_licence=find_licence(teacher or "", find_folder_of(teacher, config.teacher.revision)),
        student_licence=find_licence(
            student if is_public(student) else base, find_folder_of(student, config.student.revision)
        ),
        licence=wishes.licence,
        domain=found.domain,
        config=run,
        adapter=adapters.read_json(found.folder / adapters.CONFIG),
        result=result,
        replies=None if run is None else _replies(found, result),
        system=system_message(found),
    )


def _teacher(found: FoundAdapter, result: KDResult | None) -> str | None:
    """What the teacher is called; of a control or an adapter of another tool there is none."""
    if result is not None:
        return result.teacher
    if found.domain is None or found.config.teacher.model.startswith("cache:"):
        return None
    return found.config.teacher.model


def find_folder_of(model: str | None, revision: str | None) -> Path | None:
    """Where a model's card would lie on this machine; nothing is downloaded."""
    from huggingface_hub import try_to_load_from_cache

    if model is None:
        return None
    if model.startswith(PREFIX) or not is_public(model):
        folder = locate_pocket(model, "model")
        return folder if folder.is_dir() else None
    for name in ("README.md", "LICENSE", "config.json"):
        path = try_to_load_from_cache(model, name, revision=revision)
        if isinstance(path, str):
            return Path(path).parent
    return None


def _replies(found: FoundAdapter, result: KDResult | None) -> Replies | None:
    """Who wrote the replies, where the prompts are still those of the run."""
    if found.domain is None or result is None:
        return None
    try:
        train, valid = read_domain(found.config.prompts_folder, found.domain)
    except TrueKDError:
        return None
    data = result.data
    if len(train) + len(valid) != data.train_examples + data.valid_examples + data.dropped:
        return None
    brought = sum(prompt.completion is not None or prompt.text is not None for prompt in train)
    return Replies(len(train), brought)


_MLX_LM = ("fine_tune_type", "num_layers", "lora_parameters", "model")
"""What mlx-lm reads of an adapter's config; its own trainer writes all of its command line there, paths among it."""


def _config(found: FoundAdapter, lineage: Lineage) -> dict[str, Any]:
    config = {name: lineage.adapter[name] for name in _MLX_LM if name in lineage.adapter}
    config["model"] = lineage.base_model
    ours = lineage.adapter.get(adapters.OURS)
    if not isinstance(ours, Mapping):
        return config
    return adapters.signed(config, {**ours, "teacher": lineage.teacher})


def _write_record(folder: Path, result: KDResult, lineage: Lineage) -> None:
    ours = lineage.adapter.get(adapters.OURS)
    digest = ours.get("run_digest", "") if isinstance(ours, Mapping) else ""
    write_result(folder, _public(result, lineage, with_samples=False), str(digest))


def _public(result: KDResult, lineage: Lineage, with_samples: bool) -> KDResult:
    """A result under the names that others know; without `with_samples` also without prompts and replies."""
    proof, fidelity = result.proof, result.fidelity
    if proof is not None:
        headroom = proof.headroom if with_samples else replace(proof.headroom, missed=())
        samples = tuple(replace(sample, where=_line(sample.where)) for sample in proof.samples) if with_samples else ()
        prompts = replace(proof.prompts, where=tuple(map(_line, proof.prompts.where)))
        proof = replace(proof, headroom=headroom, samples=samples, prompts=prompts)
    if fidelity is not None:
        worst = tuple(replace(position, where=_line(position.where)) for position in fidelity.worst)
        fidelity = replace(fidelity, worst=worst)
    return replace(
        result,
        teacher=lineage.teacher or "",
        student=lineage.base_model,
        adapter_path=f"hf:{lineage.repo}",
        proof=proof,
        fidelity=fidelity,
    )


def _line(where: str) -> str:
    """The line of a prompt without its folder: "valid.jsonl:12"."""
    return re.split(r"[/\\]", where)[-1]


def _write_page(folder: Path, result: KDResult | None, lineage: Lineage) -> None:
    if result is None:
        raise InputError(
            f"--with-report: nothing was measured of these weights, expected a finished domain. Leave it out, or "
            f"run `true-kd distill --domain {lineage.domain or 'NAME'}`."
        )
    save_report(folder / adapters.REPORT, build_report([_public(result, lineage, with_samples=True)], {}))


def _look_through(folder: Path, found: FoundAdapter, shown: KDResult | None) -> None:
    """The last look: no text names a place on this machine, or holds what looks like a secret."""
    config = found.config
    places = {found.folder, config.out_folder, config.prompts_folder, Path.cwd(), Path.home(), folder}
    models = {config.student.model, config.teacher.model, *filter(None, (config.teacher.adapter,))}
    places |= {Path(model).expanduser() for model in models if not is_public(model)}
    # A relative name says nothing of a machine; a short one, "/" or "/root", would be found in any text.
    paths = {
        str(path) for place in places for path in (place, place.resolve()) if len(path.parts) > 2 and path.is_absolute()
    }
    names = [name for name in ("README.md", adapters.CONFIG, adapters.METRICS) if (folder / name).is_file()]
    texts = {name: (folder / name).read_text(encoding="utf-8") for name in names}
    with safe_open(folder / adapters.WEIGHTS, framework="np") as file:
        texts[adapters.WEIGHTS] = json.dumps(file.metadata() or {}, ensure_ascii=False)
    for name, text in texts.items():
        local = sorted(path for path in paths if path in text)
        if local:
            raise InputError(f"{name}: would tell of {quote(local[0])}, expected nothing of this machine. Rename it.")
        if redact(text) != text:
            raise InputError(f"{name}: holds what looks like a secret, expected none. Look at the names and settings.")
    if shown is not None:
        samples = () if shown.proof is None else shown.proof.samples
        text = "\n".join(f"{sample.prompt}\n{''.join(sample.pieces)}" for sample in samples)
        if redact(text) != text:
            raise InputError(
                "--with-report: a held-out prompt or reply holds what looks like a secret, expected none. Leave it out."
            )
