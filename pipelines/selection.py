"""Keep the best: the recipe's suite measures the student while it trains.

Every `distill.selection.every` iterations the averaged weights are exported as a model, and an actor with
devices of its own makes videos with it and measures them while training goes on. The prompts, the noises and
the held-out videos are the same every time; the noises are none of an evaluation's. A measurement that is due
while the one before still runs waits for that, so training is never ahead by more than one.

An export is a whole model: at 14B 57 GB of fp32, tensor by tensor to rank 0's disk, then hashed. At 1 GB/s
training stands still for about two minutes each time; `keep` + 1 of them lie on the disk.
"""

import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import ray
import torch
from ray import ObjectRef
from ray.actor import ActorHandle
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from infra import storage
from infra.tracking import Tracker
from orchestrator import run_state
from orchestrator.cluster import release, reserve
from orchestrator.config import RunConfig
from orchestrator.fault import Fault
from orchestrator.run_state import RunState
from orchestrator.worker_group import WorkerGroup
from pipelines import suites
from pipelines.console import say
from pipelines.evaluate import job_of, made_by, videos_of
from pipelines.report import SPANS
from pipelines.suite import Suite
from workers.dataset import digest, is_there
from workers.generator import Generator
from workers.model_directory import ModelCard, ModelDirectory, write_card

Numbers = Mapping[str, float | None]
"""What one measurement found, by METRIC_SPAN; None where a metric is not defined."""
NUMBERS = "numbers.json"


def check_settings(config: RunConfig) -> None:
    """ValueError where the settings alone say that nothing can be measured or compared."""
    settings, name = config.distill.selection, config.evaluate.suite
    if not settings.every:
        return
    known = suites.find(name).compared
    if settings.by is None or settings.by not in known:
        raise ValueError(
            f"distill.selection.by is {settings.by}; use a number that evaluate.suite {name} compares: "
            f"{', '.join(known)}."
        )
    if config.text.encoder == "embedded":
        raise ValueError(
            f"distill.selection.every of {settings.every} asks for measurements, which write their "
            f"prompts as text, and text.encoder is {config.text.encoder}; set it to 0."
        )
    frames, trained = config.evaluate.frames, config.video.frames
    if frames < trained or (frames == trained and settings.by.endswith("_beyond")):
        raise ValueError(
            f"evaluate.frames is {frames}, and distill.selection.by {settings.by} needs "
            f"{trained + (frames == trained)} or more, for the student is trained on {trained}."
        )


def check(config: RunConfig, student: ModelDirectory) -> None:
    """The same of the data and of the model that the student starts from."""
    check_settings(config)
    if config.distill.selection.every:
        suite, asked = suites.find(config.evaluate.suite), measuring(config)
        suite.check(asked, {"initial": student})
        _held_out(suite, asked, student)


def measuring(config: RunConfig) -> RunConfig:
    """The config as an evaluation of so many videos reads it."""
    return replace(config, evaluate=replace(config.evaluate, videos=config.distill.selection.videos))


def _held_out(suite: Suite, config: RunConfig, student: ModelDirectory) -> Any:
    found = suite.held_out(config, {"initial": student}) if is_there(config.data.held_out) else None
    if found is None:
        raise ValueError(
            "distill.selection.every asks for measurements against held-out videos, and data.held_out at "
            f"{config.data.held_out} has none that evaluate.suite {config.evaluate.suite} can read; make "
            "them, or set it to 0."
        )
    return found[1]


class Measurer:
    """The actor that measures one model after the other; it keeps what they are compared with."""

    def __init__(self, config: RunConfig):
        torch.set_num_threads(config.distill.selection.threads)
        self.config = measuring(config)
        self.suite = suites.find(config.evaluate.suite)

    @cached_property
    def prepared(self) -> Any:
        student = ModelDirectory(self.config.distill.student)
        return self.suite.prepare(self.config, _held_out(self.suite, self.config, student))

    def measure(self, model: str) -> Numbers:
        """Every number of the suite, of videos that the student at the path `model` makes."""
        settings, threads = self.config.evaluate, self.config.distill.selection.threads
        generator = Generator(model, threads)
        card, job = generator.card, job_of(self.config, self.suite, generator.source)
        assert card.rollout is not None, "a student's card says how it generates"
        starts = range(0, job.videos, settings.batch)
        batches = [range(first, min(first + settings.batch, job.videos)) for first in starts]
        parts = [made_by(generator, job, part, "selection") for part in batches]
        videos = videos_of(job, {name: torch.cat([part[name] for part in parts]) for name in parts[0]})
        row = self.suite.measure(
            self.prepared,
            videos,
            chunk=card.rollout.chunk,
            trained=card.video.frames,
            seed=self.config.seed,
        )
        found = {
            f"{metric}_{span}": estimate.value.item()
            for span in SPANS
            for metric, estimate in getattr(row, span).items()
        }
        return {name: value if math.isfinite(value) else None for name, value in found.items()}


def ranked(scores: Mapping[int, float], iterations: Iterable[int]) -> list[int]:
    """These iterations, the best score first, and of equal ones the earlier."""
    return sorted(iterations, key=lambda iteration: (-scores[iteration], iteration))


def without_better(scores: Mapping[int, float]) -> int:
    """Measurements after the best one, by iteration; all of them where none has a number (−∞)."""
    best = next(iter(ranked(scores, scores)), None)
    if best is None or scores[best] == -math.inf:
        return len(scores)
    return sum(iteration > best for iteration in scores)


@dataclass
class Selection:
    """The measured states of one run."""

    config: RunConfig
    output: str  # directory of the numbers, and of the states that are kept
    run: str  # digest of the run's identity
    student: WorkerGroup
    card: ModelCard  # of the student
    tracker: Tracker
    measurer: WorkerGroup | None  # none where nothing is measured
    make_measurer: Callable[[], ActorHandle] | None = None
    numbers: dict[int, Numbers] = field(default_factory=dict)  # by iteration
    kept: list[int] = field(default_factory=list)  # whose models there are, the best first
    asked: tuple[int, ObjectRef] | None = None  # what is being measured
    failed: int | None = None  # the last state whose measurement failed

    def after(self, done: int) -> bool:
        """Measure the student if `done` iterations ask for it; whether the run ends here.

        What it answers depends on the numbers alone, and not on how long a measurement takes: where one may
        be the last, training waits for it.
        """
        settings = self.config.distill.selection
        if not settings.every or done % settings.every:
            self._collect(wait=False)
            return False
        self._measure(done)
        patience = settings.patience
        if patience is not None and self._without_better(done) >= patience - 1:
            self._collect()
        return self.ended(done)

    def ended(self, done: int) -> bool:
        """Whether patience is at its end after `done` iterations, as far as is known."""
        patience = self.config.distill.selection.patience
        return patience is not None and self._without_better(done) >= patience

    def best(self, done: int) -> int | None:
        """The best state up to `done` iterations whose model is kept; None where none has a number."""
        scores = self._scores(done)
        found = ranked(scores, [each for each in self.kept if scores.get(each, -math.inf) > -math.inf])
        return found[0] if found else None

    def publish(self, done: int) -> str:
        """Measure the last state, after `done` iterations, and publish it or the best one; its path."""
        settings, path = self.config.distill.selection, f"{self.config.distill.output}/model"
        if not settings.every:
            write_student(self.student, path, self.card)
            return path
        self._measure(done)
        self._collect()
        assert settings.by is not None, "check_settings wants one"
        best = self.best(done)
        chosen = best if settings.export == "best" and best is not None else done
        exported = "last" if settings.export == "last" or best is None else "best"
        selected: dict[str, Any] = {
            "exported": exported,
            "iteration": chosen,
            "by": settings.by,
            "value": self.numbers[chosen][settings.by],
            "best": best,
            "measured": sum(each <= done for each in self.numbers),
            "ended_at": done,
            "ended_by": "iterations" if done == self.config.distill.iterations else "patience",
        }
        card = replace(self.card, selection=selected)
        if chosen == done:
            write_student(self.student, path, card)
        else:
            copy_model(self.path(chosen), path, card)
        said = f"the {exported} state, of iteration {chosen} with {settings.by} {_shown(selected['value'])}"
        say(f"distill: exported {said}; {self.output} keeps iterations {', '.join(map(str, self.kept))}")
        self.tracker.artifact(storage.on_disk(f"{self.output}/{NUMBERS}"), "selection")
        return path

    def path(self, iteration: int) -> str:
        """Where the model of that state lies."""
        return f"{self.output}/{iteration:07d}"

    def read(self, done: int) -> None:
        """Take up what an earlier process measured, where `done` iterations are behind the run.

        Those after it count too if nothing of the run has changed since, for it comes by the same states.
        ValueError where they were measured otherwise.
        """
        storage.clean(self.output)
        file = f"{self.output}/{NUMBERS}"
        if (content := storage.read_bytes(file)) is None:
            return
        try:
            found = json.loads(content)
            measured = {int(iteration): each for iteration, each in found["measured"].items()}
            same, kept, how = found["run"] == self.run, set(found["kept"]), found["measured_as"]
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{file} cannot be read ({error}); move it away to measure anew.") from None
        there = [each for each in kept & measured.keys() if storage.is_complete(self.path(each))]
        lost = kept - set(there)
        self.numbers = {
            each: numbers for each, numbers in measured.items() if each <= done or (same and each not in lost)
        }
        if self.numbers and (changed := run_state.differences(how, self._measured_as)):
            raise ValueError(
                f"{file} was measured otherwise: {', '.join(changed.values())}; keep what it was measured "
                f"with, or move {self.output} away to measure anew."
            )
        self.kept = self._best_of([each for each in there if each in self.numbers])

    def _measure(self, done: int) -> None:
        self._collect()
        if done in self.numbers:
            return
        assert self.measurer is not None, "there is one where measurements are asked for"
        write_student(self.student, self.path(done), replace(self.card, selection={"iteration": done}))
        (actor,) = self.measurer.actors
        self.asked = done, actor.measure.remote(self.path(done))

    def _collect(self, *, wait: bool = True) -> None:
        """Take what was measured, if it is there; keep the best models, and no other."""
        if self.asked is None or self.measurer is None:
            return
        iteration, answer = self.asked
        if not wait and not ray.wait([answer], timeout=0)[0]:
            return
        try:
            self.numbers[iteration] = self.measurer.wait(answer)
        except Fault as fault:
            self._measure_again(iteration, fault)
            return self._collect(wait=wait)
        self.asked = None
        self.kept = self._best_of([*self.kept, iteration])
        self._write()
        values = {name: value for name, value in self.numbers[iteration].items() if value is not None}
        self.tracker.metrics(iteration, {f"selection/{name}": value for name, value in values.items()})
        by, best = str(self.config.distill.selection.by), self.best(iteration)
        rank = "the best so far" if best == iteration else f"the best so far is of iteration {best}"
        say(f"distill: iteration {iteration} measured, {by} {_shown(values.get(by))}; {rank}")

    def _measure_again(self, iteration: int, fault: Fault) -> None:
        """The state is on disk: another actor measures it. RuntimeError the second time."""
        assert self.measurer is not None and self.make_measurer is not None
        if self.failed == iteration:
            raise RuntimeError(f"iteration {iteration} could not be measured, twice: {fault}") from fault
        self.failed = iteration
        say(f"distill: FAULT ({fault.kind}: {fault}); iteration {iteration} is measured again")
        for actor in self.measurer.actors:
            ray.kill(actor)
        self.measurer.actors = [self.make_measurer()]
        self.asked = iteration, self.measurer.actors[0].measure.remote(self.path(iteration))

    def _write(self) -> None:
        body = {
            "by": self.config.distill.selection.by,
            "best": self.best(max(self.numbers)),
            "kept": self.kept,
            "run": self.run,
            "measured_as": self._measured_as,
            "measured": {str(each): self.numbers[each] for each in sorted(self.numbers)},
        }
        storage.write_text(f"{self.output}/{NUMBERS}", json.dumps(body, indent=1, allow_nan=False))
        kept = {os.path.basename(self.path(each)) for each in self.kept}
        for name in storage.folders(self.output):  # only now, so that what is kept is always there
            if name.isdigit() and name not in kept:
                storage.discard(f"{self.output}/{name}")

    def _scores(self, done: int) -> dict[int, float]:
        """More is better; −∞ where there is no number."""
        settings, scores = self.config.distill.selection, {}
        for iteration, numbers in self.numbers.items():
            if iteration <= done:
                value = numbers.get(str(settings.by))
                scores[iteration] = -math.inf if value is None else self._sign * value
        return scores

    @cached_property
    def _sign(self) -> int:
        return suites.find(self.config.evaluate.suite).compared[str(self.config.distill.selection.by)].sign

    def _best_of(self, iterations: Iterable[int]) -> list[int]:
        return ranked(self._scores(max(self.numbers, default=0)), iterations)[
            : self.config.distill.selection.keep
        ]

    def _without_better(self, done: int) -> int:
        return without_better(self._scores(done))

    @cached_property
    def _measured_as(self) -> dict[str, Any]:
        """What two measurements must share for their numbers to be comparable."""
        config, suite = measuring(self.config), suites.find(self.config.evaluate.suite)
        return {
            "evaluate.suite": config.evaluate.suite,
            "version of the suite": suite.version,
            **{f"evaluate.{name}": each for name, each in suite.basis(config).items()},
            "evaluate.frames": config.evaluate.frames,
            "distill.selection.videos": config.evaluate.videos,
            "seed": config.seed,
            "prompts": _digest(suite.prompts(config)),
            "data.held_out": f"sha256:{digest(config.data.held_out)}",
        }


@contextmanager
def selecting(
    config: RunConfig,
    state: RunState,
    student: WorkerGroup,
    card: ModelCard,
    tracker: Tracker,
    *,
    grows: bool,
) -> Iterator[Selection]:
    """The states of a run that goes on from `state`, with an actor that measures them where it asks for that.

    `grows` is whether more nodes may come. ValueError says which resource is missing, or that what was
    measured before cannot be compared.
    """
    settings, output = config.distill.selection, f"{config.distill.output}/selection"
    selection = Selection(config, output, _digest(state.identity), student, card, tracker, None)
    if not settings.every:
        yield selection
        return
    selection.read(state.done)
    timeout_s = config.placement.timeout_s if grows else min(config.placement.timeout_s, 5.0)
    bundle = {"CPU": settings.cpus, **({"GPU": settings.gpus} if settings.gpus else {})}
    placed = reserve([bundle], purpose="the measurements of distill.selection", timeout_s=timeout_s)
    make: Any = ray.remote(Measurer)
    where = PlacementGroupSchedulingStrategy(placed, 0)
    options = {"num_cpus": settings.cpus, "num_gpus": settings.gpus, "scheduling_strategy": where}
    selection.make_measurer = lambda: make.options(**options).remote(config)
    selection.measurer = WorkerGroup("selection", [selection.make_measurer()])
    try:
        yield selection
    finally:
        for actor in selection.measurer.actors:
            ray.kill(actor)
        release(placed)


def write_student(student: WorkerGroup, path: str, card: ModelCard) -> None:
    """Publish the student's averaged weights (the current ones where none are kept) as they are now."""
    staging = storage.begin(path)
    student.wait(student.broadcast("export", staging, card))
    storage.publish(staging, path, {"causal": card.causal})


def copy_model(source: str, path: str, card: ModelCard) -> None:
    """Publish the model at `source` as `path` with another card; StorageError where it is damaged."""
    storage.verify(source)
    staging = storage.begin(path)
    with storage.reading(source) as there, storage.writing(staging) as here:
        for name in storage.digests(source):
            (here / name).parent.mkdir(parents=True, exist_ok=True)
            if name != "model.json":
                shutil.copyfile(there / name, here / name)
        write_card(here, card)
    storage.publish(staging, path, {"causal": card.causal})


def _digest(value: Any) -> str:
    return "sha256:" + hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _shown(value: float | None) -> str:
    return "not defined" if value is None else f"{value:.4g}"
