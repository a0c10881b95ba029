"""What an experiment found, as a table, drift curves and a contact sheet.

Numbers are means over seeds; what follows ± is the standard deviation between seeds, and bands in the
pictures go from the lowest to the highest seed.
"""

import itertools
import json
import math
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from infra import storage
from model.metrics import Estimate
from orchestrator.config import RunConfig
from pipelines.digits.cells import REFERENCES, Experiment
from pipelines.digits.suite import SHEET, SUITE
from pipelines.plots import LOOKS, Look, Panel, plot_curves, plot_samples

METRICS = {name: metric.words for name, metric in SUITE.metrics.items()}
PICTURES = {name: metric.picture for name, metric in SUITE.metrics.items()}
_PALETTE = ("#D55E00", "#CC79A7", "#009E73", "#000000", "#56B4E9")
"""What is left of the palette beside the references."""
_BEGIN, _END = "<!-- findings -->", "<!-- /findings -->"
"""What stands between these in a report is a person's, and stays when the report is written anew."""


class Found:
    """The measurements that are there so far."""

    def __init__(self, experiment: Experiment, config: RunConfig, cells: str):
        self.experiment, self.config = experiment, config
        self.samples: dict[str, Tensor] = {}
        references = self._read(f"{cells}/references")
        self.curves = {name: _curves([references["rows"][name]]) for name in REFERENCES}
        """By row and metric, `[seeds, F]`."""
        self.seeds: dict[str, list[int]] = {}
        self.seconds: dict[str, list[float]] = {}
        self.total = sum(references["seconds"].values())
        for cell in experiment.cells:
            paths = {seed: f"{cells}/{cell.name}-{seed}" for seed in experiment.seeds}
            there = {seed: self._read(path) for seed, path in paths.items() if storage.is_complete(path)}
            if there:
                self.curves[cell.name] = _curves([body["rows"][cell.name] for body in there.values()])
                self.seeds[cell.name] = list(there)
                self.seconds[cell.name] = [body["seconds"]["train"] for body in there.values()]
                self.total += sum(sum(body["seconds"].values()) for body in there.values())

    def _read(self, path: str) -> dict[str, Any]:
        with storage.reading(path) as directory:
            self.samples = load_file(directory / "samples.safetensors") | self.samples
            return json.loads((directory / "metrics.json").read_text())

    @property
    def spans(self) -> dict[str, slice]:
        trained = self.config.video.frames
        third = trained - max(1, trained // 3)
        return {
            f"frames 0–{trained - 1}": slice(0, trained),
            f"frames {third}–{trained - 1}": slice(third, trained),
            f"frames {trained}–{self.config.evaluate.frames - 1}": slice(trained, None),
        }

    def difference(self, name: str, other: str, metric: str, span: slice) -> Tensor:
        """Of two rows' means over a span, seed by seed, where both are there."""
        both = [seed for seed in self.seeds[name] if seed in self.seeds[other]]
        here, there = (
            self.over(each, metric, span)[[self.seeds[each].index(seed) for seed in both]]
            for each in (name, other)
        )
        return here - there

    def over(self, name: str, metric: str, span: slice) -> Tensor:
        """The mean over a span of frames, one a seed, `[seeds]`."""
        part = self.curves[name][metric][:, span]
        return part.nanmean(dim=1) if part.shape[1] else torch.full((len(part),), math.nan)


def _curves(rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    """Each metric of the rows, `[rows, F]`; NaN where it is not defined."""
    values = {metric: [row[metric]["value"] for row in rows] for metric in METRICS}
    return {metric: torch.from_numpy(np.array(each, np.float32)) for metric, each in values.items()}


def write_report(
    experiment: Experiment, config: RunConfig, cells: str, overrides: Sequence[str]
) -> list[Path]:
    """Write `results`.md, its pictures and its numbers, and return their paths."""
    found = Found(experiment, config, cells)
    folder = Path(config.root) / experiment.results
    looks = dict(LOOKS)
    for index, cell in enumerate(experiment.cells):
        looks[cell.name] = Look(
            cell.title, _PALETTE[index % len(_PALETTE)], "-" if cell.stage == "distill" else "--"
        )
    for metric, picture in PICTURES.items():
        curves = {
            name: Estimate(each[metric].nanmean(0), each[metric].amin(0), each[metric].amax(0))
            for name, each in found.curves.items()
        }
        plot_curves(
            folder / picture,
            [Panel(METRICS[metric], curves, share=SUITE.metrics[metric].share)],
            trained=config.video.frames,
            looks=looks,
        )
    plot_samples(
        folder / "contact_sheet.png",
        {name: found.samples[name] for name in found.curves},
        SHEET,
        trained=config.video.frames,
        chunk=config.rollout.chunk,
        looks=looks,
    )
    report = folder.with_suffix(".md")
    storage.write_text(report, _markdown(found, report, overrides, looks))
    return [report, *(folder / picture for picture in (*PICTURES.values(), "contact_sheet.png"))]


def _markdown(found: Found, report: Path, overrides: Sequence[str], looks: Mapping[str, Look]) -> str:
    experiment, config = found.experiment, found.config
    count = sum(map(len, found.seconds.values()))
    every = len(experiment.cells) * len(experiment.seeds)
    folder = Path(experiment.results).name
    command = shlex.join(["self-forcing", "experiment", experiment.name, *overrides])
    accuracy = "digit_accuracy"
    lines = [
        f"# {experiment.title}",
        "",
        f"`{command}` ({count} of {every} cells, seeds {', '.join(map(str, experiment.seeds))}; "
        f"{found.total / 60:.0f} minutes in all). {config.evaluate.videos} videos of each model, in chunks "
        f"of {config.rollout.chunk} frames; the trained length is {config.video.frames} frames. Numbers are "
        "means over seeds ± their standard deviation.",
        "",
        _kept(report),
        "",
        f"![digit accuracy by frame]({folder}/{PICTURES[accuracy]})",
        "",
    ]
    spans = found.spans
    for metric, words in METRICS.items():
        timed = metric == accuracy
        rows = []
        for name in found.curves:
            values = [_show(found.over(name, metric, span)) for span in spans.values()]
            minutes = torch.tensor(found.seconds.get(name, [math.nan])).mean() / 60
            values += [] if not timed else ["–" if minutes.isnan() else f"{minutes:.1f}"]
            rows.append([looks[name].label, *values])
        head = ["", *spans, *(["minutes of training"] if timed else [])]
        lines += [f"## {words.capitalize()}", "", *_table(head, rows), ""]
    lines += ["## Digit accuracy, differences seed by seed", ""]
    later = list(spans)[1:]
    rows = []
    for one, other in itertools.product(experiment.cells, experiment.cells):
        groups = (one.group, other.group)
        if groups == ("self_forcing", "forced") and {one.name, other.name} <= found.curves.keys():
            gaps = [found.difference(one.name, other.name, accuracy, spans[span]) for span in later]
            label = f"{looks[one.name].label} − {looks[other.name].label}"
            rows.append([label, *(_show(gap, sign="+") for gap in gaps)])
    lines += _table(["", *later], rows)
    lines += [
        "",
        *(
            f"![{METRICS[metric]}]({folder}/{picture})\n"
            for metric, picture in PICTURES.items()
            if metric != accuracy
        ),
        f"![samples]({folder}/contact_sheet.png)",
        "",
        "Bands go from the lowest to the highest seed. Every cell's numbers, versions and commit are in "
        f"`{folder}/cells/`. [The evaluation of one run](digits/report.md) says how each number is measured.",
        "",
    ]
    return "\n".join(lines)


def _kept(report: Path) -> str:
    """The findings of a report that is there already, with their marks."""
    text = report.read_text() if report.exists() else ""
    if _BEGIN in text and _END in text:
        return text[text.index(_BEGIN) : text.index(_END) + len(_END)]
    return f"{_BEGIN}\n{_END}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)]


def _show(values: Tensor, sign: str = "") -> str:
    """The mean over seeds ± the standard deviation between them, where there are several."""
    if not len(values) or values.isnan().any():
        return "–"
    spread = f" ± {values.std():.3f}" if len(values) > 1 else ""
    return f"{values.mean():{sign}.3f}{spread}"
