"""How fast the streaming service is: `python -m tests.benchmarks.streaming [--quick]`.

Writes what it measured as JSON and as a page of tables, for a student of the quickstart's size and for one of about 30 M parameters. Weights
are random unless `--model` names a student: the speed is the same.
"""

import json
import math
import os
import platform
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jsonargparse import ArgumentParser
from rich.table import Table

from infra.provenance import git_commit, versions
from model.transformer import TransformerConfig
from pipelines.cli import parse
from pipelines.console import console, say
from tests.benchmarks import engine
from tests.benchmarks.engine import Batching, Capacity, Endless, Latency, Recomputing
from tests.fixtures import write_model
from workers.streamer import Streamer

PUBLISHED_WINDOW = 21
COMPARED = 8
"""Viewers for whom a batch is compared with what it replaces."""
BEGIN, END = "<!-- findings -->", "<!-- /findings -->"


@dataclass(frozen=True)
class Settings:
    """What is measured, and how thoroughly."""

    model: str | None = None
    """Directory of a student to measure as the small one; random weights of the quickstart's size by default."""
    out: str = "docs/results/streaming"
    """Results are written here, with .json and .md at the end."""
    sizes: tuple[str, ...] = ("small", "large")
    """Of `small` and `large`."""
    viewers: tuple[int, ...] = (1, 2, 4, 8, 16)
    """Numbers of viewers at once."""
    repeats: int = 20
    """Newcomers whose first frame is timed, and turns of each comparison."""
    chunks: int = 30
    """Chunks that are timed of each stream."""
    rates: tuple[float, ...] = (2, 4, 8, 16, 24)
    """Frame rates asked for."""
    slots: int = 128
    """Sessions that fit in memory."""
    frames: int = 10_000
    """Length of the long stream."""
    threads: int = 1
    """Threads that the engine computes with; a replica has one for each CPU that it reserves."""


QUICK = Settings(
    out="outputs/streaming", viewers=(1, 2), repeats=2, chunks=2, rates=(8,), slots=4, frames=120
)


@dataclass(frozen=True)
class Measured:
    """One student's figures."""

    name: str
    parameters: int
    cache_bytes: int
    """Of one session."""
    latency: Sequence[Latency]
    batching: Sequence[Batching]
    capacity: Sequence[Capacity]
    endless: Endless
    recomputing: Sequence[Recomputing]


@dataclass(frozen=True)
class Goal:
    """What the service is asked for, and what it does."""

    what: str
    value: float
    asked: str
    met: bool


def large(small: TransformerConfig) -> TransformerConfig:
    """About 30 M parameters on the same latents."""
    return replace(small, dim=384, ffn_dim=1536, num_heads=6, num_layers=12)


def measure(name: str, model: str, settings: Settings, scratch: Path) -> Measured:
    """Everything about one student."""
    streamer = Streamer(model, max(settings.viewers))
    engine.start(streamer, 1)
    engine.finish(streamer)

    def progress(what: str) -> None:
        say(f"{time.strftime('%H:%M:%S')}  {name}: {what}")

    latency, batching = [], []
    for viewers in settings.viewers:
        progress(f"{viewers} viewers")
        latency.append(engine.latency(streamer, viewers, repeats=settings.repeats, chunks=settings.chunks))
        batching.append(engine.batching(streamer, viewers, repeats=settings.repeats))
    fastest = max(each.frames_per_s for each in latency)
    roomy, capacity = Streamer(model, settings.slots), []
    for fps in settings.rates:
        progress(f"sessions at {fps:g} frames a second")
        capacity.append(engine.capacity(roomy, fps, int(fastest / fps), chunks=settings.chunks))
    progress(f"a stream of {settings.frames} frames")
    endless = engine.endless(streamer, frames=settings.frames, chunks=2 * settings.chunks)
    recomputing = []
    for window in sorted({streamer.config.window or 0, PUBLISHED_WINDOW}):
        progress(f"a window of {window} frames")
        path = scratch / f"{name}-{window}"
        card = streamer.card
        write_model(
            path, card.transformer, seed=1, rollout=replace(streamer.config, window=window), video=card.video
        )
        again = Streamer(str(path), COMPARED)
        for viewers in (1, COMPARED):
            recomputing.append(engine.recomputing(again, viewers, chunks=settings.repeats))
    return Measured(
        name,
        sum(weight.numel() for weight in streamer.network.parameters()),
        (streamer.cache.nbytes + streamer.prompts.slots.nbytes) // streamer.slots,
        latency,
        batching,
        capacity,
        endless,
        recomputing,
    )


def goals(measured: Measured) -> Iterator[Goal]:
    for each in measured.batching:
        if each.viewers == COMPARED:
            ratio = each.batch / each.interleaved
            yield Goal(
                f"frames a second of {COMPARED} viewers, one batch over interleaved",
                ratio,
                "at least 2",
                ratio >= 2,
            )
    first = max(each.first.p95 for each in measured.latency)
    yield Goal("seconds to the first frame, the slowest p95 above", first, "under 1", first < 1)
    ratio = measured.endless.late.median / measured.endless.early.median
    yield Goal(
        f"chunk time at frame {measured.endless.frames} over frame 100", ratio, "at most 1.05", ratio <= 1.05
    )
    grown = measured.endless.grown / 2**20
    yield Goal("memory grown between them, MiB", grown, "none (under 1)", grown < 1)
    for again in measured.recomputing:
        ratio = again.recomputed.median / again.cached.median
        yield Goal(
            f"rolling cache over recomputing a window of {again.window}, viewers: {again.viewers}",
            ratio,
            "at least 3.5",
            ratio >= 3.5,
        )


def tables(measured: Measured) -> Iterator[tuple[str, Sequence[str], list[Sequence[str]]]]:
    """Title, head and rows of each table."""
    yield (
        "What was asked",
        ("", "measured", "asked for", "met"),
        [
            (goal.what, f"{goal.value:.3g}", goal.asked, "yes" if goal.met else "no")
            for goal in goals(measured)
        ],
    )
    yield (
        "Latency, ms (median, p95) and throughput, the engine alone",
        ("viewers", "first frame", "p95", "chunk", "p95", "frames/s", "interleaved frames/s", "batch gains"),
        [
            (
                str(one.viewers),
                *(
                    f"{1000 * s:.0f}"
                    for s in (one.first.median, one.first.p95, one.chunk.median, one.chunk.p95)
                ),
                *(f"{speed:.1f}" for speed in (two.batch, two.interleaved)),
                f"{two.batch / two.interleaved:.2f}×",
            )
            for one, two in zip(measured.latency, measured.batching, strict=True)
        ],
    )
    yield (
        f"Sessions held with {engine.ON_TIME:.0%} of chunks on time",
        ("frames/s asked for", "sessions", "chunks on time", "frames/s in all"),
        [
            (
                f"{one.fps:g}",
                f"{one.sessions}" if one.limited else f"at least {one.sessions}",
                "–" if math.isnan(one.on_time) else f"{one.on_time:.2%}",
                f"{one.sessions * one.fps:g}",
            )
            for one in measured.capacity
        ],
    )
    end = measured.endless
    yield (
        "Endless",
        ("frame", "chunk, ms", "p95", "memory grown since, MiB"),
        [
            ("100", f"{1000 * end.early.median:.1f}", f"{1000 * end.early.p95:.1f}", "–"),
            (
                f"{end.frames}",
                f"{1000 * end.late.median:.1f}",
                f"{1000 * end.late.p95:.1f}",
                f"{end.grown / 2**20:.1f}",
            ),
        ],
    )
    yield (
        "Rolling cache against recomputing the window",
        ("window, frames", "viewers", "cached chunk, ms", "recomputed, ms", "cache gains"),
        [
            (
                f"{one.window}",
                f"{one.viewers}",
                f"{1000 * one.cached.median:.1f}",
                f"{1000 * one.recomputed.median:.1f}",
                f"{one.recomputed.median / one.cached.median:.2f}×",
            )
            for one in measured.recomputing
        ],
    )


def page(results: Sequence[Measured], machine: str, command: str, findings: str) -> str:
    lines = ["# The streaming service's speed", "", f"`{command}` on {machine}.", "", findings, ""]
    for measured in results:
        lines += [
            f"## The {measured.name} student",
            "",
            f"{measured.parameters / 1e6:.2g} M parameters; a session's cache is {measured.cache_bytes / 2**20:.2g} MiB.",
            "",
        ]
        for title, head, rows in tables(measured):
            lines += [f"### {title}", ""]
            lines += [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)] + [""]
    return "\n".join(lines)


def kept(path: Path) -> str:
    """What a person wrote about the figures, which a new run leaves alone."""
    text = path.read_text() if path.exists() else ""
    if BEGIN in text and END in text:
        return text[text.index(BEGIN) : text.index(END) + len(END)]
    return f"{BEGIN}\n{END}"


def show(measured: Measured) -> None:
    for title, head, rows in tables(measured):
        table = Table(title=f"{measured.name}: {title}")
        for column, name in enumerate(head):
            table.add_column(name, justify="left" if column == 0 else "right")
        for row in rows:
            table.add_row(*row)
        console.print(table)


def main(arguments: Sequence[str]) -> None:
    parser = ArgumentParser(prog="python -m tests.benchmarks.streaming", description=__doc__)
    parser.add_class_arguments(Settings, None)
    parser.add_argument(
        "--quick", action="store_true", help="seconds instead of minutes; its figures mean nothing"
    )
    if "--quick" in arguments:
        parser.set_defaults(asdict(QUICK))
    options = parser.parse_args(list(arguments))
    settings = Settings(**{name: options[name] for name in Settings.__dataclass_fields__})
    torch.set_num_threads(settings.threads)
    recipe, _ = parse("generate", ["quickstart"])
    small = recipe.student
    results = []
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        for name in settings.sizes:
            model = settings.model if name == "small" and settings.model else str(scratch / name)
            if model != settings.model:
                write_model(
                    model,
                    small if name == "small" else large(small),
                    seed=1,
                    rollout=recipe.rollout,
                    video=recipe.video,
                )
            results.append(measure(name, model, settings, scratch))
            show(results[-1])
    machine = {
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": settings.threads,
        "device": "cuda" if torch.cuda.is_available() else "cpu",
    }
    out = Path(settings.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    body: dict[str, Any] = {
        "settings": asdict(settings),
        "machine": machine,
        "made_with": versions() | git_commit(),
        "goals": {each.name: [asdict(goal) for goal in goals(each)] for each in results},
        "results": [asdict(each) for each in results],
    }
    out.with_suffix(".json").write_text(json.dumps(body, indent=1).replace("NaN", "null"))
    report = out.with_suffix(".md")
    command = " ".join(["python -m tests.benchmarks.streaming", *arguments])
    words = f"{machine['cores']} cores ({machine['device']}), {settings.threads} of them computing"
    report.write_text(page(results, words, command, kept(report)))
    say(f"written: {report} and {out.with_suffix('.json')}")


if __name__ == "__main__":
    main(sys.argv[1:])
