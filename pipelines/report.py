"""What an evaluation found, as files, pictures, tracked curves and a table for the terminal.

It computes nothing but shares of what a suite measured.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.table import Table
from torch import Tensor

from infra import storage
from infra.provenance import git_commit, versions
from infra.tracking import Tracker
from model.metrics import Estimate
from orchestrator.config import RunConfig
from pipelines import suites
from pipelines.console import say
from pipelines.plots import LOOKS, Panel, plot_curves, plot_samples
from pipelines.suite import Row, Suite

FORMAT = 2
SPANS = {"inside": "inside the trained length", "beyond": "beyond it", "overall": "all frames"}
SHEET = "contact_sheet.png"
REFERENCES = {
    "held_out": "Reference: held-out videos of data.held_out.",
    "teacher": "Reference: the teacher's samples, of which its own row has the other half; there are no held-out "
    "videos.",
    "none": "There is no reference: neither held-out videos nor a teacher; what compares with one is undefined.",
}


@dataclass(frozen=True)
class Report:
    """Everything that an evaluation found."""

    config: RunConfig
    """With absolute paths."""
    suite: Suite
    reference: str
    """A key of REFERENCES."""
    models: Mapping[str, Mapping[str, Any]]
    """Of those of teacher, initial and distilled that there are: path, manifest and lineage."""
    rows: Mapping[str, Row]
    """Of the models, and of real videos where there are any."""
    trained: int
    """Frames of the trained length."""
    chunk: int
    """Frames that the students denoise together."""
    steps: int
    """Denoising steps of the students for each chunk."""
    samples: Mapping[str, Tensor]
    """Of each row a few videos for the contact sheet, uint8 `[P, F, channels, H, W]`."""
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

    def pictures(self) -> dict[str, list[str]]:
        """File → the metrics that it shows; those that are defined nowhere are left out."""
        shown: dict[str, list[str]] = {}
        for name, metric in self.suite.metrics.items():
            if not all(row.by_frame[name].value.isnan().all() for row in self.rows.values()):
                shown.setdefault(metric.picture, []).append(name)
        return shown


def write_report(report: Report, tracker: Tracker | None) -> None:
    """Write tables, then pictures, to `evaluate.output`, and record them and the curves with the tracker."""
    output = Path(report.config.evaluate.output)
    output.mkdir(parents=True, exist_ok=True)
    # The tracker's address may hold a password, and is no part of what was measured.
    settings = report.config.portable()
    storage.write_text(output / "config.yaml", yaml.safe_dump(settings, sort_keys=False))
    storage.write_text(output / "metrics.json", json.dumps(_json(report), indent=1, allow_nan=False))
    storage.write_text(output / "report.md", _markdown(report))
    pictures = write_pictures(report, output)
    if tracker is None:
        return
    for name, row in report.rows.items():
        for frame in range(row.frames):
            curves = {metric: _at(estimate, frame) for metric, estimate in row.by_frame.items()}
            tracker.metrics(frame, _tracked(name, curves))
        for span in SPANS:
            scalars = {f"{metric}_{span}": estimate for metric, estimate in getattr(row, span).items()}
            tracker.metrics(0, _tracked(name, scalars))
    for file in (*pictures, "config.yaml", "report.md", "metrics.json"):
        tracker.artifact(output / file, "evaluation")


def write_pictures(report: Report, output: Path) -> list[str]:
    """Draw curves and the contact sheet, and return the names of those that could be drawn; the others are
    said."""
    metrics, drawn = report.suite.metrics, []
    for picture in (*report.pictures(), SHEET):
        try:
            if picture == SHEET:
                plot_samples(
                    output / picture,
                    report.samples,
                    report.sample_prompts,
                    trained=report.trained,
                    chunk=report.chunk,
                )
            else:
                panels = [
                    Panel(
                        metrics[name].words,
                        {row: found.by_frame[name] for row, found in report.rows.items()},
                        share=metrics[name].share,
                    )
                    for name in report.pictures()[picture]
                ]
                plot_curves(output / picture, panels, trained=report.trained)
        except (
            Exception
        ) as error:  # the numbers are written; a library's trouble with a picture must not end the run
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            say(
                f"evaluate: {picture} could not be drawn ({reason}); the numbers are in {output}/metrics.json"
            )
        else:
            drawn.append(picture)
    return drawn


def summary_table(report: Report) -> Table:
    """The headline's curve for a terminal of 80 columns, chunk by chunk, and half the width of its 95 %
    interval."""
    headline, verdicts = report.suite.headline, report.suite.verdicts(report.rows)
    words = report.suite.metrics[headline].words
    caption = f"{verdicts[-1].claim}: {verdicts[-1].value:+.2f}" if verdicts else None
    table = Table(title=f"{words[0].upper()}{words[1:]} by frame", caption=caption)
    table.add_column("frames", no_wrap=True)
    for name in report.rows:
        table.add_column(name, justify="right", no_wrap=True)
    last_inside = (report.trained - 1) // report.chunk
    for index, (label, estimates) in enumerate(_drift(report)):
        table.add_row(label, *map(_show_briefly, estimates), end_section=index == last_inside)
    table.add_section()
    for span in SPANS:
        estimates = [getattr(row, span)[headline] for row in report.rows.values()]
        table.add_row(span, *map(_show_briefly, estimates))
    return table


def _drift(report: Report) -> Iterator[tuple[str, list[Estimate]]]:
    """Frames of each chunk and the headline of every row in it, NaN where the row has no such frame."""
    curves = [row.by_chunk[report.suite.headline] for row in report.rows.values()]
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
    basis = {"reference": report.reference, **report.suite.basis(report.config)}
    shares = {
        name: estimates_json({metric: report.relative(name, metric) for metric in report.suite.shares})
        for name in report.models
        if name != "teacher" and "teacher" in report.models and report.suite.shares
    }
    return {
        "format": FORMAT,
        "suite": suites.described(report.config.evaluate.suite, report.suite, basis),
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
        "relative_to_teacher_inside": shares,
        "verdicts": [
            asdict(v) | {"value": _finite(v.value), "met": v.met} for v in report.suite.verdicts(report.rows)
        ],
        "made_with": versions() | git_commit(),
    }


def _finite(value: Any) -> Any:
    """JSON knows no NaN: null stands for a value that is not defined."""
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return value if math.isfinite(value) else None


def _markdown(report: Report) -> str:
    settings, rows, suite = report.config.evaluate, report.rows, report.suite
    metrics, words = suite.metrics, suite.metrics[suite.headline].words
    output = _relative(settings.output, report.config.root)

    def table(head: Sequence[str], lines: Iterator[Sequence[str]]) -> list[str]:
        return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *lines)] + [""]

    def metric_lines(span: str, names: Sequence[str]) -> Iterator[Sequence[str]]:
        for name, row in rows.items():
            yield [LOOKS[name].label, *(_show(getattr(row, span)[metric]) for metric in names)]

    teacher = (
        f", the teacher's of the {report.trained} trained frames in {settings.teacher_steps} steps at "
        "guidance "
        f"{settings.teacher_guidance:g}"
        if "teacher" in rows
        else ""
    )
    pictures = report.pictures()
    shown = [name for names in pictures.values() for name in names]
    first = metrics[suite.headline].picture
    lines = [
        f"# {suite.title}",
        "",
        f"{settings.videos} videos of each model, the students' of {settings.frames} frames in chunks of "
        f"{report.chunk} with "
        f"{report.steps} steps a chunk{teacher}. Brackets hold 95 % bootstrap intervals over videos. "
        + REFERENCES[report.reference],
        "",
    ]
    if first in pictures:
        lines += [f"![{words} by frame]({first})", ""]
    if verdicts := suite.verdicts(rows):
        asked = (
            [
                v.claim,
                f"{v.value:.3f}",
                f"{'more than' if v.bound == 0 else 'at least'} {v.bound:g}",
                "yes" if v.met else "no",
            ]
            for v in verdicts
        )
        lines += ["## What was asked", "", *table(["", "measured", "asked for", "met"], asked)]
    for span, title in SPANS.items():
        lines += [f"## {title.capitalize()}", ""]
        for names in [shown] if len(shown) <= 4 else pictures.values():
            lines += table(["", *(metrics[name].words for name in names)], metric_lines(span, names))
    lines += [
        f"## {words[0].upper()}{words[1:]} by frame",
        "",
        *table(
            ["frames", *(LOOKS[name].label for name in rows)],
            ([label, *map(_show, estimates)] for label, estimates in _drift(report)),
        ),
        f"![samples]({SHEET})",
        "",
    ]
    for picture, names in pictures.items():
        if picture != first:
            lines += [f"![{', '.join(metrics[name].words for name in names)}]({picture})", ""]
    undefined = [metrics[name].words for name in metrics if name not in shown]
    lines += [
        "## How it was measured",
        "",
        *(
            f"- *{metrics[name].words[0].upper()}{metrics[name].words[1:]}*: {metrics[name].explained}"
            for name in shown
        ),
        *(f"- {note}" for note in suite.notes),
        *([f"- Not defined for these videos: {', '.join(undefined)}."] if undefined else []),
        "- A dash is a value that is not defined.",
        "",
        "All numbers are in `metrics.json`. Computed in "
        f"{report.seconds:.0f} s; to do it again from the same directory:",
        "",
        f"    self-forcing evaluate {output}/config.yaml",
        "",
    ]
    return "\n".join(lines)
