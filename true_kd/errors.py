"""Everything true-kd raises on purpose.

One small tree below `TrueKDError`. Leaves take typed arguments and build their own message in the form
**where: what was found, what was expected. What to do.** The command line prints the message as it stands and exits
with `exit_code`; anything outside this tree is a bug and keeps its traceback.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterable, Sequence
from pathlib import Path


class TrueKDError(Exception):
    """Base of all errors meant for a person. `exit_code` is what the command line returns."""

    exit_code = 1


def shared_exit_code(errors: Iterable[Exception]) -> int:
    """0 for no error, the exit code that all of them share, else 1; that of a bug is 1."""
    codes = {error.exit_code if isinstance(error, TrueKDError) else 1 for error in errors}
    return 0 if not codes else codes.pop() if len(codes) == 1 else 1


def let_go(error: Exception) -> str:
    """The traceback of an error as text, after which its frames hold nothing: they would keep models in memory.

    A bug keeps the text as a note.
    """
    trace = "".join(traceback.format_exception(error))
    if not isinstance(error, TrueKDError) and error.__traceback__ is not None:
        error.add_note(trace)
    linked: BaseException | None = error
    while linked is not None:
        traceback.clear_frames(linked.__traceback__)
        linked.__traceback__ = None
        linked = linked.__cause__ or linked.__context__
    return trace


class InputError(TrueKDError):
    """Something the user gave is wrong: config, prompts, data, model, command line. Exit code 2."""

    exit_code = 2


class Problems(InputError):
    """Several problems of one kind, collected before raising; one line each."""

    def __init__(self, lines: Sequence[str], shown: int = 5) -> None:
        self.lines = tuple(lines)
        more = len(self.lines) - shown
        text = list(self.lines[:shown])
        if more > 0:
            text.append(f"... and {more} more")
        super().__init__("\n".join(text))


class ConfigError(Problems):
    """A config file, a `--set` or a flag does not describe a run."""


class PromptError(Problems):
    """A prompt file cannot be read, or a line of it is not a prompt."""


class ModelError(InputError):
    """A model folder or hub id cannot be opened as an mlx-lm model."""


class VocabularyError(InputError):
    """Teacher and student disagree about what their token ids mean."""


class CacheError(TrueKDError):
    """A cached target file is damaged or does not belong to this run. Exit code 5."""

    exit_code = 5


class PoorTargetsError(InputError):
    """The cached targets say too little about the teacher to train on."""

    def __init__(self, cosine: float, least: float, temperature: float, has_budget: bool) -> None:
        finer = "a larger --cache-bytes or --cache-gb" if has_budget else "a smaller targets.threshold"
        super().__init__(
            f"cached targets: the gradient from them has a cosine of {cosine:.3f} to that from full logits at "
            f"temperature {temperature:g}, expected at least {least:g}. Keep more (targets.preset hot, or "
            f"{finer}), lower --temperature, or set fidelity.when_poor=warn."
        )


class LockedError(TrueKDError):
    """Another process works in the same folder. Exit code 3."""

    exit_code = 3

    def __init__(self, folder: Path, holder: str) -> None:
        super().__init__(f"{folder}: in use by {holder}. Wait for it to finish, or choose another --out.")


class EnvironmentProblem(TrueKDError):
    """This machine lacks something the run needs: a backend, memory, disk. Exit code 4."""

    exit_code = 4


class NonFiniteLossError(TrueKDError):
    """The loss or the gradient became NaN or infinite; the last good weights were kept."""

    def __init__(self, iteration: int, what: str, kept: Path) -> None:
        super().__init__(
            f"iteration {iteration}: {what} is not a finite number, so training stopped. The last good weights are in "
            f"{kept}. Lower --learning-rate, or set training.grad_clip."
        )
