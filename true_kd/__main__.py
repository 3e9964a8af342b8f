"""`true-kd` and `python -m true_kd`: the one place where an error becomes a line and an exit code."""

from __future__ import annotations

import contextlib
import io
import os
import sys
import traceback
from pathlib import Path


def main() -> None:
    """Run the command line and exit."""
    # Set before mlx_lm and its tokenizers are imported: their warnings about threads and versions are not the user's.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")  # looked for in every installed package, at each start
    for stream in (sys.stdout, sys.stderr):
        # What a terminal cannot show is written out: an encoding is no reason for a traceback.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    from true_kd import stopping
    from true_kd.errors import TrueKDError, told_plainly

    is_completion = "_TRUE_KD_COMPLETE" in os.environ
    if is_completion:
        # A shell that completes a line shows what comes on stderr in the middle of it.
        sys.stderr = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115  (until the process ends)
    try:
        stopping.listen()
        from true_kd.backend import require_mlx

        if not is_completion:  # which waits for no import that it can do without
            require_mlx()
        from true_kd.cli import run

        code = run(sys.argv[1:])
        sys.stdout.flush()
    except KeyboardInterrupt as interrupt:
        stop = interrupt if isinstance(interrupt, stopping.Stopped) else stopping.first() or stopping.Stopped(2)
        kept = "Finished domains, captured replies and checkpoints are kept: run it again to go on."
        _say(f"true-kd: stopped by {stop.cause}.{f' {kept}' if _RUNS & {*sys.argv[1:]} else ''}")
        code = stop.exit_code
    except BrokenPipeError:
        # Whoever read the output has gone: nothing is left to say, and nobody to say it to.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    except (TrueKDError, OSError, MemoryError, RuntimeError) as error:
        told = told_plainly(error)
        if not isinstance(told, TrueKDError):
            raise
        if os.environ.get("TRUE_KD_DEBUG") == "1":
            _say(traceback.format_exc())
        else:
            _say(str(told))
        code = told.exit_code
    sys.exit(code)


_RUNS = {"distill", "capture", "demo", "sweep", "evaluate", "analyze"}
"""Commands that go on where they were stopped."""


def _say(line: str) -> None:
    from true_kd.suggest import printable, redact

    with contextlib.suppress(OSError):  # a terminal that was closed
        print(printable(redact(line)), file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
