"""How fast the streaming service is: `python -m tests.benchmarks.streaming [--quick]`.

Writes what it measured as JSON and as a page of tables, for a student of the quickstart's size and for one of
about 30 M parameters. Weights are random unless `--model` names a student: the speed is the same.
"""

import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from jsonargparse import ArgumentParser

from infra.provenance import git_commit, versions
from model.transformer import TransformerConfig
from pipelines.cli import parse
from pipelines.console import say
from tests.benchmarks import engine, service
from tests.benchmarks.report import COMPARED, Measured, goals, show, write_page
from tests.fixtures import write_model
from workers.model_directory import ModelDirectory
from workers.streamer import Streamer

PUBLISHED_WINDOW = 21
HURRIED = 1000
"""Frames a second that no model reaches here, so that the service never waits until a chunk is due."""


@dataclass(frozen=True)
class Settings:
    """What is measured, and how thoroughly."""

    model: str | None = None
    """Directory of a student to measure as the small one; random weights of the quickstart's size by
    default."""
    out: str = "docs/results/streaming"
    """Results are written here, with .json and .md at the end."""
    sizes: tuple[str, ...] = ("small", "large")
    """Of `small` and `large`."""
    viewers: tuple[int, ...] = (1, 2, 4, 8, 16)
    """Numbers of viewers at once."""
    watched: tuple[int, ...] = (1, 2, 8)
    """Of them, those over the network."""
    repeats: int = 20
    """Newcomers whose first frames are timed, and turns of each comparison."""
    chunks: int = 30
    """Chunks that are timed of each stream."""
    rates: tuple[float, ...] = (2, 4, 8, 16, 24)
    """Frame rates asked for."""
    slots: int = 128
    """Sessions that fit in memory."""
    frames: int = 10_000
    """Length of the long stream."""
    service: bool = True
    """Whether Serve, HTTP and a promotion are measured too."""
    threads: int = 1
    """Threads that the engine computes with; a replica has one for each CPU that it reserves."""


QUICK = Settings(
    out="outputs/streaming",
    sizes=("small",),
    viewers=(1, 2),
    watched=(1,),
    repeats=2,
    chunks=3,
    rates=(8,),
    slots=4,
    frames=120,
    service=False,
)


def large(small: TransformerConfig) -> TransformerConfig:
    """About 30 M parameters on the same latents."""
    return replace(small, dim=384, ffn_dim=1536, num_heads=6, num_layers=12)


def fewer(settings: Settings) -> Settings:
    """What there is time for with the large model."""
    return replace(
        settings,
        repeats=-(-settings.repeats // 4),
        frames=settings.frames // 5,
        watched=tuple(sorted({min(settings.watched), max(settings.watched)})),
    )


def variant(model: str, path: Path, *, window: int | None = None, fps: int | None = None) -> str:
    """The same model with another window or frame rate."""
    source = ModelDirectory(model)
    card = source.card
    assert card.rollout is not None, "it is a student"
    write_model(
        path,
        card.transformer,
        seed=0,
        rollout=replace(card.rollout, window=window or card.rollout.window),
        video=replace(card.video, fps=fps or card.video.fps),
        weights={weight: source.get(weight) for weight in source.keys()},  # noqa: SIM118 (not a mapping)
    )
    return str(path)


def measure(name: str, model: str, settings: Settings, scratch: Path) -> Measured:
    """Everything about one student."""
    streamer = Streamer(model, max(*settings.viewers, 2))
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
    recomputing = []
    for window in sorted({streamer.config.window or 0, PUBLISHED_WINDOW}):
        progress(f"a window of {window} frames")
        again = Streamer(variant(model, scratch / f"{name}-{window}", window=window), COMPARED)
        for viewers in (1, COMPARED):
            recomputing.append(engine.recomputing(again, viewers, chunks=settings.repeats))
    progress(f"a stream of {settings.frames} frames")
    endless = engine.endless(streamer, frames=settings.frames, chunks=2 * settings.chunks)
    overhead: list[service.Overhead] = []
    promotion: list[service.Promotion] = []
    if settings.service:
        progress("Serve and HTTP")
        usual = streamer.card.video.fps
        overhead, promotion = service.measure(
            name,
            variant(model, scratch / f"{name}-hurried", fps=HURRIED),
            model,
            streamer,
            scratch / name,
            viewers=settings.watched,
            # Half of what a replica holds, so that there is load and room for the new version beside it.
            loaded=max([1, *(each.sessions // 2 for each in capacity if each.fps == usual)]),
            chunks=settings.chunks,
            threads=settings.threads,
        )
    return Measured(
        name,
        sum(weight.numel() for weight in streamer.network.parameters()),
        (streamer.cache.nbytes + streamer.prompts.slots.nbytes) // streamer.slots,
        latency,
        batching,
        capacity,
        endless,
        recomputing,
        overhead,
        promotion,
    )


def main(arguments: Sequence[str]) -> None:
    parser = ArgumentParser(prog="python -m tests.benchmarks.streaming", description=__doc__)
    parser.add_class_arguments(Settings, None)
    parser.add_argument(
        "--quick", action="store_true", help="seconds instead of minutes, to see that it runs"
    )
    if "--quick" in arguments:
        parser.set_defaults(asdict(QUICK))
    options = parser.parse_args(list(arguments))
    settings = Settings(**{name: options[name] for name in Settings.__dataclass_fields__})
    torch.set_num_threads(settings.threads)
    recipe, _ = parse("run", ["quickstart"])
    results = []
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        for name in settings.sizes:
            if name == "small" and settings.model is not None:
                model = settings.model
            else:
                sizes = recipe.student if name == "small" else large(recipe.student)
                model = str(scratch / f"{name}-model")
                write_model(model, sizes, seed=1, rollout=recipe.rollout, video=recipe.video)
            results.append(measure(name, model, settings if name == "small" else fewer(settings), scratch))
            show(results[-1])
            # What was measured stays, should the next model not end.
            write(settings, results, arguments)


def write(settings: Settings, results: Sequence[Measured], arguments: Sequence[str]) -> None:
    """The JSON and the page at `settings.out`."""
    out = Path(settings.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    body = {
        "settings": asdict(settings),
        "machine": {
            "processor": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
            "device": "cuda" if torch.cuda.is_available() else "cpu",
        },
        "made_with": versions() | git_commit(),
        "goals": {each.name: [asdict(goal) for goal in goals(each)] for each in results},
        "results": [asdict(each) for each in results],
    }
    out.with_suffix(".json").write_text(json.dumps(body, indent=1).replace("NaN", "null"))
    machine = f"{os.cpu_count()} cores, {settings.threads} of them for the engine"
    command = " ".join(["python -m tests.benchmarks.streaming", *arguments])
    write_page(out.with_suffix(".md"), results, machine, command)
    say(f"written: {out}.md and {out}.json")


if __name__ == "__main__":
    main(sys.argv[1:])
