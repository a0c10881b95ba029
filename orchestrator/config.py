"""The run config: one frozen tree that a YAML recipe and dotted overrides fill, checked before anything starts.

Types that belong to a part live with that part; this module composes them and checks what only the whole can know.
"""

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from infra.settings import Invalid, at_least, local, part, positive, share
from infra.tracking import TrackingConfig, tracking_uri
from model.adapters import AdapterConfig
from model.codec import Codec
from model.initialization import MethodConfig
from model.objectives import ObjectiveConfig
from model.objectives.gan import DiscriminatorConfig
from model.rollout_plan import RolloutConfig
from model.score import ScoreConfig
from model.transformer import TransformerConfig
from workers.engine import EngineConfig
from workers.model_directory import TextConfig, VideoConfig
from workers.teacher import TeacherWorker


@dataclass(frozen=True)
class DataConfig:
    """Where videos and prompts come from."""

    train: str = "outputs/data/train"
    """Parquet data set of videos or latents to train on."""
    held_out: str = "outputs/data/held_out"
    """Parquet data set to evaluate against."""
    real: str | None = None
    """Parquet data set of real videos (latents, or pixels where there is a codec), for adversarial losses, students that start from data
    instead of noise, and initialisations that learn from data."""
    skip_damaged: bool = False
    """Leave damaged shards out and say how many there are; otherwise they are an error."""
    source: str | None = None
    """What makes `train` and `held_out` where they are not there yet, as the examples' does; null where they are."""
    source_settings: dict[str, int] = field(default_factory=dict)
    """Its own settings, such as how many `videos` it makes."""

    def __post_init__(self) -> None:
        local(self, "train", "held_out", "real")


@dataclass(frozen=True)
class RanksConfig:
    """The processes of one role, one Ray actor each."""

    ranks: int = 1
    """Data-parallel ranks of this role."""
    cpus: float = 1.0
    """Logical CPUs that Ray reserves for each rank."""
    gpus: float = 0.0
    """GPUs that Ray reserves for each rank."""
    threads: int = 1
    """Threads that torch uses in each rank."""

    def __post_init__(self) -> None:
        at_least(self, 1, "ranks", "threads")
        at_least(self, 0, "cpus", "gpus")


@dataclass(frozen=True)
class TrainRole(RanksConfig):
    """A role that learns: student or critic."""

    engine: EngineConfig = EngineConfig(learning_rate=1e-4)
    """Optimizer and sharding."""
    activation_checkpointing: bool = False
    """Recompute activations in the backward pass instead of keeping them."""


@dataclass(frozen=True)
class AdaptedRole(TrainRole):
    """A role that learns from a model that there is."""

    adapters: AdapterConfig = AdapterConfig()
    """Low-rank adapters, in place of training all weights."""


@dataclass(frozen=True)
class TeacherRole(RanksConfig):
    """The frozen teacher."""

    zero_stage: int = 0
    """0 replicates the teacher on each rank, 3 shards it over them."""
    dtype: Literal["fp32", "bf16"] = "fp32"
    """Type the teacher computes in."""
    guidance: float = 3.0
    """Classifier-free guidance in the form cond + guidance · (cond − uncond); 0 is none."""
    negative_prompt: str = ""
    """Prompt of the unconditional branch, where the model has a text encoder."""
    negative_embedding: str | None = None
    """Safetensors file with the tensor `embedding` [text_len, text_dim] of the negative prompt, where prompts come embedded."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.zero_stage not in (0, 3):
            raise Invalid("zero_stage", f"is {self.zero_stage}: use 0 (replicated) or 3 (sharded).")
        at_least(self, -1, "guidance")
        local(self, "negative_embedding")


@dataclass(frozen=True)
class PlacementConfig:
    """Which devices the roles share."""

    mode: Literal["colocated", "disaggregated"] = "colocated"
    """Colocated packs the roles together on as few nodes as possible; disaggregated gives each role nodes of its own where it can."""
    timeout_s: float = 120.0
    """Seconds to wait for the cluster to have room."""

    def __post_init__(self) -> None:
        positive(self, "timeout_s")


@dataclass(frozen=True)
class PretrainConfig:
    """Pretraining of the bidirectional teacher."""

    output: str = "outputs/teacher"
    """Run directory; the teacher is written to its `model`."""
    updates: int = 3000
    """Optimizer steps."""
    batch: int = 32
    """Videos per optimizer step, over all ranks."""
    warmup: int = 100
    """Steps of linear warm-up; then the learning rate falls linearly to zero."""
    dropout: float = 0.1
    """Share of prompts that are dropped, for classifier-free guidance."""
    shift: float = 5.0
    """Warp of the noise levels trained at; more than 1 prefers high ones."""
    role: TrainRole = TrainRole(
        engine=EngineConfig(learning_rate=1.5e-3, betas=(0.9, 0.99), clip=1.0, ema_decay=0.998)
    )
    """Ranks, optimizer and sharding."""
    compile: bool = False
    """Compile the model with TorchInductor, which needs a C++ compiler on a CPU."""
    checkpoint_every: int = 500
    """Steps between checkpoints."""

    def __post_init__(self) -> None:
        local(self, "output")
        at_least(self, 1, "updates", "batch", "checkpoint_every")
        at_least(self, 0, "warmup")
        positive(self, "shift")
        share(self, "dropout")


@dataclass(frozen=True)
class InitializeConfig(MethodConfig):
    """The initial student: a model of the student's size made causal, and perhaps few-step."""

    output: str = "outputs/initial"
    """Run directory; the initial student is written to its `model`."""
    teacher: str = "outputs/teacher/model"
    """Model directory of the teacher, of the student's size: the student starts from its weights."""
    pairs: int = 512
    """ODE trajectories that the teacher generates."""
    pairs_path: str = "outputs/data/ode_pairs"
    """Parquet data set of the trajectories."""
    samplers: int = 1
    """Actors that make pairs, each with the CPUs and GPUs of a rank."""
    updates: int = 250
    """Optimizer steps."""
    batch: int = 16
    """Videos or trajectories per optimizer step, over all ranks."""
    warmup: int = 10
    """Steps of linear warm-up; then the learning rate falls linearly to zero."""
    role: AdaptedRole = AdaptedRole(engine=EngineConfig(learning_rate=1e-3, betas=(0.9, 0.99), clip=1.0))
    """Ranks, optimizer and sharding."""
    checkpoint_every: int = 100
    """Steps between checkpoints."""

    def __post_init__(self) -> None:
        super().__post_init__()
        local(self, "output", "teacher", "pairs_path")
        at_least(self, 1, "pairs", "samplers", "updates", "batch", "checkpoint_every")
        at_least(self, 0, "warmup")


@dataclass(frozen=True)
class RolesConfig:
    """The three roles of distillation."""

    student: AdaptedRole = AdaptedRole(engine=EngineConfig(learning_rate=2e-4, ema_decay=0.9, ema_start=40))
    teacher: TeacherRole = TeacherRole()
    critic: AdaptedRole = AdaptedRole(engine=EngineConfig(learning_rate=4e-4))


@dataclass(frozen=True)
class DistillConfig:
    """Self Forcing: student, teacher and critic."""

    output: str = "outputs/distilled"
    """Run directory: checkpoints, samples, and the distilled student."""
    teacher: str = "outputs/teacher/model"
    """Model directory of the frozen teacher."""
    student: str = "outputs/initial/model"
    """Model directory of the initial student."""
    critic: str | None = None
    """Model directory that the critic starts from, of the student's size; null takes the teacher."""
    iterations: int = 500
    """Critic updates; every `student_every`-th begins with a student update."""
    student_every: int = 5
    """Iterations for one student update."""
    batch: int = 16
    """Videos per update, over all ranks."""
    inputs: Literal["rollout", "teacher_forcing", "diffusion_forcing"] = "rollout"
    """What the student makes the scored videos from: its own rollout, or (the baselines) real videos, noised chunk by chunk."""
    rollout_frames: int | None = None
    """Longest rollout in latent frames; lengths are drawn between video.frames and this, and the last video.frames are scored. Null is video.frames."""
    given_frames: int = 0
    """First latent frames of each rollout that are a real video's; 1 trains image-to-video."""
    overlap: bool = True
    """Request the next rollout while the critic trains; the results are the same to the bit."""
    cache_gradient: Literal["constant", "released"] = "constant"
    """Cached keys and values are constants, or pass gradient on as the released code does."""
    objective: ObjectiveConfig = ObjectiveConfig()
    """The loss on the whole video."""
    discriminator: DiscriminatorConfig = DiscriminatorConfig()
    """The critic's classification branch, for the adversarial losses."""
    roles: RolesConfig = RolesConfig()
    """Ranks and optimizers of the three roles."""
    checkpoint_every: int = 50
    """Iterations between checkpoints."""
    keep: int = 2
    """Checkpoints kept; the newest complete one always is."""
    sample_every: int = 100
    """Iterations between sample videos; 0 makes none."""

    def __post_init__(self) -> None:
        local(self, "output", "teacher", "student", "critic")
        at_least(
            self, 1, "iterations", "student_every", "batch", "checkpoint_every", "keep", "rollout_frames"
        )
        at_least(self, 0, "given_frames", "sample_every")

    @property
    def starts_from_data(self) -> bool:
        """Whether the student needs real videos to make its own."""
        return self.inputs != "rollout" or self.given_frames > 0

    @property
    def needs_teacher(self) -> bool:
        """Whether the objective reads the teacher; an adversarial one alone does not."""
        return any(name.removeprefix("data_") in TeacherWorker.makes for name in self.objective.reads)


@dataclass(frozen=True)
class EvaluateConfig:
    """Evaluation of teacher, initial and distilled student, as far as they are there."""

    output: str = "outputs/evaluation"
    """Where the report is written."""
    suite: str = "video"
    """What is measured: `video` what any video has; others, such as an example's own, ask for data of one kind."""
    prompts: str | None = None
    """Text file of one prompt a line; null takes the suite's own, such as those of the held-out videos."""
    features: str | None = None
    """TorchScript file of frames [N, channels, H, W] in [−1, 1] to features [N, D] for the kernel distance of suite video; null
    compares latents."""
    videos: int = 256
    """Videos generated by each model."""
    frames: int = 27
    """Latent frames of each of the students' videos; those beyond the trained length show drift."""
    batch: int = 64
    """Videos generated together."""
    teacher_steps: int = 32
    """Euler steps of the teacher's sampler."""
    teacher_guidance: float = 3.0
    """Classifier-free guidance of the teacher's sampler, in the form cond + guidance · (cond − uncond)."""
    threads: int = 1
    """Threads that torch uses in each actor."""

    def __post_init__(self) -> None:
        local(self, "output", "prompts", "features")
        at_least(self, 1, "videos", "frames", "batch", "teacher_steps", "threads")
        at_least(self, -1, "teacher_guidance")


@dataclass(frozen=True)
class RunConfig:
    """One lineage of models: teacher, initial student, distilled student."""

    seed: int = 0
    """Everything random follows from it."""
    root: str = "."
    """Directory that relative paths start from, readable from every node; models are also looked for in the working directory."""
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
        local(self, "root")
        at_least(self, 0, "seed")
        frames, channels, height, width = self.video.shape
        with part("video"):
            codec = self.video.make_codec()
        with part("rollout"):
            self.rollout.check_frames(frames - self.distill.given_frames)
        for name, sizes in (("teacher", self.teacher), ("student", self.student)):
            if (sizes.in_dim, sizes.out_dim) != (channels, channels):
                raise ValueError(
                    f"{name}.in_dim {sizes.in_dim} and {name}.out_dim {sizes.out_dim} must be the {channels} video.channels."
                )
            with part(name):
                sizes.grid(height, width)
        if (self.teacher.text_len, self.teacher.text_dim) != (self.student.text_len, self.student.text_dim):
            raise ValueError(
                "teacher and student must have the same text_len and text_dim, for they read the same prompts."
            )
        embedded = self.text.encoder == "embedded"
        named = self.distill.roles.teacher.negative_embedding is not None
        if named != embedded and (named or self.distill.needs_teacher):
            raise ValueError(
                "distill.roles.teacher.negative_embedding must name a file where text.encoder is embedded, and only there."
            )
        _check_batch("pretrain", self.pretrain.batch, self.pretrain.role)
        _check_batch("initialize", self.initialize.batch, self.initialize.role)
        roles = self.distill.roles
        _check_batch("distill", self.distill.batch, roles.student, "roles.student.")
        _check_batch("distill", self.distill.batch, roles.critic, "roles.critic.")
        scored = self.distill.batch // roles.student.engine.accumulation
        scorers = {"critic": roles.critic.ranks}
        if self.distill.needs_teacher:
            scorers = {"teacher": roles.teacher.ranks, **scorers}
        for name, ranks in scorers.items():
            if scored % ranks:
                raise ValueError(
                    f"distill.roles.{name}.ranks of {ranks} does not divide the {scored} videos scored at once "
                    f"(distill.batch / roles.student.engine.accumulation)."
                )
        objective, discriminator = self.distill.objective, self.distill.discriminator
        if ("logits" in objective.reads) != bool(discriminator.taps):
            raise ValueError(
                "distill.discriminator.taps must name blocks of the critic where distill.objective.weights has an adversarial loss, "
                "and only there."
            )
        if any(not 0 <= tap < self.student.num_layers for tap in discriminator.taps):
            raise ValueError(
                f"distill.discriminator.taps {list(discriminator.taps)} must lie between 0 and {self.student.num_layers - 1}, "
                "the critic's last block."
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
                f"distill.given_frames of {distill.given_frames} must leave some of the {frames} video.frames to generate."
            )
        longest = distill.rollout_frames
        if distill.inputs != "rollout" and (longest or distill.given_frames):
            raise ValueError(
                "distill.rollout_frames and distill.given_frames describe rollouts; they need distill.inputs rollout."
            )
        if longest is None:
            return
        if longest < frames or (longest - frames) % self.rollout.chunk:
            raise ValueError(
                f"distill.rollout_frames of {longest} must be the {frames} video.frames and any number of chunks of "
                f"{self.rollout.chunk} more."
            )
        if longest > frames and codec is None:
            raise ValueError(
                "distill.rollout_frames beyond video.frames needs a video.codec, to make the scored window's first frame anew."
            )

    def portable(self) -> dict[str, Any]:
        """The settings with paths below `root` made relative and without tracking, so that they mean the same elsewhere."""
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

        def under(path: str) -> str:
            return str(root / path)

        def model(path: str) -> str:
            here = Path(path).absolute()
            return str(here) if here.exists() and not (root / path).exists() else str(root / path)

        guide = self.distill.roles.teacher
        if guide.negative_embedding is not None:
            guide = replace(guide, negative_embedding=model(guide.negative_embedding))
        data = replace(
            self.data,
            train=under(self.data.train),
            held_out=under(self.data.held_out),
            real=None if self.data.real is None else under(self.data.real),
        )
        distill = replace(
            self.distill,
            roles=replace(self.distill.roles, teacher=guide),
            output=under(self.distill.output),
            teacher=model(self.distill.teacher),
            student=model(self.distill.student),
            critic=None if self.distill.critic is None else model(self.distill.critic),
        )
        return replace(
            self,
            root=str(root),
            data=data,
            pretrain=replace(self.pretrain, output=under(self.pretrain.output)),
            initialize=replace(
                self.initialize,
                teacher=model(self.initialize.teacher),
                output=under(self.initialize.output),
                pairs_path=under(self.initialize.pairs_path),
            ),
            distill=distill,
            evaluate=replace(
                self.evaluate,
                output=under(self.evaluate.output),
                prompts=None if self.evaluate.prompts is None else model(self.evaluate.prompts),
                features=None if self.evaluate.features is None else model(self.evaluate.features),
            ),
            tracking=replace(self.tracking, uri=tracking_uri(self.tracking.uri, root)),
        )


def _check_batch(stage: str, batch: int, role: TrainRole, prefix: str = "role.") -> None:
    parts = role.ranks * role.engine.accumulation
    if batch < 1 or batch % parts:
        raise ValueError(
            f"{stage}.batch of {batch} is not divisible by {stage}.{prefix}ranks x engine.accumulation = {parts}; "
            f"use {max(1, batch // parts) * parts}."
        )
