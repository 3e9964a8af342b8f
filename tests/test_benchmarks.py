"""The benchmarks run, and what the documentation says of the cache's quality holds in their smallest case."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[1] / "scripts"


def rows(script: str, tmp_path: Path, *arguments: str) -> dict[str, list[str]]:
    """The rows of the tables that a benchmark prints, by their first cell."""
    ended = subprocess.run(
        [sys.executable, str(SCRIPTS / script), *arguments],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(SCRIPTS.parent)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in ended.stdout.splitlines() if "|" in line]
    return {row[0]: row[1:] for row in cells}


@pytest.mark.slow
def test_students_trained_from_the_default_preset_come_as_near_as_from_full_logits(tmp_path: Path) -> None:
    chosen = ("-d", "reflection", "--seeds", "0", "--temperatures", "2", "--settings", "default")
    found = rows("bench_quality.py", tmp_path, *chosen)
    # One domain and one seed: over six domains and three seeds it is within 3 %, as docs/cache.md shows.
    ratio = float(found["default"][1].split(",")[0])
    assert 0.94 < ratio < 1.06
    assert float(found["default"][0]) <= 64


@pytest.mark.slow
def test_the_presets_keep_the_gradient_within_their_bytes(tmp_path: Path) -> None:
    found = rows("bench_cache.py", tmp_path, "--domains", "memory", "task", "--tokens", "300")
    goals = {
        "**tiny**": (16, 0.99, None, None),
        "**default**": (64, 0.998, 0.995, None),
        "**hot**": (200, 0.998, 0.995, 0.9),
    }
    for preset, (most, *cosines) in goals.items():
        size, *cells = found[preset]
        assert float(size) <= most
        for cell, least in zip(cells, cosines, strict=True):
            cosine, norm, _ = (float(value) for value in cell.split(" (")[0].split(","))
            if least is not None:
                assert cosine >= least
                assert abs(norm - 1) < (0.05 if least < 0.98 else 0.02)


@pytest.mark.slow
def test_the_cost_of_capture_is_measured(tmp_path: Path) -> None:
    found = rows("bench_capture.py", tmp_path, "--rounds", "1", "--prompts", "4", "--presets", "default", "--no-wide")
    assert float(found["default"][0].split()[0]) > 0
