"""`true-kd` and `python -m true_kd`: the one place where an error becomes a line and an exit code."""

from __future__ import annotations

import io
import os
import sys
import traceback


def main() -> None:
    """Run the command line and exit."""
    # Set before mlx_lm and its tokenizers are imported: their warnings about threads and versions are not the user's.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    for stream in (sys.stdout, sys.stderr):
        # What a terminal cannot show is written out: an encoding is no reason for a traceback.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    from true_kd.errors import TrueKDError
    from true_kd.suggest import printable

    try:
        from true_kd.backend import require_mlx

        require_mlx()
        from true_kd.cli import run

        code = run(sys.argv[1:])
    except TrueKDError as error:
        if os.environ.get("TRUE_KD_DEBUG") == "1":
            traceback.print_exc()
        else:
            print(printable(str(error)), file=sys.stderr)
        code = error.exit_code
    except KeyboardInterrupt:
        kept = "Finished domains, captured replies and checkpoints are kept: run it again to go on."
        print(f"true-kd: stopped by Ctrl-C. {kept}", file=sys.stderr)
        code = 130
    sys.exit(code)


if __name__ == "__main__":
    main()
