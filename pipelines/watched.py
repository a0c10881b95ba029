"""What is watched of a distillation, update by update: in the tracker, in files beside the run, and aloud."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from infra import storage
from model.watch import Reference
from orchestrator.alarms import NUMBERS, Alarms, Diverging
from orchestrator.config import RunConfig
from pipelines.console import say

_BESIDE = ("student/learning_rate", "student/score_gap", "student/latent", "teacher/flow", "critic/flow")
"""Beginnings of names of what is reported beside the watched numbers."""


class Watch:
    """The numbers of one run, gone on with where it is resumed."""

    def __init__(self, config: RunConfig, reference: Reference | None, done: int):
        """`done` are the iterations that the run goes on from; what was written of later ones is dropped."""
        self.output, self.reference = f"{config.distill.output}/watch", reference
        self.settings = config.distill.alarms
        self.rows: list[dict[str, Any]] = []
        if done and (found := storage.read_bytes(f"{self.output}/numbers.json")) is not None:
            self.rows = json.loads(found)["updates"]
        self.back_to(done)
        nothing = "nothing: there are neither held-out videos nor ODE pairs"
        say(f"distill: latents are compared with {reference.source if reference else nothing}")

    def back_to(self, done: int) -> None:
        """Forget what was measured after `done` iterations: they are made again."""
        self.alarms = Alarms(self.settings, self.reference)
        self.rows = [row for row in self.rows if row["iteration"] <= done]
        for row in self.rows:
            numbers = {name: row[name] for name in NUMBERS if name in row}
            self.alarms.numbers({f"student/{name}": value for name, value in row.items()})
            list(self.alarms.look(row["iteration"], numbers))

    def look(self, done: int, metrics: Mapping[str, float]) -> dict[str, float]:
        """The watched numbers of an iteration, for the tracker; none where the student was not updated.

        Raises Diverging where a number has left its range for long and the run is to end then.
        """
        if "student/loss" not in metrics:
            return {}
        numbers = self.alarms.numbers(metrics)
        beside = {name: value for name, value in metrics.items() if name.startswith(_BESIDE)}
        short = {name.removeprefix("student/").replace("/", "_"): value for name, value in beside.items()}
        self.rows.append({"iteration": done, **numbers, **short})
        for since, said in self.alarms.look(done, numbers):
            if self.settings.action == "stop":
                raise Diverging(f"iteration {done - 1}: {said}", since)
            if self.settings.action == "warn":
                say(f"distill: WARNING: iteration {done - 1}: {said}")
        return {f"watch/{name}": value for name, value in numbers.items()}

    def write(self) -> list[Path]:
        """`numbers.json` and `numbers.md`, as far as the run has come."""
        if not self.rows:
            return []
        ranges = {name: self.settings.range_of(name) for name in NUMBERS}
        found = {
            "reference": self.reference and vars(self.reference),
            "ranges": {n: [low, high if high < math.inf else None] for n, (low, high) in ranges.items()},
            "updates": self.rows,
        }
        files = f"{self.output}/numbers.json", f"{self.output}/numbers.md"
        storage.write_text(files[0], json.dumps(found))
        storage.write_text(files[1], self._table())
        return [storage.on_disk(file) for file in files]

    def _table(self) -> str:
        names = list(dict.fromkeys(name for row in self.rows for name in row if name != "iteration"))
        source = self.reference.source if self.reference else "nothing, for there is no reference"
        lines = [
            "# Watched numbers, by student update",
            "",
            f"Latents are compared with {source}.",
            "",
            f"| iteration | {' | '.join(names)} |",
            f"|{' --- |' * (len(names) + 1)}",
        ]
        for row in self.rows:
            cells = [f"{row[name]:.4g}" if name in row else "–" for name in names]
            lines.append(f"| {row['iteration']} | {' | '.join(cells)} |")
        told = [f"- `{name}`: {NUMBERS[name].means}." for name in names if name in NUMBERS]
        return "\n".join([*lines, "", *told, ""])
