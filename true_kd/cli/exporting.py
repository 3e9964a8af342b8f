"""`true-kd export`: takes an adapter out of true-kd, for the tools that its users have."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from true_kd.cli.completion import one_of
from true_kd.cli.flags import AsJson
from true_kd.cli.output import say_json, watched
from true_kd.cli.talking import Adapter, ConfigFile, Domain, Out, Student, System
from true_kd.errors import InputError
from true_kd.suggest import did_you_mean, in_bytes, printable, quote

if TYPE_CHECKING:
    from true_kd.exporting import Exported

TARGETS_SHOWN = ("mlx", "peft", "gguf", "fused", "ollama", "lmstudio")
"""Those of `true_kd.exporting`, whose import would cost the help its speed."""


def export(
    to: Annotated[
        str,
        typer.Option(
            "--to",
            metavar="|".join(TARGETS_SHOWN),
            help="What for.",
            show_default=False,
            autocompletion=one_of(TARGETS_SHOWN),
        ),
    ],
    domain: Domain = None,
    adapter: Adapter = None,
    out: Out = None,
    config: ConfigFile = None,
    student: Student = None,
    output: Annotated[
        str | None,
        typer.Option(
            "--output",
            "-o",
            metavar="FOLDER",
            help="Where to; for lmstudio the folder that holds models/. [default: exports/<domain>-<target>]",
            show_default=False,
        ),
    ] = None,
    base_model: Annotated[
        str | None,
        typer.Option(
            "--base-model",
            metavar="ID",
            help="The student before it was quantised, where its model card does not name it. peft and gguf only.",
            show_default=False,
        ),
    ] = None,
    quantize: Annotated[
        bool, typer.Option("--quantize", help="Quantise a fused model as the student was. Costs most small adapters.")
    ] = False,
    prompts_file: Annotated[
        Path | None,
        typer.Option(
            "--prompts-file",
            metavar="FILE",
            help="Prompts to check it on, .txt or .jsonl, instead of the domain's held-out ones.",
            show_default=False,
        ),
    ] = None,
    system: System = None,
    force: Annotated[
        bool,
        typer.Option("--force", help="Replace an earlier export; keep a fused model that lost too much."),
    ] = False,
    as_json: AsJson = False,
) -> int:
    """Export an adapter to PEFT, llama.cpp, Ollama and others.

    What is written is compared with the original by its logits, and not kept where it differs.

    mlx: for mlx-lm. peft: for transformers. gguf: a LoRA for llama.cpp. fused: a model of its own. ollama:
    that and a Modelfile. lmstudio: that where LM Studio looks.
    """
    from true_kd.cli.asking import Asking, read_prompts
    from true_kd.exporting import TARGETS, Request
    from true_kd.exporting import export as export_in_stages

    target = next((name for name in TARGETS if name == to), None)
    if target is None:
        raise InputError(
            f"--to {quote(to)}: unknown{did_you_mean(to, TARGETS)}, expected one of {', '.join(TARGETS)}. Change it."
        )
    asking = Asking.of(domain=domain, adapter=adapter, out=out, config=config, student=student, system=system)
    prompts = None if prompts_file is None else read_prompts(prompts_file)
    request = Request(target, output, force, quantize, base_model, prompts, asking.system)
    done = watched(export_in_stages(asking.found, request))
    if as_json:
        say_json(_facts(done))
    else:
        _show(done)
    return 0


def _facts(done: Exported) -> dict[str, Any]:
    """What was exported, for programs."""
    measured = done.measured
    return {
        "target": done.target,
        "folder": str(done.folder),
        "adapter": str(done.adapter),
        "domain": done.domain,
        "student": done.student,
        "base_model": done.base_model,
        "files": done.files,
        "check": {**vars(measured), "prompts": done.checked_on, "holds": measured.holds},
        "notes": list(done.notes),
        "use": _use(done),
    }


def _show(done: Exported) -> None:
    measured = done.measured
    unit = " nats" if measured.what.startswith("KL") else ""
    lines = [
        f"{done.folder}: {len(done.files)} files, {in_bytes(sum(done.files.values()))}",
        f"{measured.what}: {measured.difference:.2g}{unit}, at most {measured.limit:.2g} allowed",
        f"effect of the adapter by the same measure: {measured.effect:.2g}{unit}",
        f"measured at {measured.tokens} tokens, {done.checked_on}",
        *done.notes,
        f"use: {_use(done)}",
    ]
    for line in lines:
        typer.echo(printable(line))


def _use(done: Exported) -> str:
    """How the tool that it is for takes it."""
    folder, name = shlex.quote(str(done.folder)), done.folder.name
    match done.target:
        case "mlx":
            is_embedded = done.student.startswith("pocket:")
            student = shlex.quote(str(done.student_folder) if is_embedded else done.student)
            return f"mlx_lm.generate --model {student} --adapter-path {folder} --prompt ..."
        case "peft":
            base = f"AutoModelForCausalLM.from_pretrained({done.base_model!r})"
            return f"PeftModel.from_pretrained({base}, {str(done.folder)!r})"
        case "gguf":
            [file] = [file for file in done.files if file.endswith(".gguf")]
            return f"llama-cli -m STUDENT.gguf --lora {shlex.quote(str(done.folder / file))}"
        case "fused":
            return f"mlx_lm.generate --model {folder} --prompt ..."
        case "ollama":
            return f"cd {folder} && ollama create {shlex.quote(done.domain or name)}"
        case _:
            return f"load {done.folder.parent.name}/{name} in LM Studio"
