"""What an evaluation found, as files, pictures, tracked curves and a table for the terminal.

It computes nothing but shares of what a suite measured.
"""

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

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
    "teacher": "Reference: the teacher's samples, of which its own row has the other half; there are no "
    "held-out videos.",
    "none": "There is no reference: neither held-out videos nor a teacher; what compares with one is "
    "undefined.",
}


@dataclass(frozen=True)
class Report:
    """Everything that an evaluation found."""

    config: RunConfig  # with absolute paths
    suite: Suite
    reference: str  # a key of REFERENCES
    models: Mapping[str, Mapping[str, Any]]
    """Of those of teacher, initial and distilled that there are: path, manifest and lineage."""
    rows: Mapping[str, Row]  # of the models, and of real videos where there are any
    trained: int  # frames of the trained length
    chunk: int  # frames that the students denoise together
    steps: int  # denoising steps of the students for each chunk,
    first_steps: int  # and for the first one
    samples: Mapping[str, Tensor]
    """Of each row a few videos for the contact sheet, uint8 `[P, F, channels, H, W]`."""
    sample_prompts: Sequence[str]  # P of them
    seconds: float  # how long it took

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
    output = report.config.evaluate.output
    # The tracker's address may hold a password, and is no part of what was measured.
    settings = report.config.portable()
    storage.write_text(f"{output}/config.yaml", yaml.safe_dump(settings, sort_keys=False))
    storage.write_text(f"{output}/metrics.json", json.dumps(_json(report), indent=1, allow_nan=False))
    storage.write_text(f"{output}/report.md", _markdown(report))
    pictures = write_pictures(report, output)
    if tracker is None:
        return
    for name, row in report.rows.items():
        for frame in range(row.frames):
            curves = {metric: estimate.at(frame) for metric, estimate in row.by_frame.items()}
            tracker.metrics(frame, _tracked(name, curves))
        for span in SPANS:
            scalars = {f"{metric}_{span}": estimate for metric, estimate in getattr(row, span).items()}
            tracker.metrics(0, _tracked(name, scalars))
    for file in (*pictures, "config.yaml", "report.md", "metrics.json"):
        tracker.artifact(storage.on_disk(f"{output}/{file}"), "evaluation")


def write_pictures(report: Report, output: str) -> list[str]:
    """Draw curves and the contact sheet, say what could not be drawn, and return the names of what could."""
    drawn, pictures = [], report.pictures()
    for picture in (*pictures, SHEET):
        try:
            if picture == SHEET:
                shown = (report.samples, report.sample_prompts)
                plot_samples(f"{output}/{picture}", *shown, trained=report.trained, chunk=report.chunk)
            else:
                panels = []
                for name in pictures[picture]:
                    metric = report.suite.metrics[name]
                    curves = {row: found.by_frame[name] for row, found in report.rows.items()}
                    panels.append(Panel(metric.words, curves, share=metric.share))
                plot_curves(f"{output}/{picture}", panels, trained=report.trained)
        except Exception as error:  # numbers are written; trouble with a picture must not end the run
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            where = f"{output}/metrics.json"
            say(f"evaluate: {picture} could not be drawn ({reason}); the numbers are in {where}")
        else:
            drawn.append(picture)
    return drawn


def summary_table(report: Report) -> Table:
    """The headline's curve for 80 columns, chunk by chunk, with half the width of its 95 % interval."""
    headline, verdicts = report.suite.headline, report.suite.verdicts(report.rows)
    caption = f"{verdicts[-1].claim}: {verdicts[-1].value:+.2f}" if verdicts else None
    table = Table(title=f"{_capital(report.suite.metrics[headline].words)} by frame", caption=caption)
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
    for index in range(max(len(curve.value) for curve in curves)):
        first, last = index * report.chunk, (index + 1) * report.chunk - 1
        estimates = [
            curve.at(index) if index < len(curve.value) else Estimate.undefined() for curve in curves
        ]
        yield f"{first}–{last}" if last > first else str(first), estimates


def _show_briefly(estimate: Estimate) -> str:
    value, half = estimate.value.item(), (estimate.high - estimate.low).item() / 2
    return "–" if math.isnan(value) else f"{value:.2f} ± {half:.2f}"


def _show(estimate: Estimate) -> str:
    value, low, high = (part.item() for part in estimate)
    return "–" if math.isnan(value) else f"{value:.3f} [{low:.3f}, {high:.3f}]"


def _capital(words: str) -> str:
    return words[0].upper() + words[1:]


def _tracked(name: str, estimates: Mapping[str, Estimate]) -> dict[str, float]:
    values = {
        f"evaluation/{name}/{metric}{suffix}": part.item()
        for metric, estimate in estimates.items()
        for suffix, part in zip(("", "_low", "_high"), estimate, strict=True)
    }
    return {key: value for key, value in values.items() if not math.isnan(value)}


def _relative(path: str, root: str) -> str:
    return path.removeprefix(root.rstrip("/") + "/")


def estimates_json(values: Mapping[str, Estimate]) -> dict[str, Any]:
    """Value and interval of each metric, as JSON knows them."""
    return {
        metric: {part: _finite(each.tolist()) for part, each in estimate._asdict().items()}
        for metric, estimate in values.items()
    }


def _json(report: Report) -> dict[str, Any]:
    config, suite, tables = report.config, report.suite, ("by_frame", "by_chunk", *SPANS)
    basis = {"reference": report.reference, **suite.basis(config)}
    shares = {
        name: estimates_json({metric: report.relative(name, metric) for metric in suite.shares})
        for name in report.models
        if name != "teacher" and "teacher" in report.models and suite.shares
    }
    output = _relative(config.evaluate.output, config.root)
    return {
        "format": FORMAT,
        "suite": suites.described(config.evaluate.suite, suite, basis),
        "seed": config.seed,
        "settings": asdict(config.evaluate) | {"output": output},
        "trained_frames": report.trained,
        "chunk": report.chunk,
        "steps": report.steps,
        "first_steps": report.first_steps,
        "seconds": round(report.seconds, 1),
        "models": {
            name: {**model, "path": _relative(model["path"], config.root)}
            for name, model in report.models.items()
        },
        "rows": {
            name: {"frames": row.frames, **{table: estimates_json(getattr(row, table)) for table in tables}}
            for name, row in report.rows.items()
        },
        "relative_to_teacher_inside": shares,
        "verdicts": [
            asdict(v) | {"value": _finite(v.value), "met": v.met} for v in suite.verdicts(report.rows)
        ],
        "made_with": versions() | git_commit(),
    }


def _finite(value: Any) -> Any:
    """JSON knows no NaN: null stands for a value that is not defined."""
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return value if math.isfinite(value) else None


def _table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *lines))


def _markdown(report: Report) -> str:
    settings, rows, suite = report.config.evaluate, report.rows, report.suite
    metrics, words = suite.metrics, suite.metrics[suite.headline].words
    labels = [LOOKS[name].label for name in rows]
    pictures = report.pictures()
    shown = [name for names in pictures.values() for name in names]
    first = metrics[suite.headline].picture

    teacher = ""
    if "teacher" in rows:
        teacher = (
            f", the teacher's of the {report.trained} trained frames in {settings.teacher_steps} steps at "
            f"guidance {settings.teacher_guidance:g}"
        )
    steps = f"{report.steps} steps a chunk"
    if report.first_steps != report.steps:
        steps += f" and {report.first_steps} for the first"
    blocks = [
        f"# {suite.title}",
        f"{settings.videos} videos of each model, the students' of {settings.frames} frames in chunks of "
        f"{report.chunk} with {steps}{teacher}. Brackets hold 95 % bootstrap intervals over videos. "
        f"{REFERENCES[report.reference]}",
    ]
    if first in pictures:
        blocks.append(f"![{words} by frame]({first})")
    if verdicts := suite.verdicts(rows):
        asked = []
        for verdict in verdicts:
            bound = f"{'more than' if verdict.bound == 0 else 'at least'} {verdict.bound:g}"
            asked.append([verdict.claim, f"{verdict.value:.3f}", bound, "yes" if verdict.met else "no"])
        blocks += ["## What was asked", _table(["", "measured", "asked for", "met"], asked)]
    for span, title in SPANS.items():
        blocks.append(f"## {title.capitalize()}")
        for names in [shown] if len(shown) <= 4 else pictures.values():
            found = ([_show(getattr(row, span)[metric]) for metric in names] for row in rows.values())
            lines = [[label, *cells] for label, cells in zip(labels, found, strict=True)]
            blocks.append(_table(["", *(metrics[name].words for name in names)], lines))
    drift = ([label, *map(_show, estimates)] for label, estimates in _drift(report))
    blocks += [
        f"## {_capital(words)} by frame",
        _table(["frames", *labels], drift),
        f"![samples]({SHEET})",
    ]
    for picture, names in pictures.items():
        if picture != first:
            blocks.append(f"![{', '.join(metrics[name].words for name in names)}]({picture})")
    notes = [f"*{_capital(metrics[name].words)}*: {metrics[name].explained}" for name in shown]
    notes += suite.notes
    if undefined := [metric.words for name, metric in metrics.items() if name not in shown]:
        notes.append(f"Not defined for these videos: {', '.join(undefined)}.")
    notes.append("A dash is a value that is not defined.")
    blocks += [
        "## How it was measured",
        "\n".join(f"- {note}" for note in notes),
        f"All numbers are in `metrics.json`. Computed in {report.seconds:.0f} s; to do it again from the "
        "same directory:",
        f"    self-forcing evaluate {_relative(settings.output, report.config.root)}/config.yaml",
    ]
    return "\n\n".join(blocks) + "\n"
