"""What an evaluation found, as files, pictures, tracked curves and a table for the terminal.

It computes nothing but ratios of what `pipelines/evaluate.py` measured, and the verdicts that follow from them.
"""

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.table import Table
from torch import Tensor

from infra.provenance import git_commit, versions
from infra.tracking import Tracker
from model.metrics import Estimate
from orchestrator.config import RunConfig
from pipelines.plots import LOOKS, plot_curves, plot_samples

FORMAT = 1
METRICS = {
    "digit_accuracy": "digit accuracy",
    "motion_following": "motion following",
    "diversity": "diversity within a prompt, real = 1",
    "kernel_distance": "kernel distance to real videos",
}
ROWS = ("real", "teacher", "initial", "distilled")
PICTURES = {
    "digit_accuracy": "drift.png",
    "motion_following": "motion.png",
    "diversity": "diversity.png",
    "kernel_distance": "distance.png",
}
SPANS = {"inside": "inside the trained length", "beyond": "beyond it", "overall": "all frames"}


@dataclass(frozen=True)
class Row:
    """The videos of one model, or real ones, measured. Each mapping goes from a name in `METRICS` to its estimate,
    which is NaN where the metric is not defined (such as any beyond the trained length for a teacher)."""

    frames: int
    """Frames of each video."""
    by_frame: Mapping[str, Estimate]
    """`[frames]`; motion following at a frame is how the content got there from the one before, NaN at frame 0."""
    by_chunk: Mapping[str, Estimate]
    """`[chunks]`, means over a chunk's frames."""
    inside: Mapping[str, Estimate]
    """Scalars: means over the frames of the trained length."""
    beyond: Mapping[str, Estimate]
    """Scalars: means over the frames after it."""
    overall: Mapping[str, Estimate]
    """Scalars: means over all frames."""


@dataclass(frozen=True)
class Verdict:
    """A claim about the models and whether the numbers support it."""

    claim: str
    value: float
    """What was measured; NaN supports no claim."""
    bound: float
    """The least that is asked for; a difference, whose bound is 0, must exceed it."""

    @property
    def met(self) -> bool:
        return self.value >= self.bound if self.bound else self.value > 0


@dataclass(frozen=True)
class Report:
    """Everything that an evaluation found."""

    config: RunConfig
    """With absolute paths."""
    models: Mapping[str, Mapping[str, Any]]
    """Of teacher, initial and distilled: path, manifest and lineage."""
    rows: Mapping[str, Row]
    """Of real, teacher, initial and distilled."""
    trained: int
    """Frames of the trained length."""
    chunk: int
    """Frames that the students denoise together."""
    steps: int
    """Denoising steps of the students for each chunk."""
    samples: Mapping[str, Tensor]
    """Of each row a few videos for the contact sheet, uint8 `[P, F, 1, H, W]`."""
    sample_prompts: Sequence[str]
    """The P prompts of the samples."""
    seconds: float
    """How long it took."""

    def relative(self, name: str, metric: str) -> Estimate:
        """What share of the teacher's `metric`, inside the trained length, a model reaches.

        The interval is that of the most and the least favourable pair of ends, hence wider than 95 %.
        """
        model, teacher = self.rows[name].inside[metric], self.rows["teacher"].inside[metric]
        return Estimate(model.value / teacher.value, model.low / teacher.high, model.high / teacher.low)

    def verdicts(self) -> list[Verdict]:
        """What a distillation is asked for: quality, motion, diversity, and no drift."""
        real, teacher, initial, distilled = (self.rows[name] for name in ROWS)
        accuracy = "digit_accuracy"

        def gap(upper: Estimate, lower: Estimate) -> Tensor:
            """Between two intervals; negative where they overlap."""
            return upper.low - lower.high

        gaps = gap(distilled.by_chunk[accuracy], initial.by_chunk[accuracy])[1:]
        asked = {
            "the reader's accuracy on held-out real videos": (real.overall[accuracy].value, 0.98),
            "the teacher's digit accuracy": (teacher.inside[accuracy].value, 0.9),
            "distilled student: digit accuracy inside the trained length, as a share of the teacher's": (
                self.relative("distilled", accuracy).value,
                0.9,
            ),
            "distilled student: motion following inside the trained length": (
                distilled.inside["motion_following"].value,
                0.9,
            ),
            "distilled student: diversity inside the trained length, as a share of the teacher's": (
                self.relative("distilled", "diversity").value,
                0.7,
            ),
            "digit accuracy, distilled above initial: the smallest gap between 95 % intervals from the second chunk on": (
                gaps.min() if len(gaps) else torch.tensor(math.nan),
                0.0,
            ),
            "digit accuracy, distilled above initial: the gap between 95 % intervals beyond the trained length": (
                gap(distilled.beyond[accuracy], initial.beyond[accuracy]),
                0.0,
            ),
            "digit accuracy, distilled above initial: the difference on average": (
                distilled.overall[accuracy].value - initial.overall[accuracy].value,
                0.0,
            ),
        }
        return [Verdict(claim, value.item(), bound) for claim, (value, bound) in asked.items()]


def write_report(report: Report, tracker: Tracker | None) -> None:
    """Write tables and pictures to `evaluate.output`, and record them and the curves with the tracker."""
    output = Path(report.config.evaluate.output)
    output.mkdir(parents=True, exist_ok=True)
    for metric, picture in PICTURES.items():
        plot_curves(
            output / picture,
            {name: row.by_frame[metric] for name, row in report.rows.items()},
            label=METRICS[metric],
            trained=report.trained,
            share=metric in ("digit_accuracy", "motion_following"),
        )
    plot_samples(
        output / "contact_sheet.png",
        report.samples,
        report.sample_prompts,
        trained=report.trained,
        chunk=report.chunk,
    )
    # The tracker's address may hold a password, and is no part of what was measured.
    settings = report.config.portable()
    write_text(output / "config.yaml", yaml.safe_dump(settings, sort_keys=False))
    write_text(output / "report.md", _markdown(report))
    write_text(output / "metrics.json", json.dumps(_json(report), indent=1, allow_nan=False))
    if tracker is None:
        return
    for name, row in report.rows.items():
        for frame in range(row.frames):
            curves = {metric: _at(estimate, frame) for metric, estimate in row.by_frame.items()}
            tracker.metrics(frame, _tracked(name, curves))
        for span in SPANS:
            scalars = {f"{metric}_{span}": estimate for metric, estimate in getattr(row, span).items()}
            tracker.metrics(0, _tracked(name, scalars))
    for file in (*PICTURES.values(), "contact_sheet.png", "config.yaml", "report.md", "metrics.json"):
        tracker.artifact(output / file, "evaluation")


def summary_table(report: Report) -> Table:
    """The drift curve for a terminal of 80 columns: digit accuracy chunk by chunk, and half the width of its 95 % interval."""
    table = Table(
        title="Digit accuracy by frame",
        caption=f"On average the distilled student is {report.verdicts()[-1].value:+.2f} from the initial one.",
    )
    table.add_column("frames", no_wrap=True)
    for name in report.rows:
        table.add_column(name, justify="right", no_wrap=True)
    last_inside = (report.trained - 1) // report.chunk
    for index, (label, estimates) in enumerate(_drift(report)):
        table.add_row(label, *map(_show_briefly, estimates), end_section=index == last_inside)
    table.add_section()
    for span in SPANS:
        estimates = [getattr(row, span)["digit_accuracy"] for row in report.rows.values()]
        table.add_row(span, *map(_show_briefly, estimates))
    return table


def _drift(report: Report) -> Iterator[tuple[str, list[Estimate]]]:
    """Frames of each chunk and the digit accuracy of every row in it, NaN where the row has no such frame."""
    curves = [row.by_chunk["digit_accuracy"] for row in report.rows.values()]
    nothing = Estimate(*[torch.tensor(math.nan)] * 3)
    for index in range(max(len(curve.value) for curve in curves)):
        first, last = index * report.chunk, (index + 1) * report.chunk - 1
        estimates = [_at(curve, index) if index < len(curve.value) else nothing for curve in curves]
        yield f"{first}–{last}" if last > first else str(first), estimates


def _show_briefly(estimate: Estimate) -> str:
    value, half = estimate.value.item(), (estimate.high - estimate.low).item() / 2
    return "–" if math.isnan(value) else f"{value:.2f} ± {half:.2f}"


def _at(estimate: Estimate, index: int) -> Estimate:
    return Estimate(estimate.value[index], estimate.low[index], estimate.high[index])


def _show(estimate: Estimate) -> str:
    value, low, high = (part.item() for part in (estimate.value, estimate.low, estimate.high))
    return "–" if math.isnan(value) else f"{value:.3f} [{low:.3f}, {high:.3f}]"


def _tracked(name: str, estimates: Mapping[str, Estimate]) -> dict[str, float]:
    values = {}
    for metric, estimate in estimates.items():
        for suffix, part in (("", estimate.value), ("_low", estimate.low), ("_high", estimate.high)):
            values[f"evaluation/{name}/{metric}{suffix}"] = part.item()
    return {key: value for key, value in values.items() if not math.isnan(value)}


def _relative(path: str, root: str) -> str:
    return path.removeprefix(root.rstrip("/") + "/")


def estimates_json(values: Mapping[str, Estimate]) -> dict[str, Any]:
    """Value and interval of each metric, as JSON knows them."""
    parts = ("value", "low", "high")
    return {
        metric: {part: _finite(getattr(e, part).tolist()) for part in parts} for metric, e in values.items()
    }


def _json(report: Report) -> dict[str, Any]:
    tables = ("by_frame", "by_chunk", *SPANS)
    return {
        "format": FORMAT,
        "seed": report.config.seed,
        "settings": asdict(report.config.evaluate)
        | {"output": _relative(report.config.evaluate.output, report.config.root)},
        "trained_frames": report.trained,
        "chunk": report.chunk,
        "steps": report.steps,
        "seconds": round(report.seconds, 1),
        "models": {
            name: {**model, "path": _relative(model["path"], report.config.root)}
            for name, model in report.models.items()
        },
        "rows": {
            name: {"frames": row.frames, **{table: estimates_json(getattr(row, table)) for table in tables}}
            for name, row in report.rows.items()
        },
        "relative_to_teacher_inside": {
            name: estimates_json(
                {metric: report.relative(name, metric) for metric in ("digit_accuracy", "diversity")}
            )
            for name in ("initial", "distilled")
        },
        "verdicts": [asdict(v) | {"value": _finite(v.value), "met": v.met} for v in report.verdicts()],
        "made_with": versions() | git_commit(),
    }


def _finite(value: Any) -> Any:
    """JSON knows no NaN: null stands for a value that is not defined."""
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return value if math.isfinite(value) else None


def _markdown(report: Report) -> str:
    settings, rows = report.config.evaluate, report.rows
    output = _relative(settings.output, report.config.root)

    def table(head: Sequence[str], lines: Iterator[Sequence[str]]) -> list[str]:
        return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *lines)] + [""]

    def metric_lines(span: str) -> Iterator[Sequence[str]]:
        for name, row in rows.items():
            yield [LOOKS[name].label, *(_show(getattr(row, span)[metric]) for metric in METRICS)]

    lines = [
        "# Evaluation on moving digits",
        "",
        f"{settings.videos} videos of each model, the students' of {settings.frames} frames in chunks of {report.chunk} with "
        f"{report.steps} steps a chunk, the teacher's of the {report.trained} trained frames in {settings.teacher_steps} steps "
        f"at guidance {settings.teacher_guidance:g}. Brackets hold 95 % bootstrap intervals over videos.",
        "",
        "![digit accuracy by frame](drift.png)",
        "",
        "## What was asked",
        "",
        *table(
            ["", "measured", "asked for", "met"],
            (
                [
                    v.claim,
                    f"{v.value:.3f}",
                    f"{'more than' if v.bound == 0 else 'at least'} {v.bound:g}",
                    "yes" if v.met else "no",
                ]
                for v in report.verdicts()
            ),
        ),
    ]
    for span, words in SPANS.items():
        lines += [f"## {words.capitalize()}", "", *table(["", *METRICS.values()], metric_lines(span))]
    lines += [
        "## Digit accuracy by frame",
        "",
        *table(
            ["frames", *(LOOKS[name].label for name in rows)],
            ([label, *map(_show, estimates)] for label, estimates in _drift(report)),
        ),
        "![samples](contact_sheet.png)",
        "",
        "![motion following](motion.png)",
        "",
        "![diversity](diversity.png)",
        "",
        "![kernel distance](distance.png)",
        "",
        "## How it was measured",
        "",
        "- *Digit accuracy*: a classifier, trained on scans of the training split, reads each frame.",
        "- *Motion following*: whether the content moved from the frame before as the prompt says.",
        "- *Diversity*: how far apart the correctly read frames of one prompt are in the classifier's features, as a share of how "
        "far apart real ones are.",
        "- *Kernel distance*: unbiased squared maximum mean discrepancy between the classifier's features of generated and real "
        "frames of one index; the real videos' row compares two disjoint sets of real videos.",
        "- Intervals of diversity and distance over several frames are means of the frames' intervals, hence never too narrow.",
        "- A dash is a value that is not defined.",
        "",
        "All numbers are in `metrics.json`. Computed in "
        f"{report.seconds:.0f} s; to do it again from the same directory:",
        "",
        f"    self-forcing evaluate {output}/config.yaml",
        "",
    ]
    return "\n".join(lines)


def write_text(path: Path, text: str) -> None:
    """Write a file, whole or not at all."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.partial")
    aside.write_text(text)
    os.replace(aside, path)
