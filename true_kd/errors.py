"""Everything true-kd raises on purpose.

One small tree below `TrueKDError`. Leaves take typed arguments and build their own message in the form
**where: what was found, what was expected. What to do.** The command line prints the message as it stands and exits
with `exit_code`; anything outside this tree is a bug and keeps its traceback.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any


class TrueKDError(Exception):
    """Base of all errors meant for a person. `exit_code` is what the command line returns."""

    exit_code = 1

    def __reduce__(self) -> tuple[Any, ...]:
        # Leaves build their message from other arguments than it: as such they cannot be pickled.
        return _revive, (type(self), self.args, self.__dict__)


def _revive(kind: type[TrueKDError], arguments: tuple[Any, ...], state: dict[str, Any]) -> TrueKDError:
    error = kind.__new__(kind, *arguments)
    error.__dict__.update(state)
    return error


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


MOST_LINES = 3
"""Lines of an error on a terminal, however many problems there are: what comes first must not scroll away."""

_MOST_PLACES = 4


def few_lines(lines: Sequence[str]) -> str:
    """Lines of the form "place: problem", at most `MOST_LINES`: of those left out, the number and the places."""
    if len(lines) <= MOST_LINES:
        return "\n".join(lines)
    shown, others = lines[: MOST_LINES - 1], lines[MOST_LINES - 1 :]
    places = list(dict.fromkeys(line.partition(": ")[0][:80] for line in others))
    named = f"{', '.join(places[:_MOST_PLACES])}{' ...' if len(places) > _MOST_PLACES else '.'}"
    return "\n".join([*shown, f"... and {len(others)} more, at {named}"])


class Problems(InputError):
    """Several problems of one kind, collected before raising; one line each in `lines`, few of them in the message."""

    def __init__(self, lines: Sequence[str]) -> None:
        self.lines = tuple(lines)
        super().__init__(few_lines(self.lines))


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


_NO_ROOM = ("[malloc", "malloc]", "Unable to allocate", "Attempting to allocate")
"""How MLX begins to say that memory ran out, where it says so by an exception."""


def told_plainly(error: Exception) -> Exception:
    """The error, but where it is the machine's fault: then that as a person is told, which is no bug."""
    if isinstance(error, OSError) and error.errno is not None:
        where = f"{error.filename}: " if error.filename else ""
        return EnvironmentProblem(
            f"{where}{error.strerror}, expected it to work. See to it, and run the same command again."
        )
    if isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(sign in str(error) for sign in _NO_ROOM)
    ):
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        return EnvironmentProblem(
            f"memory ran out ({reason}). Lower training.batch_size, capture.batch_size, --max-seq-length or "
            "--memory-gb, or choose smaller or quantised models, and run the same command again."
        )
    return error


def portable(error: Exception, trace: str = "") -> Exception:
    """An error as another process can read it: of another library's only what it says, with its traceback as a note."""
    told = told_plainly(error)
    if not isinstance(told, TrueKDError):
        told = RuntimeError(f"{type(error).__name__}: {error}")
    told.__notes__ = [trace] if trace else list(getattr(error, "__notes__", ()))
    return told


class NonFiniteLossError(TrueKDError):
    """The loss or the gradient became NaN or infinite; the last good weights were kept."""

    def __init__(self, iteration: int, what: str, kept: Path) -> None:
        super().__init__(
            f"iteration {iteration}: {what} is not a finite number, so training stopped. The last good weights are in "
            f"{kept}. Lower --learning-rate, or set training.grad_clip."
        )
