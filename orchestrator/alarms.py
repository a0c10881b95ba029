"""Numbers of a distillation that have a range in which all is well, and what to do when one leaves it.

They are made of what the roles report of a student update (`model/watch.py`); nothing that is computed for
them changes a weight.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from statistics import fmean
from typing import Literal

from infra.settings import Invalid, at_least
from model.watch import Reference

EARLY = 10
"""Student updates whose mean score gap later ones are compared with."""
_RATE, _CRITIC = "roles.student.engine.learning_rate", "roles.critic.engine.learning_rate"
_FALL = f"lower distill.{_RATE}, or let it fall with distill.roles.student.engine.schedule"


@dataclass(frozen=True)
class Watched:
    """A number, the range in which all is well, and what to change where it isn't."""

    low: float
    high: float
    means: str
    advice: str


NUMBERS: Mapping[str, Watched] = {
    "latent_std_ratio": Watched(
        0.5,
        1.8,
        "standard deviation of the student's latents, as a share of the reference's",
        f"{_FALL}; where it is too high also lower distill.roles.teacher.guidance",
    ),
    "latent_std_kept": Watched(
        0.7, math.inf, "that standard deviation, as a share of its highest so far in the run", _FALL
    ),
    "latent_energy_ratio": Watched(
        0.25, 3.3, "mean square of the student's latents, as a share of the reference's", _FALL
    ),
    "latent_outside": Watched(
        0.0,
        0.1,
        "share of the student's latents beyond the reference's range, widened by a tenth of it",
        f"{_FALL}, or lower distill.roles.teacher.guidance",
    ),
    "score_gap_growth": Watched(
        0.0,
        3.0,
        f"mean |fake − real|, as a multiple of its mean over the first {EARLY} student updates",
        f"{_FALL}; or give the critic more updates with distill.student_every",
    ),
    "critic_lag": Watched(
        0.0,
        2.0,
        "critic's flow loss on the student's videos, as a multiple of the teacher's",
        f"raise distill.{_CRITIC}, or give the critic more updates with distill.student_every",
    ),
    "average_distance": Watched(
        0.0, 0.3, "distance of the student's weights from their average, as a share of their norm", _FALL
    ),
    "update_cosine": Watched(
        -0.7, 0.99, "cosine of successive updates of the student", f"{_FALL}, or raise its betas"
    ),
}


@dataclass(frozen=True)
class AlarmConfig:
    """What happens when a watched number of the student leaves its range."""

    action: Literal["warn", "stop", "off"] = "warn"
    """Say so once, or end the run, which keeps its checkpoints; or do nothing but report the numbers."""
    updates: int = 5
    """Student updates in a row for which a number is out of its range before that happens."""
    ranges: dict[str, tuple[float, float]] = field(default_factory=dict)
    """Other ranges by number, lowest and highest value; docs/watching.md lists numbers and ranges."""
    directions: bool = False
    """Also measure the cosine of successive updates, which keeps two more fp32 copies of each rank's share of
    the student's trained weights."""

    def __post_init__(self) -> None:
        if self.action not in ("warn", "stop", "off"):
            raise Invalid("action", f"is {self.action!r}: use warn, stop or off.")
        at_least(self, 1, "updates")
        for name, span in self.ranges.items():
            if name not in NUMBERS:
                raise Invalid("ranges", f"names {name!r}, which is not watched; use {', '.join(NUMBERS)}.")
            if len(span) != 2 or not span[0] <= span[1]:
                raise Invalid("ranges", f"of {name} is {list(span)}; give a lowest and a highest value.")

    def range_of(self, name: str) -> tuple[float, float]:
        return self.ranges.get(name, (NUMBERS[name].low, NUMBERS[name].high))


@dataclass
class Alarms:
    """What has been seen of the watched numbers so far."""

    config: AlarmConfig
    reference: Reference | None = None
    highest: float = 0.0
    early: list[float] = field(default_factory=list)
    bad: dict[str, list[int]] = field(default_factory=dict)
    """Iterations done at the student updates in a row in which a number was out of its range."""
    fired: set[str] = field(default_factory=set)

    def numbers(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """The watched numbers of one student update, from what the coordinator measured."""
        found = {name: metrics[f"student/{name}"] for name in NUMBERS if f"student/{name}" in metrics}
        if (std := metrics.get("student/latent_std")) is not None:
            self.highest = max(self.highest, std)
            found["latent_std_kept"] = std / self.highest if self.highest else 1.0
            if self.reference is not None:
                found["latent_std_ratio"] = std / max(self.reference.std, 1e-6)
                energy = metrics["student/latent_energy"]
                found["latent_energy_ratio"] = energy / max(self.reference.energy, 1e-6)
        if (gap := metrics.get("student/score_gap")) is not None:
            if len(self.early) < EARLY:
                self.early.append(gap)
            usual = fmean(self.early)
            found["score_gap_growth"] = gap / usual if usual else 1.0
        # In the low band few samples with hardly any noise decide.
        critic, teacher = (metrics.get(f"{role}/flow_middle") for role in ("critic", "teacher"))
        if critic is not None and teacher:
            found["critic_lag"] = critic / teacher
        return found

    def look(self, done: int, numbers: Mapping[str, float]) -> Iterator[tuple[int, str]]:
        """What to tell of the numbers of one more student update: each alarm once, until it is well again.

        With each goes how many iterations were done when its number first left the range.
        """
        for name, value in numbers.items():
            low, high = self.config.range_of(name)
            if low <= value <= high:
                self.bad[name] = []
                self.fired.discard(name)
                continue
            self.bad.setdefault(name, []).append(done)
            if len(self.bad[name]) >= self.config.updates and name not in self.fired:
                self.fired.add(name)
                watched = NUMBERS[name]
                yield (
                    self.bad[name][0],
                    f"{name} ({watched.means}) is {value:.3g}, outside {low:g} to {high:g} for "
                    f"{len(self.bad[name])} student updates; {watched.advice}",
                )


class Diverging(Exception):
    """A watched number has left its range, and the run is to end then."""

    def __init__(self, what: str, since: int):
        """It was out of its range from the update that ended after `since` iterations."""
        super().__init__(what)
        self.since = since
