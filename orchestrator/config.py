"""The run config: one frozen tree, filled by a YAML recipe and dotted overrides and checked at once.

Types that belong to a part live with that part; this module composes and checks what only the whole knows.
"""

from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

from infra.settings import Places, at_least, in_store, part, set_places
from infra.tracking import TrackingConfig, tracking_uri
from model.codec import Codec
from model.rollout_plan import RolloutConfig
from model.score import ScoreConfig
from model.transformer import TransformerConfig
from orchestrator.stages import (
    DistillConfig,
    EvaluateConfig,
    InitializeConfig,
    PlacementConfig,
    PretrainConfig,
    ScoringRole,
    TrainRole,
)
from workers.model_directory import TextConfig, VideoConfig


@dataclass(frozen=True)
class DataConfig(Places):
    """Where videos and prompts come from."""

    OUTPUTS = STORED = ("train", "held_out", "real")

    train: str = "outputs/data/train"
    """Parquet data set of videos or latents to train on."""
    held_out: str = "outputs/data/held_out"
    """Parquet data set to evaluate against."""
    real: str | None = None
    """Parquet data set of real videos (latents, or pixels where there is a codec), for adversarial losses,
    students that start from data instead of noise, and initialisations that learn from data."""
    skip_damaged: bool = False
    """Leave damaged shards out and say how many there are; otherwise they are an error."""
    source: str | None = None
    """What makes `train` and `held_out` where they are not there yet, as the examples' does; null where they
    are."""
    source_settings: dict[str, int] = field(default_factory=dict)
    """Its own settings, such as how many `videos` it makes."""


@dataclass(frozen=True)
class RunConfig:
    """One lineage of models: teacher, initial student, distilled student."""

    seed: int = 0
    """Everything random follows from it."""
    root: str = "."
    """Directory that relative paths start from, readable from every node; models are also looked for in the
    working directory."""
    video: VideoConfig = VideoConfig()
    """Shape of a latent video."""
    text: TextConfig = TextConfig()
    """Prompt embedding."""
    teacher: TransformerConfig = TransformerConfig()
    """Sizes of the teacher."""
    student: TransformerConfig = TransformerConfig()
    """Sizes of student and critic."""
    rollout: RolloutConfig = RolloutConfig()
    """How the student generates."""
    score: ScoreConfig = ScoreConfig()
    """Noise levels at which videos are scored."""
    data: DataConfig = DataConfig()
    """Data sets."""
    pretrain: PretrainConfig = PretrainConfig()
    """Teacher."""
    initialize: InitializeConfig = InitializeConfig()
    """Initial student."""
    distill: DistillConfig = DistillConfig()
    """Distilled student."""
    evaluate: EvaluateConfig = EvaluateConfig()
    """Report."""
    placement: PlacementConfig = PlacementConfig()
    """Where the roles of distillation run."""
    tracking: TrackingConfig = TrackingConfig()
    """MLflow."""

    def __post_init__(self) -> None:
        set_places(self, "root")
        at_least(self, 0, "seed")
        frames, channels, height, width = self.video.shape
        with part("video"):
            codec = self.video.make_codec()
        with part("rollout"):
            self.rollout.check_frames(frames - self.distill.given_frames)
        for name, sizes in (("teacher", self.teacher), ("student", self.student)):
            if (sizes.in_dim, sizes.out_dim) != (channels, channels):
                raise ValueError(
                    f"{name}.in_dim {sizes.in_dim} and {name}.out_dim {sizes.out_dim} must be the "
                    f"{channels} video.channels."
                )
            with part(name):
                sizes.grid(height, width)
        if (self.teacher.text_len, self.teacher.text_dim) != (self.student.text_len, self.student.text_dim):
            raise ValueError(
                "teacher and student must have the same text_len and text_dim, for they read the same "
                "prompts."
            )
        embedded = self.text.column == "embedding"
        named = self.distill.roles.teacher.negative_embedding is not None
        if named != embedded and (named or self.distill.needs_teacher):
            raise ValueError(
                "distill.roles.teacher.negative_embedding must name a file where text.encoder is not bytes, "
                "and only there."
            )
        _check_batch("pretrain", self.pretrain.batch, self.pretrain.role)
        _check_batch("initialize", self.initialize.batch, self.initialize.role)
        roles = self.distill.roles
        _check_batch("distill", self.distill.batch, roles.student, "roles.student.")
        _check_batch("distill", self.distill.batch, roles.critic, "roles.critic.")
        scored = self.distill.batch // roles.student.engine.accumulation
        scorers: dict[str, ScoringRole] = {"critic": roles.critic}
        if self.distill.needs_teacher:
            scorers = {"teacher": roles.teacher, **scorers}
        replicas = roles.rollout.ranks
        if replicas and scored % replicas:
            raise ValueError(
                f"distill.roles.rollout.ranks of {replicas} does not divide the {scored} videos rolled out "
                "at once (distill.batch / roles.student.engine.accumulation)."
            )
        rows, columns = self.student.grid(height, width)
        for name, role in scorers.items():
            if scored % role.groups:
                what = f"ranks of {role.ranks}" + (
                    f" / sequence of {role.sequence}" if role.sequence > 1 else ""
                )
                raise ValueError(
                    f"distill.roles.{name}.{what} does not divide the {scored} videos scored at "
                    "once (distill.batch / roles.student.engine.accumulation)."
                )
            heads = (self.teacher if name == "teacher" else self.student).num_heads
            if heads % role.sequence or rows * columns % role.sequence:
                raise ValueError(
                    f"distill.roles.{name}.sequence of {role.sequence} does not divide the model's {heads} "
                    f"heads and the {rows * columns} tokens of a frame; use a divisor of both."
                )
        objective, discriminator = self.distill.objective, self.distill.discriminator
        if ("logits" in objective.reads) != bool(discriminator.taps):
            raise ValueError(
                "distill.discriminator.taps must name blocks of the critic where distill.objective.weights "
                "has an adversarial loss, and only there."
            )
        if any(not 0 <= tap < self.student.num_layers for tap in discriminator.taps):
            raise ValueError(
                f"distill.discriminator.taps {list(discriminator.taps)} must lie between 0 and "
                f"{self.student.num_layers - 1}, the critic's last block."
            )
        self._check_data(codec)
        if self.pretrain.compile and self.pretrain.role.engine.zero_stage == 3:
            raise ValueError(
                "pretrain.compile does not work with zero_stage 3; use zero_stage 2, or compile: false."
            )

    def _check_data(self, codec: Codec | None) -> None:
        """What starts from real videos, or goes beyond their length."""
        distill, frames = self.distill, self.video.frames
        needs = {
            "distill.discriminator.taps": bool(distill.discriminator.taps),
            f"distill.inputs {distill.inputs}": distill.inputs != "rollout",
            "distill.given_frames": distill.given_frames > 0,
            f"initialize.method {self.initialize.method}": self.initialize.chosen.real_videos,
        }
        for name, needed in needs.items():
            if needed and self.data.real is None:
                raise ValueError(f"{name} needs real videos: data.real must name a data set of them.")
        if not 0 <= distill.given_frames < frames:
            raise ValueError(
                f"distill.given_frames of {distill.given_frames} must leave some of the {frames} "
                "video.frames to generate."
            )
        longest = distill.rollout_frames
        if distill.inputs != "rollout" and (longest or distill.given_frames):
            raise ValueError(
                "distill.rollout_frames and distill.given_frames describe rollouts; they need "
                "distill.inputs rollout."
            )
        if longest is None:
            return
        if longest < frames or (longest - frames) % self.rollout.chunk:
            raise ValueError(
                f"distill.rollout_frames of {longest} must be the {frames} video.frames and any number of "
                f"chunks of {self.rollout.chunk} more."
            )
        if longest > frames and codec is None:
            raise ValueError(
                "distill.rollout_frames beyond video.frames needs a video.codec, to make the scored "
                "window's first frame anew."
            )

    def portable(self) -> dict[str, Any]:
        """The settings without tracking, paths below `root` made relative: they mean the same elsewhere."""
        root = self.root.rstrip("/") + "/"

        def shorten(value: Any) -> Any:
            if isinstance(value, dict):
                return {name: shorten(item) for name, item in value.items()}
            if isinstance(value, list | tuple):
                return [shorten(item) for item in value]
            return value.removeprefix(root) if isinstance(value, str) else value

        settings = {name: value for name, value in asdict(self).items() if name != "tracking"}
        return {**shorten(settings), "root": "."}

    def located(self) -> "RunConfig":
        """The same config with absolute paths, for actors do not share the driver's working directory."""
        root = Path(self.root).absolute()
        tracking = replace(self.tracking, uri=tracking_uri(self.tracking.uri, root))
        return replace(_located(self, root), root=str(root), tracking=tracking)


def _located(part: Any, root: Path) -> Any:
    """The part, and the parts in it, with paths below `root`, or in the working directory where they are
    there."""
    values = {each.name: getattr(part, each.name) for each in fields(part)}
    changes = {name: _located(value, root) for name, value in values.items() if is_dataclass(value)}
    if isinstance(part, Places):
        for name in (*part.OUTPUTS, *part.INPUTS):
            if (path := values[name]) is not None:
                if in_store(path):
                    continue
                here = Path(path).absolute()
                elsewhere = name in part.INPUTS and here.exists() and not (root / path).exists()
                changes[name] = str(here if elsewhere else root / path)
    return replace(part, **changes)


def _check_batch(stage: str, batch: int, role: TrainRole, prefix: str = "role.") -> None:
    parts = role.groups * role.engine.accumulation
    if batch < 1 or batch % parts:
        raise ValueError(
            f"{stage}.batch of {batch} is not divisible by {stage}.{prefix}ranks x engine.accumulation = "
            f"{parts}; use {max(1, batch // parts) * parts}."
        )
