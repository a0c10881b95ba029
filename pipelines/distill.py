"""`self-forcing distill`: Self Forcing with a student, a teacher and a critic, each a group of Ray actors."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import ray
from torch import Tensor

from infra import storage
from infra.tracking import Tracker
from model.rollout_plan import RolloutPlan
from orchestrator import checkpoint
from orchestrator.cluster import Cluster, connect
from orchestrator.config import RunConfig
from orchestrator.coordinator import Coordinator
from orchestrator.handover import check_roles
from orchestrator.roles import placed_roles
from pipelines.console import Display, say, summary
from pipelines.media import contact_sheet, grid, write_video
from pipelines.tracked import located, run_id_of, tracking
from workers.data_check import check, check_negative
from workers.model_directory import ModelCard, ModelDirectory, VideoConfig

SAMPLES = 8
MAY_CHANGE = (
    "iterations",
    "overlap",
    "checkpoint_every",
    "keep",
    "sample_every",
    "output",
    "teacher",
    "student",
    "critic",
)
"""Settings of `distill` that do not change the numbers, so a resumed run may have others."""


def numbers(config: RunConfig) -> dict[str, Any]:
    """The part of the config that decides what is computed."""
    whole = asdict(config)
    distill = {name: value for name, value in whole["distill"].items() if name not in MAY_CHANGE}
    kept = ("seed", "video", "text", "teacher", "student", "rollout", "score")
    return {**{name: whole[name] for name in kept}, "distill": distill}


def check_models(config: RunConfig) -> dict[str, ModelDirectory]:
    """The models that the roles start from, checked like the data; ValueError, naming the setting, if one is amiss."""
    paths = {
        "student": config.distill.student,
        "critic": config.distill.critic or config.distill.teacher,
    }
    if config.distill.needs_teacher:
        paths = {"teacher": config.distill.teacher, **paths}
    models = {role: ModelDirectory(path) for role, path in paths.items()}
    notes = check_roles(config, models)
    settings, skip = (config.text, config.student), config.data.skip_damaged
    notes += check("data.train", config.data.train, *settings, skip_damaged=skip)
    if config.data.real is not None:
        notes += check("data.real", config.data.real, *settings, video=config.video, skip_damaged=skip)
    if config.distill.needs_teacher:
        guide = config.distill.roles.teacher
        check_negative(guide.negative_prompt, guide.negative_embedding, config.teacher)
    for note in notes:
        say(f"distill: {note}")
    return models


def distill(
    config: RunConfig, models: Mapping[str, ModelDirectory], *, tracker: Tracker, resume: bool, grows: bool
) -> str:
    """Run to the last iteration on the connected cluster, and return the distilled student's path."""
    checkpoints = f"{config.distill.output}/checkpoints"
    found = checkpoint.newest(checkpoints)
    if found and not resume:
        raise ValueError(
            f"{config.distill.output} already holds checkpoints; continue with --resume, or choose another distill.output."
        )
    start = 0
    if found:
        path, metadata = found
        changed = differences(metadata["numbers"], numbers(config))
        if changed:
            raise ValueError(
                f"{path} was made with another {changed[0]}; resume with the same, or choose another distill.output."
            )
        start = metadata["iteration"]
        say(f"distill: resuming from iteration {start} ({path})")
    settings = config.distill
    with placed_roles(config, grows=grows) as roles:
        for role, group in roles.groups.items():
            roles.start(role)
            nodes = dict.fromkeys(group.wait(group.broadcast("node")))
            say(f"distill: {role} on node {', '.join(nodes)}")
        coordinator = Coordinator(config, roles.groups)
        groups = {"student": coordinator.student, "critic": coordinator.critic}
        if found:
            checkpoint.load(found[0], groups)
        with Display("distill", settings.iterations, done=start) as display:
            for done, metrics in coordinator.run(start):
                display.update(done, shown(metrics))
                tracker.metrics(done, metrics)
                last = done == settings.iterations
                if done % settings.checkpoint_every == 0 and not last:
                    state = {"numbers": numbers(config), "run_id": tracker.run_id}
                    checkpoint.save(checkpoints, done, groups, state, settings.keep)
                if settings.sample_every and (done % settings.sample_every == 0 or last):
                    for file in sample(config, coordinator, models["student"], done):
                        tracker.artifact(file, "samples")
        return export(config, coordinator, models, tracker.run_id)


def shown(metrics: Mapping[str, float]) -> dict[str, float]:
    """The losses that a person follows."""
    names = {"student/loss": "student", "critic/loss": "critic"}
    return {short: metrics[name] for name, short in names.items() if name in metrics}


def sample(config: RunConfig, coordinator: Coordinator, student: ModelDirectory, done: int) -> list[Path]:
    """A video and a contact sheet of the student as it is now, written where the frames are, not here."""
    if config.video.make_codec() is None:
        return []
    ranks = len(coordinator.student.actors)
    count = max(SAMPLES // ranks, 1) * ranks
    inputs, _ = coordinator.inputs(0, list(range(count)))
    given = config.distill.given_frames
    plan = RolloutPlan.full(config.rollout, config.video.frames, seed=config.seed, given_frames=given)
    _, videos = coordinator.student.scatter("rollout", plan, inputs, makes=("video",))
    stem = f"{config.distill.output}/samples/{done:07d}"
    files = ray.get(write_samples.remote(stem, config.video, *videos["video"]))
    return [Path(file) for file in files]


@ray.remote(num_cpus=0)
def write_samples(stem: str, video: VideoConfig, *latents: Tensor) -> list[str]:
    """Decode latent videos [F, C, H, W] and write `stem`.mp4 and `stem`.png; returns their paths."""
    codec = video.make_codec()
    assert codec is not None, "there is nothing to look at without a codec"
    frames = [codec.decode(latent[None])[0] for latent in latents]
    write_video(f"{stem}.mp4", grid(frames), video.fps)
    contact_sheet(f"{stem}.png", frames)
    return [f"{stem}.mp4", f"{stem}.png"]


def lineage(models: Mapping[str, ModelDirectory]) -> dict[str, str]:
    """Tracking runs that the roles' models come from, the student's own last."""
    return {**models.get("teacher", models["critic"]).card.lineage, **models["student"].card.lineage}


def export(
    config: RunConfig, coordinator: Coordinator, models: Mapping[str, ModelDirectory], run_id: str
) -> str:
    """Publish the distilled student."""
    path = f"{config.distill.output}/model"
    card = ModelCard(
        True,
        config.student,
        config.video,
        models["student"].card.text,
        rollout=config.rollout,
        shift=config.rollout.shift,
        lineage={**lineage(models), "distilled": run_id},
        recipe=config.portable(),
    )
    staging = storage.begin(path)
    coordinator.student.wait(coordinator.student.broadcast("export", staging, card))
    storage.publish(staging, path, {"causal": True})
    return path


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Dotted names of settings that differ."""
    names = []
    for name in sorted(old.keys() | new.keys()):
        a, b = old.get(name), new.get(name)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            names += differences(a, b, f"{prefix}{name}.")
        elif plain(a) != plain(b):
            names.append(prefix + name)
    return names


def plain(value: Any) -> Any:
    """As JSON gives it back."""
    return [plain(item) for item in value] if isinstance(value, list | tuple) else value


def make_student(config: RunConfig, cluster: Cluster, *, resume: bool) -> None:
    """Distil the student, with its own tracking run."""
    models = check_models(config)
    parents = lineage(models)
    newest = storage.newest_complete(f"{config.distill.output}/checkpoints") if resume else None
    with tracking(config, "distill", config.distill.output, parents, run_id_of(newest)) as tracker:
        path = distill(config, models, tracker=tracker, resume=resume, grows=not cluster.started_here)
        samples = sorted(Path(config.distill.output).glob("samples/*.mp4"))
        rows = {"model": path, "tracking": tracker.how_to_open()}
        summary("Distilled student", rows | ({"sample video": str(samples[-1])} if samples else {}))


def command(config: RunConfig, options: Any) -> None:
    config = located("distill", config)
    with connect(options.address) as cluster:
        make_student(config, cluster, resume=options.resume)
