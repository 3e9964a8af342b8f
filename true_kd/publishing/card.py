"""The model card of an adapter: where it comes from, what was measured, how to load it, under what terms.

All of it is made from the records of the run. Names that people chose reach it as plain text, never as markup.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from true_kd import adapters
from true_kd.config import RunConfig
from true_kd.evaluation import Estimate
from true_kd.finding import is_hub_id
from true_kd.proof import ModelScores, Proof
from true_kd.publishing.licences import FoundLicence, duties, notices
from true_kd.report.formats import number, points, share
from true_kd.reporting import KDResult
from true_kd.suggest import printable, redact

TAGS = ("mlx", "lora", "knowledge-distillation", "true-kd")


@dataclass(frozen=True)
class Replies:
    """Who wrote the replies that the adapter was trained on, as far as the prompts that are here tell."""

    prompts: int
    """For training, before any were left out."""
    brought: int
    """Those of them whose reply the data brought."""


@dataclass(frozen=True)
class Lineage:
    """What an adapter was made from, under the names by which others know it."""

    repo: str
    base_model: str
    """The hub id that the adapter is loaded on."""
    student: str
    """As the run had it."""
    teacher: str | None
    """None where nothing says which it was."""
    teacher_licence: FoundLicence
    student_licence: FoundLicence
    licence: str | None
    """Of the adapter, as whoever publishes it says; None for that of the student."""
    domain: str | None
    """None for an adapter of another tool."""
    config: RunConfig | None
    """Of the run."""
    adapter: Mapping[str, Any]
    """The adapter's config."""
    result: KDResult | None
    """What was measured of exactly these weights."""
    replies: Replies | None
    system: str | None
    """The system message that it was trained under."""

    @property
    def is_distilled(self) -> bool:
        """Whether it learned from a teacher's distribution: a control did not."""
        return self.config is not None and self.config.losses.alpha != 0


def write_card(of: Lineage) -> str:
    """The text of README.md."""
    from huggingface_hub import ModelCard, ModelCardData

    terms = _own_terms(of)
    data = ModelCardData(
        base_model=of.base_model,
        library_name="mlx",
        pipeline_tag="text-generation",
        tags=[tag for tag in TAGS if of.is_distilled or tag != "knowledge-distillation"],
        license=terms.get("license"),
        license_name=terms.get("license_name"),
        license_link=terms.get("license_link"),
        base_model_relation="adapter",
    )
    parts = [
        f"# {_text(of.repo.rpartition('/')[2])}",
        _opening(of),
        *(f"> {line}" for line in [" ".join(notices(of.teacher_licence, of.student_licence))] if line),
        "## Use",
        _use(of),
        "## Measured",
        _measured(of),
        "## Lineage",
        _lineage(of),
        *(["## Settings", _settings(of)] if of.config is not None else []),
        "## Terms",
        _terms(of),
        "## Limits",
        _limits(of),
    ]
    body = "\n\n".join(parts)
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}\n"))


def _own_terms(of: Lineage) -> dict[str, str]:
    """The licence in the front matter: as given, or that of the student, from whose weights the adapter is made."""
    if of.licence is not None:
        return {"license": of.licence}
    found = of.student_licence
    if found.id is None:
        return {}
    if found.terms is not None and found.terms.is_hub_id:
        return {"license": found.id}
    link = found.link or (found.terms.link if found.terms else "")
    return {"license": "other", "license_name": found.id, **({"license_link": link} if link else {})}


def _opening(of: Lineage) -> str:
    how = "distilled from" if of.is_distilled else "fine-tuned on the text of"
    teacher = "" if of.teacher is None else f", {how} {_model(of.teacher)}"
    domain = "" if of.domain is None else f" for the domain *{_text(of.domain)}*"
    tool = "" if of.config is None else ", made with true-kd"
    return f"A LoRA adapter for {_model(of.base_model)}{teacher}{domain}{tool}."


def _use(of: Lineage) -> str:
    folder = of.repo.rpartition("/")[2]
    lines = [
        "```shell",
        "pip install mlx-lm",
        f"hf download {of.repo} --local-dir {folder}",
        f'mlx_lm.generate --model {of.base_model} --adapter-path {folder} --prompt "Hello"',
        f"mlx_lm.server --model {of.base_model} --adapter-path {folder}",
        "```",
        "",
        "```python",
        "from huggingface_hub import snapshot_download",
        "from mlx_lm import generate, load",
        "",
        f'model, tokenizer = load("{of.base_model}", adapter_path=snapshot_download("{of.repo}"))',
        'messages = [{"role": "user", "content": "Hello"}]',
        "prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True)",
        "print(generate(model, tokenizer, prompt))",
        "```",
    ]
    if of.system is not None:
        lines += [
            "",
            f"It was trained under a system message of {len(of.system)} characters, which is not published here; "
            "without it the replies may differ from what was measured.",
        ]
    return "\n".join(lines)


def _measured(of: Lineage) -> str:
    if of.result is None or of.result.proof is None:
        return "Nothing was measured of these weights."
    proof = of.result.proof
    lines = [_text(proof.verdict.sentence), "", *_table(proof), "", _beside(proof)]
    return "\n".join(lines)


def _table(proof: Proof) -> list[str]:
    models = {
        "student": proof.student,
        "this adapter": proof.adapted,
        "SFT control": proof.control,
        "teacher": proof.teacher,
    }
    shown = {name: model for name, model in models.items() if model is not None}
    rows: dict[str, Callable[[ModelScores], object]] = {
        "KL to the teacher, nats per token": lambda model: number(model.kl),
        "perplexity on the teacher's text": lambda model: number(model.perplexity),
        "top-1 agreement with the teacher": lambda model: share(model.top1_agreement),
        "top-5 agreement": lambda model: share(model.top5_agreement),
        "tasks answered right": lambda model: share(model.exact_match),
    }
    if proof.tasks == 0:
        del rows["tasks answered right"]
    closed = {
        "this adapter": proof.gap_closed.kl,
        "SFT control": proof.control_gap_closed and proof.control_gap_closed.kl,
    }
    return [
        f"| | {' | '.join(shown)} |",
        f"|---|{'---|' * len(shown)}",
        *(f"| {name} | {' | '.join(str(cell(model)) for model in shown.values())} |" for name, cell in rows.items()),
        f"| gap closed (KL) | {' | '.join(_closed(closed.get(name)) for name in shown)} |",
    ]


def _closed(estimate: Estimate | None) -> str:
    return "" if estimate is None else str(share(estimate))


def _beside(proof: Proof) -> str:
    tasks = f", {proof.tasks} of them with an answer that a program checks" if proof.tasks else ""
    parts = [
        f"On {proof.examples} held-out prompts of the same domain ({proof.tokens:,} response tokens{tasks}); in "
        "brackets 95 % intervals over the prompts."
    ]
    if proof.control is not None:
        parts.append(
            "The SFT control is the same student trained as long on the same text of the teacher, without its "
            "distribution."
        )
        if proof.against_control is not None:
            gain = points(proof.against_control.top1_agreement.by)
            parts.append(f"Top-1 agreement beyond the control's: {gain}.")
    return " ".join(parts)


def _lineage(of: Lineage) -> str:
    lines = [f"- Student: {_model(of.student)}."]
    if of.student != of.base_model:
        lines = [f"- Student: {_model(of.student)}, published as {_model(of.base_model)}."]
    lines.append(f"- Teacher: {'not recorded' if of.teacher is None else _model(of.teacher)}.")
    if of.config is not None and of.config.teacher.adapter is not None:
        lines.append("- The teacher bore an adapter of its own, which is not published here.")
    if of.result is not None:
        data = of.result.data
        lines.append(
            f"- Data: {data.train_examples:,} prompts for training and {data.valid_examples:,} held out; "
            f"{data.train_response_tokens:,} response tokens to train on. The teacher's distribution was captured at "
            f"{data.cache_tokens:,} response tokens."
        )
    lines.append(f"- Replies: {_who_wrote(of.replies)}")
    if of.result is not None:
        made = {name: version for name, version in of.result.versions.items() if name in _TOOLS}
        told = ", ".join(f"{name} {_text(version)}" for name, version in made.items())
        lines.append(
            f"- Made with {told or 'versions that were not recorded'}; finished {_text(of.result.finished_at)}."
        )
    return "\n".join(lines)


_TOOLS = ("true-kd", "mlx-lm", "mlx", "transformers")


def _who_wrote(replies: Replies | None) -> str:
    if replies is None:
        return "who wrote them was not recorded."
    if replies.brought == 0:
        return "the teacher wrote all of them."
    who = "all of them" if replies.brought == replies.prompts else f"{replies.brought:,} of {replies.prompts:,}"
    others = "" if replies.brought == replies.prompts else ", the teacher wrote the others"
    return (
        f"the data brought {who}, by whoever wrote them{others}. The terms of their author were not looked at: those "
        "of some services forbid to train models on what they write."
    )


def _settings(of: Lineage) -> str:
    config, lora = of.config, of.adapter.get("lora_parameters", {})
    assert config is not None, "without it there is no such section"
    rows = {
        "divergence": config.losses.divergence,
        "temperature": config.losses.temperature,
        "alpha (share of KD)": config.losses.alpha,
        "steps": config.training.iters,
        "kept weights of step": of.result.best_iteration if of.result is not None else None,
        "learning rate": config.training.learning_rate,
        "batch size": config.training.batch_size,
        "longest sequence": config.training.max_seq_length,
        "seed": config.seed,
        "adapter": of.adapter.get("fine_tune_type"),
        "rank": lora.get("rank"),
        "scale (lora_alpha / rank)": lora.get("scale"),
        "layers": "all" if of.adapter.get("num_layers") == -1 else of.adapter.get("num_layers"),
        "parameters": f"{of.result.trainable_parameters:,}" if of.result is not None else None,
    }
    shown = [f"| {name} | {_text(_value(value))} |" for name, value in rows.items() if value is not None]
    return "\n".join(["| | |", "|---|---|", *shown])


def _value(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _terms(of: Lineage) -> str:
    own = of.licence or "as the student's"
    lines = [
        f"- This adapter: {_text(own)}.",
        f"- Student: {_text(of.student_licence.shown)}.",
        f"- Teacher: {_text(of.teacher_licence.shown)}.",
        *(f"- {line}" for line in duties(of.teacher_licence, of.student_licence)),
    ]
    if of.teacher_licence.terms is not None and of.teacher_licence.terms.restricts:
        lines.append(
            "- **The teacher's licence restricts distillation: read it before you use or share this adapter.**"
        )
    elif of.teacher_licence.terms is None:
        lines.append("- Whether the teacher's licence restricts distillation is not known.")
    return "\n".join([*lines, "", "This is not legal advice."])


def _limits(of: Lineage) -> str:
    lines = [
        f"- It fits the weights of {_model(of.base_model)}; on others, other quantisations among them, nothing was "
        "measured.",
        "- What the teacher says wrongly, the adapter learns as well.",
        "- Fusing it into a quantised base rounds most of a small adapter away: keep it beside, or fuse dequantised.",
    ]
    if of.domain is not None:
        lines.insert(0, "- It was trained and measured on one domain; what it does elsewhere was not measured.")
    return "\n".join(lines)


def _model(name: str) -> str:
    """A model by name, as a link where the hub has it."""
    if is_hub_id(name):
        return f"[{name}](https://huggingface.co/{name})"
    return f"`{_text(name).replace('`', '')}`"


def _text(words: str) -> str:
    """Words as Markdown shows them as they stand, on one line."""
    line = printable(redact(" ".join(str(words).split())))
    return re.sub(r"([\\`*_\[\]<>|#])", r"\\\1", line)


def known_files(with_report: bool) -> Sequence[str]:
    """The names of all that may be uploaded."""
    return (
        "README.md",
        adapters.WEIGHTS,
        adapters.CONFIG,
        adapters.METRICS,
        *([adapters.REPORT] if with_report else []),
    )
