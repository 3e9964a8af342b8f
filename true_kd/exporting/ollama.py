"""The Modelfile that `ollama create` reads, beside a fused model.

Not an adapter: Ollama applied mlx-lm's with the wrong scale, of few families, and releases of late 2026 refuse
`ADAPTER`. Its template language is another than the hub's, so the chat template is taken apart into what stands around
each message, and written only where that gives, on conversations of several shapes, the very text of the original.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from true_kd.exporting import fused
from true_kd.exporting.exporter import Exporter, Request
from true_kd.exporting.reading import Adapter, CannotExport
from true_kd.models import ModelTokenizer, TemplateRefusal, TemplateStopped, is_coded, open_tokenizer, template_text

MODELFILE = "Modelfile"
IMPORTED = frozenset(
    f"{family}ForCausalLM" for family in ("Llama", "Mixtral", "Gemma", "Gemma2", "Gemma3", "Phi3", "Qwen2", "Cohere")
)
"""Architectures that `ollama create` reads from a folder, by its sources of August 2026; not tried here."""
_ROLES = ("system", "user", "assistant")

Messages = Sequence[Mapping[str, str]]


@dataclass(frozen=True)
class Frame:
    """A chat template of the plain kind: text around each message by its role, and before the reply."""

    before: Mapping[str, str]
    after: Mapping[str, str]
    opening: str
    """What begins the reply."""
    default_system: str | None
    """The system message of conversations that bring none; None where there is none then."""

    def render(self, messages: Messages) -> str:
        """The text of a conversation, up to where the reply begins."""
        if self.default_system is not None and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": self.default_system}, *messages]
        turns = [self.before[turn["role"]] + turn["content"] + self.after[turn["role"]] for turn in messages]
        return "".join(turns) + self.opening

    def to_go(self) -> str:
        """The same in Ollama's template language."""
        parts = []
        for number, role in enumerate(_ROLES):
            test = "if" if number == 0 else "else if"
            parts.append(f'{{{{ {test} eq .Role "{role}" }}}}{self.before[role]}{{{{ .Content }}}}{self.after[role]}')
        return f"{{{{- range .Messages }}}}{''.join(parts)}{{{{ end }}}}{{{{ end }}}}{self.opening}"


def check(adapter: Adapter, request: Request) -> None:
    """Raise `CannotExport` for a model in the bits of MLX."""
    if request.keep_bits:
        raise CannotExport(
            "ollama",
            "--quantize is given, and Ollama does not read the bits of MLX",
            "plain weights",
            "Leave it out; `ollama create --quantize q4_K_M` quantises.",
        )


def write(adapter: Adapter, folder: Path, request: Request, base: str | None) -> tuple[str, ...]:
    """Write the fused model, and its Modelfile."""
    fused.write(adapter, folder, request, base)
    return write_modelfile(adapter, folder, request.system)


EXPORTER = Exporter(check, write, fused.measure, is_model=True)


def write_modelfile(adapter: Adapter, folder: Path, system: str | None) -> tuple[str, ...]:
    """Write the Modelfile; returns what a person should know of it.

    Parameters
    ----------
    system
        the system message that the domain was trained with.
    """
    lines, notes = ["FROM ."], []
    text = open_tokenizer(adapter.student, "student")
    architectures = adapter.config.get("architectures")
    named = architectures[0] if isinstance(architectures, list) and architectures else None
    if named not in IMPORTED:
        notes.append(
            f"Ollama may not read {named or 'a model without architectures in config.json'} from a folder: then make "
            "a GGUF of it with llama.cpp's convert_hf_to_gguf.py, and name that after FROM."
        )
    frame = frame_of(text)
    if frame is None:
        notes.append(
            "The chat template is not of the plain kind, so the Modelfile has no TEMPLATE: Ollama guesses one from the "
            "tokenizer's. Compare a reply with `true-kd generate`."
        )
    else:
        lines.append(f'TEMPLATE """{frame.to_go()}"""')
        system = frame.default_system if system is None else system
    for stop in _stops(text):
        lines.append(f"PARAMETER stop {json.dumps(stop, ensure_ascii=False)}")
    if system:
        if _fits(system):
            lines.append(f'SYSTEM """{system}"""')
        else:
            notes.append('The system message holds """, which a Modelfile cannot: it is left out. Give it by request.')
    (folder / MODELFILE).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return tuple(notes)


def _stops(text: ModelTokenizer) -> list[str]:
    """The text of each token that ends a reply."""
    spelled = [text.tokenizer.decode([index]) for index in text.stop_ids]
    return [stop for stop in spelled if stop.strip() and _fits(stop)]


def _fits(part: str) -> bool:
    return '"""' not in part


def frame_of(text: ModelTokenizer) -> Frame | None:
    """What a model's chat template puts around messages; None where that is not all that it does."""
    if not text.tokenizer.has_chat_template or is_coded(text.tokenizer):
        return None

    # Ollama's runner begins every text with this token of its own accord.
    begin = text.tokenizer.bos_token or ""

    def render(messages: Messages, opened: bool = True, date: str = _DATES[0]) -> str:
        written = template_text(text.tokenizer, messages, None, date, add_generation_prompt=opened)
        return written.removeprefix(begin)

    try:
        frame = _taken_apart(render)
        if frame is None:
            return None
        for messages in _conversations():
            if any(render(messages, date=date) != frame.render(messages) for date in _DATES):
                return None
    except (TemplateRefusal, TemplateStopped):
        return None
    parts = (*frame.before.values(), *frame.after.values(), frame.opening)
    return frame if all("{{" not in part and "}}" not in part and _fits(part) for part in parts) else None


_DATES = ("1 Feb 2003", "4 May 2006")
"""What a template prints of the date has no place in a Modelfile."""


_MARKS = {"system": "mark-of-the-system", "user": "mark-of-the-user", "assistant": "mark-of-the-assistant"}


def _taken_apart(render: Callable[..., str]) -> Frame | None:
    """The text around each message, found where known ones stand in a conversation."""
    turns = [{"role": role, "content": _MARKS[role]} for role in ("system", "user", "assistant", "user")]
    closed = render(turns, opened=False)
    opened = render(turns)
    if not opened.startswith(closed) or closed.count(_MARKS["user"]) != 2:
        return None
    pieces = closed.replace(_MARKS["user"], "\0").replace(_MARKS["system"], "\0").replace(_MARKS["assistant"], "\0")
    around = pieces.split("\0")
    if len(around) != 5:
        return None
    # What follows the last message ends each one; what stands between two of them is that, and what begins the next.
    end_of_user = around[4]
    if not around[2].startswith(end_of_user):
        return None
    alone = render([{"role": "user", "content": _MARKS["user"]}], opened=False)
    if not alone.endswith(_MARKS["user"] + end_of_user):
        return None
    head = alone.removesuffix(_MARKS["user"] + end_of_user)
    return _split_frame(around, end_of_user, opened.removeprefix(closed), head)


def _split_frame(around: Sequence[str], end_of_user: str, opening: str, head: str) -> Frame | None:
    """The frame of pieces between the messages system, user, assistant, user; `head` stands before a user alone."""
    before_system, system_to_user, user_to_assistant, assistant_to_user, _ = around
    before_assistant = user_to_assistant.removeprefix(end_of_user)
    # The part that both have that lead to a user's message is what begins it, or that and the end of what came before:
    # either way the parts joined are the same text.
    begin_user = _shared_end(system_to_user, assistant_to_user)
    if end_of_user and begin_user.startswith(end_of_user):
        begin_user = begin_user.removeprefix(end_of_user)
    if not begin_user or not system_to_user.endswith(begin_user):
        return None
    after_system = system_to_user.removesuffix(begin_user)
    after_assistant = assistant_to_user.removesuffix(begin_user)
    default = None
    if head != begin_user:
        if not (head.startswith(before_system) and head.endswith(after_system + begin_user)):
            return None
        default = head.removeprefix(before_system).removesuffix(after_system + begin_user)
        if not default.strip():
            # An empty SYSTEM is none for Ollama.
            return None
    return Frame(
        {"system": before_system, "user": begin_user, "assistant": before_assistant},
        {"system": after_system, "user": end_of_user, "assistant": after_assistant},
        opening,
        default,
    )


def _shared_end(one: str, other: str) -> str:
    count = 0
    while count < min(len(one), len(other)) and one[-1 - count] == other[-1 - count]:
        count += 1
    return one[len(one) - count :]


def _conversations() -> list[list[dict[str, str]]]:
    """Shapes of conversations on which a template and its frame must agree."""
    said = {"system": "Be brief.", "user": "Why is the sky dark?", "assistant": "There is no sun\nin it."}
    shapes = (
        ("user",),
        ("system", "user"),
        ("user", "assistant", "user"),
        ("system", "user", "assistant", "user"),
        ("system", "user", "assistant", "user", "assistant", "user"),
    )
    return [[{"role": role, "content": said[role]} for role in shape] for shape in shapes]
