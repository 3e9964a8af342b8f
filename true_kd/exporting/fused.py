"""A model of its own, into whose weights the adapter was added.

Unpacked by default: an adapter's change of a weight is far below a step of 4 bits, so quantising again loses most of
it. What was lost is measured on the folder as it was written, and one that lost too much is not kept.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import mlx.nn as nn

from true_kd.adapters import load_adapter
from true_kd.exporting.checking import Measured, Original, open_in_float32
from true_kd.exporting.exporter import Exporter, Request
from true_kd.exporting.reading import Adapter, CannotExport
from true_kd.models import TEXT_FILES, ModelOptions, fuse_layers, open_stored, release_memory, save_model

_OF_THE_WEIGHTS = ("config.json", "hf_quant_config.json")
_TEMPLATES = "additional_chat_templates"


def check(adapter: Adapter, request: Request) -> None:
    """Raise `CannotExport` where there are no bits to keep."""
    if request.keep_bits and not adapter.is_quantised:
        raise CannotExport(
            request.target,
            "--quantize is given, and the student is not quantised",
            "a quantised student",
            "Leave it out.",
        )


def write(adapter: Adapter, folder: Path, request: Request, base: str | None) -> tuple[str, ...]:
    """Write weights and config, and the student's tokenizer and chat template as they are."""
    module, config = open_stored(adapter.student, "student")
    load_adapter(module, adapter.folder)
    module, config = fuse_layers(module, config, request.keep_bits)
    save_model(folder, module, config)
    del module
    release_memory()
    for name in TEXT_FILES:
        if name not in _OF_THE_WEIGHTS and (adapter.student_folder / name).is_file():
            shutil.copyfile(adapter.student_folder / name, folder / name)
    templates = sorted((adapter.student_folder / _TEMPLATES).glob("*.jinja"))
    for path in templates:
        (folder / _TEMPLATES).mkdir(exist_ok=True)
        shutil.copyfile(path, folder / _TEMPLATES / path.name)
    return ()


def measure(adapter: Adapter, folder: Path, original: Original, plain: nn.Module | None) -> Measured:
    """Open the folder as any model, and take its KL from the original."""
    model = open_in_float32(ModelOptions(model=str(folder.resolve())))
    return original.compare_kl(original.read(model.module))


EXPORTER = Exporter(check, write, measure, is_model=True)
