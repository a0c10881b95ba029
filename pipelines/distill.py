"""`self-forcing distill`: Self Forcing with a student, a teacher and a critic, each a group of Ray actors."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
from torch import Tensor

from infra import storage
from infra.tracking import Tracker
from model.codec import enlarge
from model.rollout_plan import RolloutPlan
from orchestrator.alarms import Diverging
from orchestrator.checkpoints import Cadence, Checkpoints, load
from orchestrator.cluster import Cluster, connect
from orchestrator.config import RunConfig
from orchestrator.coordinator import Coordinator, NotFinite
from orchestrator.handover import check_roles
from orchestrator.recovery import Event
from orchestrator.roles import placed_roles, ranks_of
from orchestrator.run_state import RunState
from orchestrator.supervisor import Supervisor
from pipelines import selection
from pipelines.console import Display, say, summary
from pipelines.evaluate import make_report
from pipelines.media import contact_sheet, grid, write_pixels
from pipelines.register import check_finish, finish
from pipelines.selection import selecting
from pipelines.stopping import stoppable
from pipelines.tracked import Ready, allowed, exclusive, located, opened, tracking
from pipelines.watched import Watch
from workers.data_check import check, check_negative
from workers.model_directory import ModelCard, ModelDirectory
from workers.reference import reference_of

SAMPLES = 8


def check_models(config: RunConfig) -> dict[str, ModelDirectory]:
    """The models that the roles start from, checked like the data; ValueError names the setting."""
    paths = {
        "student": config.distill.student,
        "critic": config.distill.critic or config.distill.teacher,
    }
    if config.distill.needs_teacher:
        paths = {"teacher": config.distill.teacher, **paths}
    models = {role: ModelDirectory(path) for role, path in paths.items()}
    notes = check_roles(config, models)
    settings, skip = (config.text, config.student), config.data.skip_damaged
    encoder = models["student"].card.text_digest
    notes += check("data.train", config.data.train, *settings, skip_damaged=skip, encoder=encoder)
    if (real := config.data.real) is not None:
        video = config.video
        notes += check("data.real", real, *settings, video=video, skip_damaged=skip, encoder=encoder)
    if config.distill.needs_teacher:
        guide = config.distill.roles.teacher
        check_negative(guide.negative_prompt, guide.negative_embedding, config.teacher, encoder)
    selection.check(config, models["student"])
    for note in notes:
        say(f"distill: {note}")
    return models


def distill(
    config: RunConfig,
    models: Mapping[str, ModelDirectory],
    state: RunState,
    *,
    tracker: Tracker,
    grows: bool,
) -> str:
    """Run to the last iteration on the connected cluster, and return the distilled student's path."""
    settings, data = config.distill, config.data
    pairs, skip = config.initialize.pairs_path, data.skip_damaged
    reference = reference_of(config.video, data.held_out, pairs, skip_damaged=skip)
    watch = Watch(config, reference, state.done)
    with (
        placed_roles(config, grows=grows, reference=reference) as roles,
        selecting(
            config,
            state,
            roles.groups["student"],
            card_of(config, models, state.run_id or ""),
            tracker,
            grows=grows,
        ) as states,
        Checkpoints(state, roles.groups) as checkpoints,
        stoppable("distill") as stopping,
    ):
        roles.start(*roles.groups)
        for role in roles.groups:
            say(f"distill: {role} on node {', '.join(dict.fromkeys(roles.nodes(role)))}")
        if state.checkpoint:
            load(state.checkpoint, roles.groups)
        with Display("distill", settings.iterations, done=state.done) as display:

            def returned(event: Event) -> None:
                """Updates go on after a fault; what was measured of later ones is measured again."""
                assert event.back_to is not None
                told = f"{event.kind}, found after {event.at} iterations: {event.what}"
                say(f"distill: FAULT ({told}); going on from {event.back_to} after {event.seconds:.1f} s")
                if roles.config is not roles.full:
                    ranks = ", ".join(f"{each.ranks} {role}" for role, each in ranks_of(roles.config).items())
                    say(f"distill: with {ranks}, until nodes are back")
                counts = {"faults": len(supervisor.recovery.events), "seconds/recovery": event.seconds}
                tracker.metrics(event.at, {f"fault/{name}": value for name, value in counts.items()})
                watch.back_to(event.back_to)

            def after(done: int, metrics: Mapping[str, float]) -> bool:
                """What else an iteration asks for; whether the run ends with it."""
                display.update(done, shown(metrics))
                stored = survived(checkpoints, checkpoints.look)
                tracker.metrics(done, {**metrics, **watch.look(done, metrics), **stored})
                last = states.after(done) or done == settings.iterations
                leaving, stop = supervisor.leaving(), bool(stopping)  # a signal may come at any moment
                if leaving:
                    say(f"distill: node {', '.join(leaving)} is being drained: a checkpoint is made")
                if cadence.due(done, asked=last or stop or bool(leaving)):
                    position = supervisor.coordinator.plan.position(done, "student", 0)
                    tracker.metrics(done, checkpointed(checkpoints, done, position))
                    watch.write()
                if settings.sample_every and (done % settings.sample_every == 0 or last):
                    for file in sample(config, supervisor.coordinator, done):
                        tracker.artifact(file, "samples")
                if stop and not last:
                    tracker.metrics(done, survived(checkpoints, checkpoints.end))
                    raise stopping.stop(done)
                return last

            def finish(done: int) -> str:
                if states.ended(done) and done < settings.iterations:
                    patience, by = settings.selection.patience, settings.selection.by
                    without = f"{patience} measurements without a better {by}"
                    say(f"distill: stopped after iteration {done}, {without}")
                tracker.metrics(done, checkpoints.end())
                return states.publish(done)

            cadence = Cadence(settings.checkpoint_every, settings.checkpoint_minutes)
            supervisor = Supervisor(state, roles, checkpoints, settings.faults, returned)
            try:
                return finish(state.done) if states.ended(state.done) else supervisor.run(after, finish)
            except (FloatingPointError, Diverging) as error:
                survived(checkpoints, checkpoints.end)  # it may hold what led there, and is then moved aside
                raise ended_by(error, state, supervisor.done) from error
            finally:
                for file in watch.write():
                    tracker.artifact(file, "watch")


def ended_by(error: Exception, state: RunState, done: int) -> Exception:
    """The error that ends the run, from one that came up after `done` iterations."""
    match error:
        case NotFinite():
            # A student that has just stepped is found out by the critic, which learns from its videos; else
            # the critic has learned last.
            likely = ("student", "critic") if error.since > error.iteration else ("critic", "student")
            return state.stop(str(error), since=error.since, until=error.iteration, rates=rates(*likely))
        case Diverging():
            # The first such update made its videos with the weights that it began with.
            return state.stop(
                f"distill: {error}",
                since=error.since - 1,
                until=done,
                rates=rates("student", "critic"),
                aside="diverging",
            )
        case _:  # in what was learned, while it was copied
            what = f"{error} after iteration {done - 1}"
            return state.stop(what, since=done, until=done, rates=rates("student", "critic"))


def checkpointed(checkpoints: Checkpoints, done: int, position: int) -> dict[str, float]:
    """Begin a checkpoint, once the one before is stored; what was measured of either."""
    began = time.perf_counter()
    before = survived(checkpoints, checkpoints.end)
    checkpoints.begin(done, position)
    return {**before, "seconds/checkpoint": time.perf_counter() - began}


def survived(checkpoints: Checkpoints, wait: Callable[[], dict[str, float]]) -> dict[str, float]:
    """What `wait` measures; a checkpoint that cannot be stored is said, and training goes on to the next."""
    done = checkpoints.pending
    try:
        return wait()
    except storage.StorageError as error:
        assert done is not None
        say(f"distill: WARNING: no checkpoint after iteration {done - 1}, the next will be tried: {error}")
        return {}


def rates(*roles: str) -> list[str]:
    """Settings of the roles' learning rates."""
    return [f"distill.roles.{role}.engine.learning_rate" for role in roles]


def shown(metrics: Mapping[str, float]) -> dict[str, float]:
    """The losses that a person follows."""
    names = {"student/loss": "student", "critic/loss": "critic"}
    return {short: metrics[name] for name, short in names.items() if name in metrics}


def sample(config: RunConfig, coordinator: Coordinator, done: int) -> list[Path]:
    """A video and a contact sheet of the student as it is now, written where the frames are, not here."""
    if config.video.make_codec() is None:
        return []
    # Each rank makes no more at once than it has room for in training.
    ranks, frames = len(coordinator.student.actors), []
    size = max(min(coordinator.plan.size, SAMPLES) // ranks, 1) * ranks
    for first in range(0, SAMPLES, size):
        inputs = coordinator.inputs(first, list(range(first, first + size)))
        given = config.distill.given_frames
        plan = RolloutPlan.full(config.rollout, config.video.frames, seed=config.seed, given_frames=given)
        _, filmed = coordinator.student.scatter("film", plan, inputs, makes=("frames",))
        frames += filmed["frames"]
    stem = f"{config.distill.output}/samples/{done:07d}"
    files = ray.get(write_samples.remote(stem, config.video.fps, *frames[:SAMPLES]))
    return [storage.on_disk(file) for file in files]


@ray.remote(num_cpus=0)
def write_samples(stem: str, fps: int, *videos: Tensor) -> list[str]:
    """Write videos uint8 [T, height, width, 3] as `stem`.mp4 and `stem`.png; returns their paths."""
    pixels = [video.numpy() for video in videos]
    write_pixels(f"{stem}.mp4", enlarge(grid(pixels)), fps)
    contact_sheet(f"{stem}.png", pixels)
    return [f"{stem}.mp4", f"{stem}.png"]


def lineage(models: Mapping[str, ModelDirectory]) -> dict[str, str]:
    """Tracking runs that the roles' models come from, the student's own last."""
    return {**models.get("teacher", models["critic"]).card.lineage, **models["student"].card.lineage}


def card_of(config: RunConfig, models: Mapping[str, ModelDirectory], run_id: str) -> ModelCard:
    """The distilled student's."""
    return ModelCard(
        True,
        config.student,
        config.video,
        models["student"].card.text,
        rollout=config.rollout,
        shift=config.rollout.shift,
        dtype=config.distill.roles.student.engine.dtype,
        text_digest=models["student"].card.text_digest,
        lineage={**lineage(models), "distilled": run_id},
        recipe=config.portable(),
    )


def make_student(config: RunConfig, *, resume: bool, allow: Sequence[str] = ()) -> Ready:
    """Check all that distillation starts from; returns what distils, with a tracking run of its own."""
    models = check_models(config)
    state = opened(config, "distill", resume=resume, allow=allow)

    def make(cluster: Cluster) -> None:
        with tracking(config, state.stage, state.output, lineage(models), state) as tracker:
            begun, grows = replace(state, run_id=tracker.run_id), not cluster.started_here
            path = distill(config, models, begun, tracker=tracker, grows=grows)
            samples = storage.stored(f"{state.output}/samples", ".mp4") or []
            rows = {"model": path, "tracking": tracker.how_to_open()}
            summary("Distilled student", rows | ({"sample video": str(samples[-1])} if samples else {}))

    return make


def command(config: RunConfig, options: Any) -> None:
    config = located("distill", config)
    check_finish(config, options)
    with exclusive(config, "distill"):
        run = make_student(config, resume=options.resume, allow=allowed(options))
        with connect(options.address) as cluster:
            run(cluster)
            if options.register is not None:
                make_report(config, resume=True)
                finish(config, options)
