"""What is said to the driver before Metal starts."""

from __future__ import annotations

import os

import pytest

from true_kd import metal


def test_the_watchdog_is_relaxed_unless_the_user_says_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(metal.VARIABLE, raising=False)
    metal.relax_watchdog()
    assert os.environ[metal.VARIABLE] == "1"
    monkeypatch.setenv(metal.VARIABLE, "0")
    metal.relax_watchdog()
    assert os.environ[metal.VARIABLE] == "0"


def test_advice_for_a_lit_display_fits_a_line_each() -> None:
    assert metal.DISPLAY_ADVICE
    assert all(len(line) < 120 and "\n" not in line for line in metal.DISPLAY_ADVICE)
