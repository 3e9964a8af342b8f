"""How much of the teacher's distribution is kept: presets, and the settings that they and the user's own add up to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pydantic import Field, field_validator, model_validator

from true_kd.options import Options

Preset = Literal["tiny", "default", "hot", "exact"]
DrawTemperature = Literal[1.0, 2.0, 4.0]


@dataclass(frozen=True)
class TargetSettings:
    """What the targets depend on, every choice made."""

    kind: Literal["sparse", "hidden"]
    threshold: float
    """Ids at least this likely, at temperature 1 or the draw temperature, are kept exactly; 0 for `hidden`."""
    draw_temperature: float
    """Temperature that the sample of the others is drawn for."""
    share: float
    """Share of a reply's tokens that are kept, those of the highest entropy."""


class TargetOptions(Options):
    """How much of the teacher's distribution is kept per token."""

    preset: Preset = "default"
    """tiny (temperature 1 on a small disk), default (1 and 2), hot (up to 4), or exact: the teacher's last hidden
    state, which gives back every logit at any temperature for a few KB per token."""
    threshold: float | None = Field(default=None, ge=0.001, le=0.5)
    """Ids at least this likely are kept exactly, the others sampled, one draw for each such share of their mass. null
    for the preset's. Smaller is more faithful and larger on disk."""
    draw_temperature: DrawTemperature | None = None
    """Temperature that the sample is drawn for: 1, 2 or 4; null for the preset's. Others reuse it with more noise."""
    share: float = Field(default=1.0, gt=0.0, le=1.0)
    """Share of each reply's tokens that are kept and trained: those where the teacher's entropy is highest."""
    bytes_per_token: float | None = Field(default=None, ge=4.0)
    """Budget on disk: picks the threshold, on a sample of the teacher's own replies. null for no budget."""
    gigabytes: float | None = Field(default=None, gt=0.0)
    """Budget in 10^9 bytes over all domains of a run with one teacher. Runs of other domains come to other thresholds:
    give bytes_per_token where they shall share what was captured."""

    @property
    def has_budget(self) -> bool:
        """Whether the threshold follows from a size on disk."""
        return self.bytes_per_token is not None or self.gigabytes is not None

    @model_validator(mode="after")
    def _one_way(self) -> TargetOptions:
        budget = [name for name in ("bytes_per_token", "gigabytes") if getattr(self, name) is not None]
        if budget and self.threshold is not None:
            raise ValueError(
                f"threshold and {budget[0]} are both given, expected one: a budget picks the threshold. Leave one out."
            )
        ignored = [*budget, *(name for name in ("threshold", "draw_temperature") if getattr(self, name) is not None)]
        if ignored and self.preset == "exact":
            raise ValueError(f"{ignored[0]} has no meaning with preset exact, which keeps everything. Leave it out.")
        return self

    @field_validator("draw_temperature", mode="before")
    @classmethod
    def _a_number(cls, value: object) -> object:
        if isinstance(value, bool):
            raise ValueError(
                f"{str(value).lower()}, expected 1, 2 or 4. Choose one."
            )  # which the type would take for 1
        return value

    @property
    def settings(self) -> TargetSettings:
        """The preset with what was set besides. A budget is not looked at: see `true_kd.budget`."""
        base = _PRESETS[self.preset]
        if base.kind == "hidden":
            return TargetSettings("hidden", 0.0, 1.0, self.share)
        return TargetSettings(
            "sparse",
            base.threshold if self.threshold is None else self.threshold,
            base.draw_temperature if self.draw_temperature is None else self.draw_temperature,
            self.share,
        )


# Chosen by `scripts/bench_cache.py` and `scripts/bench_quality.py`; docs/cache.md in this package shows their tables.
_PRESETS: dict[Preset, TargetSettings] = {
    "tiny": TargetSettings("sparse", 0.2, 1.0, 1.0),
    "default": TargetSettings("sparse", 0.02, 2.0, 1.0),
    "hot": TargetSettings("sparse", 0.0085, 4.0, 1.0),
    "exact": TargetSettings("hidden", 0.0, 1.0, 1.0),
}
