"""What makes a run this run, where it stands, and what it leaves: one way for every stage.

An identity maps dotted names, as on the command line, to what decides a stage's numbers: settings as they
are, and of each input (a model, a data set, a file) a digest of what it holds, wherever it lies. What decides
no number is not in it: places, cadence, CPUs, tracking. What was made under another identity is neither gone
on with nor taken for one's own, unless the change is allowed by name; then it is written down as a stretch.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import cache
from typing import Any, Literal

from infra import storage
from orchestrator.config import RunConfig
from workers.dataset import digest

FORMAT = 2
DROPPED_AT_MOST = 10
"""Updates in a row that may be dropped, less one, as their gradients are not finite; of fewer not all."""
Identity = Mapping[str, Any]
Stage = Literal["pretrain", "pairs", "initialize", "distill"]

_PARTS: Mapping[Stage, tuple[str, ...]] = {
    "pretrain": ("seed", "video", "text", "teacher", "pretrain"),
    "pairs": ("seed", "video", "rollout", "initialize", "distill"),
    "initialize": ("seed", "video", "text", "student", "rollout", "initialize", "distill"),
    "distill": ("seed", "video", "text", "teacher", "student", "rollout", "score", "distill"),
}
# fmt: off
_NO_NUMBERS = frozenset((
    "output", "pairs_path", "checkpoint_every", "checkpoint_minutes", "keep", "keep_every", "sample_every",
    "overlap", "samplers", "cpus", "fps", "activation_checkpointing", "min_ranks", "not_finite",
))
"""Last names of settings that say where things lie, and how a stage goes about its work."""
_NEGATIVE = "distill.roles.teacher.negative_prompt"
_NEGATIVE_FILE = "distill.roles.teacher.negative_embedding"
_VAE = "video.vae"
_INPUTS = frozenset((
    "distill.teacher", "distill.student", "distill.critic", "initialize.teacher", _NEGATIVE_FILE, _VAE,
    "text.path",
))
_PAIRS = frozenset((
    "seed", "initialize.pairs", "initialize.ode_steps", "initialize.guidance", "rollout.shift",
    "rollout.steps", "rollout.first_steps", "initialize.role.engine.dtype", _NEGATIVE,
))
_CAUSAL_PAIRS = frozenset(("rollout.chunk", "rollout.window", "rollout.sink", "rollout.positions"))
_SHAPE_PARTS = frozenset((
    "seed", "video", "text", "teacher", "student", "distill.student", "distill.critic", "initialize.teacher",
))
_SHAPE_WORDS = frozenset(("adapters", "taps", "concat_time", "method"))
"""Parts or whole names, and words of names, of what a checkpoint's numbers have the shape of."""
_LAYOUT = frozenset(("ranks", "zero_stage", "accumulation", "sequence", "gather"))
"""Last names of settings that spread the same numbers out otherwise: they differ by rounding alone."""
# fmt: on
_RENAMED = {f"{stage}.warmup": f"{stage}.role.engine.schedule.warmup" for stage in ("pretrain", "initialize")}
"""Settings of earlier releases, and what they are called now."""
_DIGEST = "sha256:"
_SHOWN_AT_MOST = 4


def settings(config: RunConfig, stage: Stage) -> dict[str, Any]:
    """The settings that decide the numbers of `stage`, by dotted name, as JSON gives them back."""
    leaves = (leaf for part in _PARTS[stage] for leaf in _leaves(part, getattr(config, part)))
    return {name: value for name, value in leaves if _decides(config, stage, name)}


def identity(config: RunConfig, stage: Stage) -> dict[str, Any]:
    """What decides the numbers of `stage`, whose inputs must be there: settings, and digests of what it
    reads."""
    found = settings(config, stage)
    for name, path in _inputs(config, stage).items():
        if name.startswith("data."):
            found[name] = _DIGEST + digest(path)
        elif name == _VAE:
            found[name] = f"{_DIGEST}{config.video.codec_digest()}"
        elif name == _NEGATIVE_FILE:
            with storage.fetched(path) as file:
                found[name] = _DIGEST + storage.file_digest(file)
        else:
            found[name] = weights_digest(path)
    return found


def weights_digest(model: str) -> str:
    """Names a model's weights and prompt encoder, but not its card, which says where it came from.

    What a stage reads of a card beside that (sizes, latents, the kind of encoder) must fit its settings.
    """
    files = {name: each for name, each in storage.digests(model).items() if name != "model.json"}
    return _DIGEST + hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()


def differences(old: Identity, new: Identity) -> dict[str, str]:
    """What differs between two identities: names, and how each is told to a person.

    A setting that an earlier release did not have was at its default.
    """
    found, defaults = {}, _defaults()
    old = {_RENAMED.get(name, name): value for name, value in old.items()}
    for name in sorted(old.keys() | new.keys()):
        before, after = old.get(name, defaults.get(name)), new.get(name, defaults.get(name))
        if before != after:
            whole = f"{_shown(before)} → {_shown(after)}"
            found[name] = f"another {name} ({whole})" if str(after).startswith(_DIGEST) else f"{name} {whole}"
    return found


def unlike(path: str, wanted: Identity) -> str | None:
    """In which settings and inputs the complete directory `path` was made unlike `wanted`: empty if in none.

    None where there is no such directory. What makes one publishes it with the metadata {"identity": …}.

    Raises:
        StorageError: its content is not what was written.
    """
    if not storage.is_complete(path):
        return None
    storage.verify(path)
    return _listed(differences(storage.read_metadata(path).get("identity", {}), wanted))


@dataclass(frozen=True)
class RunState:
    """Where a run of one stage stands, and under what it goes on. It travels to the ranks."""

    stage: Stage
    output: str
    identity: Identity
    keep: int
    """Newest checkpoints that stay, beside"""
    keep_every: int = 0
    """those after a multiple of so many updates."""
    checkpoint: str | None = None
    """The newest sound one, to be loaded first; none at the start."""
    done: int = 0
    """Updates that it holds."""
    position: int = 0
    """Samples of the data that they used."""
    stretches: tuple[Mapping[str, Any], ...] = ()
    """What was changed on the way: `from` which update on, `setting`, `old`, `new`."""
    run_id: str | None = None
    """Its tracking run."""
    notes: tuple[str, ...] = ()
    """What a person should know of it."""

    @property
    def model(self) -> str:
        return f"{self.output}/model"

    def path(self, done: int) -> str:
        """Where the checkpoint after `done` updates lies."""
        return f"{self.output}/checkpoints/{done:07d}"

    def at(self, done: int, position: int) -> "RunState":
        """Where the run stands after the checkpoint of so many updates, which used so many samples."""
        return replace(self, checkpoint=self.path(done), done=done, position=position)

    def publish(self, staging: str, done: int, position: int) -> None:
        """Turn what every rank has written to `staging` into the checkpoint after `done` updates; old ones
        go."""
        metadata = {
            "format": FORMAT,
            "stage": self.stage,
            "done": done,
            "position": position,
            "identity": self.identity,
            "stretches": self.stretches,
            "run_id": self.run_id,
        }
        storage.publish(staging, self.path(done), metadata)
        storage.prune(
            f"{self.output}/checkpoints",
            keep=self.keep,
            spare=lambda name: self.keep_every > 0 and int(name) % self.keep_every == 0,
        )

    def stop(
        self, what: str, *, since: int, until: int, rates: Sequence[str], aside: str = "not-finite"
    ) -> FloatingPointError:
        """The error that ends a run in which a number is not finite or out of its range, with a way to go on.

        Args:
            what: which number, and when.
            since: updates that made the weights which gave it.
            until: updates that were made when it was found. Checkpoints from `since` on hold those weights
                and lead there again at any learning rate, so they are moved out of the way.
            rates: settings of the learning rates that may have been too high, the likelier first.
            aside: the folder of the run's output that they are moved to.
        """
        if since == 0:
            return FloatingPointError(
                f"{what}; nothing was learned yet, so look at the models and the data that it starts from."
            )
        moved = [self.path(done) for done in range(since, until + 1) if storage.is_complete(self.path(done))]
        for path in moved:
            storage.move(path, f"{self.output}/{aside}/{os.path.basename(path)}")
        kept = f" ({', '.join(moved)} led there and is kept in {self.output}/{aside})" if moved else ""
        return FloatingPointError(
            f"{what}; go on with a lower {' or '.join(rates)}, as in "
            f"--{rates[0]} VALUE --allow-change {rates[0]} --resume{kept}."
        )


def total_of(config: RunConfig, stage: Stage) -> tuple[str, int]:
    """How many updates a stage that trains is asked for, after the name of that setting of its."""
    name = "iterations" if stage == "distill" else "updates"
    return name, getattr(getattr(config, stage), name)


def open_run(config: RunConfig, stage: Stage, *, resume: bool, allow: Sequence[str] = ()) -> RunState:
    """Where the run of `stage` in its output stands, with what killed processes left there removed.

    Args:
        config: with absolute paths; what the stage reads is there.
        stage: one that trains.
        resume: whether to go on from the newest sound checkpoint, if there is any.
        allow: settings that may be others than those the checkpoint was made with.

    Raises:
        ValueError: there are checkpoints and `resume` is false, or the run cannot go on under this config.
    """
    own = getattr(config, stage)
    total_name, total = total_of(config, stage)
    output, or_else = own.output, f"choose another {stage}.output"
    checkpoints = f"{output}/checkpoints"
    for place in (output, checkpoints, f"{output}/samples"):
        storage.clean(place)
    state = RunState(
        stage, output, identity(config, stage), getattr(own, "keep", 2), getattr(own, "keep_every", 0)
    )
    if not resume:
        if storage.newest_complete(checkpoints):
            raise ValueError(f"{output} already holds checkpoints; continue with --resume, or {or_else}.")
        return state
    path, passed_over = storage.newest_sound(checkpoints)
    notes = tuple(f"{reason.rstrip('.')}; that checkpoint is passed over." for reason in passed_over)
    if path is None:
        return replace(state, notes=notes)
    saved = storage.read_metadata(path)
    if saved.get("format") != FORMAT:
        raise ValueError(
            f"{path} has checkpoint format {saved.get('format')}, and this release reads format {FORMAT}; "
            f"use the release that wrote it, or {or_else}."
        )
    done = saved["done"]
    if total < done:
        raise ValueError(
            f"{path} has {done} updates behind it, and {stage}.{total_name} says {total}; "
            f"ask for {done} or more, or {or_else}."
        )
    changed = differences(saved["identity"], state.identity)
    if fixed := {name: told for name, told in changed.items() if _is_shape(name, saved["identity"])}:
        raise ValueError(
            f"{path} cannot go on with {_listed(fixed)}; keep what it was made with, or {or_else}."
        )
    asked = {name: told for name, told in changed.items() if name.rpartition(".")[2] not in _LAYOUT}
    if refused := {name: told for name, told in asked.items() if name not in allow}:
        raise ValueError(
            f"{path} was made otherwise: {_listed(refused)}; keep what it was made with, add "
            f"{' '.join(f'--allow-change {name}' for name in refused)}, or {or_else}."
        )
    stretches = [
        {"from": done, "setting": each, "old": saved["identity"].get(each), "new": state.identity.get(each)}
        for each in changed
    ]
    notes += tuple(f"from update {done} on {told}." for told in changed.values())
    return replace(
        state,
        checkpoint=path,
        done=done,
        position=saved["position"],
        stretches=(*saved["stretches"], *stretches),
        run_id=saved["run_id"],
        notes=(*notes, f"resuming from update {done} ({path})."),
    )


@cache
def _defaults() -> Identity:
    parts = (*_PARTS["distill"], "pretrain", "initialize")
    leaves = (leaf for part in parts for leaf in _leaves(part, getattr(RunConfig(), part)))
    return {name: value for name, value in leaves if name not in _INPUTS}


def _leaves(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """The settings of a part of the config, as JSON gives them back."""
    if is_dataclass(value):
        for field in fields(value):
            yield from _leaves(f"{name}.{field.name}", getattr(value, field.name))
    elif name.endswith(".gpus"):
        yield name, "some" if value else "none"  # how much of one is placement
    else:
        yield name, json.loads(json.dumps(value))


def _decides(config: RunConfig, stage: Stage, name: str) -> bool:
    """Whether a setting of one of the stage's parts decides its numbers; what is read is there by digest."""
    method = config.initialize.chosen
    if name.rpartition(".")[2] in _NO_NUMBERS or name in _INPUTS:
        return False
    if name == "distill.iterations" or name.startswith(
        ("distill.selection.", "distill.alarms.", f"{stage}.faults.")
    ):
        return False  # where it ends, what is exported and what is said moves no number of any state
    if name == _NEGATIVE and config.text.column == "embedding":
        return False
    match stage:
        case "distill":
            return config.distill.needs_teacher or not name.startswith(("teacher.", "distill.roles.teacher."))
        case "pairs":
            names = _PAIRS | _CAUSAL_PAIRS if method.real_videos else _PAIRS
            return name in names or name.startswith("video.")
        case "initialize" if name.startswith("distill."):
            return name == _NEGATIVE
        case "initialize":
            return method.data == "pairs" or name != "initialize.pairs"
        case _:
            return True


def _inputs(config: RunConfig, stage: Stage) -> dict[str, str]:
    """Where what the stage reads lies, by the setting that says so."""
    data, distill, read = config.data, config.distill, {}
    real = stage == "distill" and (
        distill.starts_from_data
        or bool(distill.discriminator.taps)
        or any(name.startswith("data_") for name in distill.objective.reads)
    )
    if stage == "distill":
        read = {"distill.student": distill.student}
        if distill.critic is not None:
            read["distill.critic"] = distill.critic
        if distill.needs_teacher or distill.critic is None:
            read["distill.teacher"] = distill.teacher
    elif stage != "pretrain":
        read = {"initialize.teacher": config.initialize.teacher}
        real = config.initialize.chosen.real_videos
    if real and data.real is not None:
        read["data.real"] = data.real
    if not (distill.starts_from_data if stage == "distill" else real):
        read["data.train"] = data.train
    negative = distill.roles.teacher.negative_embedding
    longer = stage == "distill" and distill.rollout_frames not in (None, config.video.frames)
    if config.video.vae is not None and longer:
        read[_VAE] = config.video.vae  # which makes the scored window's first frame anew
    if negative is not None and stage != "pretrain" and (stage != "distill" or distill.needs_teacher):
        read[_NEGATIVE_FILE] = negative
    return read


def _is_shape(name: str, old: Identity) -> bool:
    """Whether what a checkpoint holds has the shape of this setting, so that no other can go on with it."""
    words = name.split(".")
    if name.startswith("distill.roles.teacher."):  # which is frozen, and in no checkpoint
        return False
    new_average = words[-1] == "ema_decay" and old.get(name) is None
    return new_average or not (_SHAPE_PARTS.isdisjoint((name, words[0])) and _SHAPE_WORDS.isdisjoint(words))


def _shown(value: Any) -> str:
    if isinstance(value, str):
        return value.removeprefix(_DIGEST)[:8] if value.startswith(_DIGEST) else repr(value)
    return "none" if value is None else f"{value:g}" if isinstance(value, float) else json.dumps(value)


def _listed(told: Mapping[str, str]) -> str:
    first = list(told.values())[:_SHOWN_AT_MOST]
    more = [f"and {len(told) - len(first)} more"] if len(told) > len(first) else []
    return ", ".join([*first, *more])
