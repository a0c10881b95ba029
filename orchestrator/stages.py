"""The settings of each stage, and of the processes that it runs on."""

from dataclasses import dataclass, replace
from typing import Any, Literal

from infra.settings import Invalid, Places, at_least, positive, share
from model.adapters import AdapterConfig
from model.initialization import MethodConfig
from model.objectives import ObjectiveConfig
from model.objectives.gan import DiscriminatorConfig
from orchestrator.alarms import AlarmConfig
from orchestrator.recovery import FaultConfig, RetryConfig
from workers.engine_config import EngineConfig, ScheduleConfig
from workers.teacher import TeacherWorker


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

    @property
    def groups(self) -> int:
        """Parts of a batch that the ranks have at once."""
        return self.ranks


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


def _check_fewest(role: Any) -> None:
    if role.min_ranks is not None and not 1 <= role.min_ranks <= role.ranks:
        raise Invalid("min_ranks", f"is {role.min_ranks}; it must lie between 1 and the {role.ranks} ranks.")


@dataclass(frozen=True)
class DistilledRole(AdaptedRole):
    """A role of a distillation that learns: student or critic."""

    min_ranks: int | None = None
    """Fewest ranks that the run goes on with while nodes are missing, the batch kept by more accumulation;
    null waits for as many as it has."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_fewest(self)


@dataclass(frozen=True)
class ScoringRole(RanksConfig):
    """A role that looks at whole videos: teacher or critic."""

    sequence: int = 1
    """Ranks that share the tokens of every video; a divisor of `ranks`, of the model's heads and of a frame's
    tokens."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 1, "sequence")
        if self.ranks % self.sequence:
            raise Invalid("sequence", f"of {self.sequence} does not divide the {self.ranks} ranks.")

    @property
    def groups(self) -> int:
        return self.ranks // self.sequence


@dataclass(frozen=True)
class CriticRole(DistilledRole, ScoringRole):
    """The critic."""


@dataclass(frozen=True)
class TeacherRole(ScoringRole, Places):
    """The frozen teacher."""

    INPUTS = STORED = ("negative_embedding",)

    zero_stage: int = 0
    """0 replicates the teacher on each rank, 3 shards it over them."""
    dtype: Literal["fp32", "bf16"] = "fp32"
    """Type the teacher computes in."""
    guidance: float = 3.0
    """Classifier-free guidance in the form cond + guidance · (cond − uncond); 0 is none."""
    negative_prompt: str = ""
    """Prompt of the unconditional branch, where the model has a text encoder."""
    negative_embedding: str | None = None
    """Safetensors file with the tensor `embedding` [text_len, text_dim] of the negative prompt, where prompts
    come embedded."""
    min_ranks: int | None = None
    """Fewest ranks that the run goes on with while nodes are missing; null waits for as many as it has."""

    def __post_init__(self) -> None:
        super().__post_init__()
        Places.__post_init__(self)
        _check_fewest(self)
        if self.zero_stage not in (0, 3):
            raise Invalid("zero_stage", f"is {self.zero_stage}: use 0 (replicated) or 3 (sharded).")
        at_least(self, -1, "guidance")


@dataclass(frozen=True)
class PlacementConfig:
    """Which devices the roles share."""

    mode: Literal["colocated", "disaggregated"] = "colocated"
    """Colocated packs the roles on as few nodes as possible; disaggregated gives each role nodes of its own
    where it can."""
    timeout_s: float = 120.0
    """Seconds to wait for the cluster to have room."""

    def __post_init__(self) -> None:
        positive(self, "timeout_s")


def _check_not_finite(stage: Any) -> None:
    if stage.not_finite not in ("stop", "drop"):
        raise Invalid("not_finite", f"is {stage.not_finite!r}: use stop or drop.")


def whole_stage(engine: EngineConfig, updates: int) -> EngineConfig:
    """Settings whose schedule is as long as a stage of `updates`, where they do not say how long it is."""
    schedule = engine.schedule
    if schedule.kind == "constant" or schedule.updates is not None:
        return engine
    return replace(engine, schedule=replace(schedule, updates=updates))


@dataclass(frozen=True)
class PretrainConfig(Places):
    """Pretraining of the bidirectional teacher."""

    OUTPUTS = STORED = ("output",)

    output: str = "outputs/teacher"
    """Run directory; the teacher is written to its `model`."""
    updates: int = 3000
    """Optimizer steps."""
    batch: int = 32
    """Videos per optimizer step, over all ranks."""
    dropout: float = 0.1
    """Share of prompts that are dropped, for classifier-free guidance."""
    shift: float = 5.0
    """Warp of the noise levels trained at; more than 1 prefers high ones."""
    role: TrainRole = TrainRole(
        engine=EngineConfig(
            learning_rate=1.5e-3,
            schedule=ScheduleConfig("linear", warmup=100),
            betas=(0.9, 0.99),
            clip=1.0,
            ema_decay=0.998,
        )
    )
    """Ranks, optimizer and sharding."""
    compile: bool = False
    """Compile the model with TorchInductor, which needs a C++ compiler on a CPU."""
    checkpoint_every: int = 500
    """Steps between checkpoints."""
    checkpoint_minutes: float | None = None
    """Minutes after which there is one in any case; null for none."""
    not_finite: Literal["stop", "drop"] = "drop"
    """What becomes of an update whose loss or gradient is not finite: it ends the run, or is dropped by every
    rank and counted; ten in a row end it in any case."""
    faults: RetryConfig = RetryConfig()
    """Going on after lost ranks."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 1, "updates", "batch", "checkpoint_every")
        positive(self, "shift", "checkpoint_minutes")
        _check_not_finite(self)
        share(self, "dropout")


@dataclass(frozen=True)
class InitializeConfig(MethodConfig, Places):
    """The initial student: a model of the student's size made causal, and perhaps few-step."""

    OUTPUTS, INPUTS = ("output", "pairs_path"), ("teacher",)
    STORED = (*OUTPUTS, *INPUTS)

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
    role: AdaptedRole = AdaptedRole(
        engine=EngineConfig(
            learning_rate=1e-3, schedule=ScheduleConfig("linear", warmup=10), betas=(0.9, 0.99), clip=1.0
        )
    )
    """Ranks, optimizer and sharding."""
    checkpoint_every: int = 100
    """Steps between checkpoints."""
    checkpoint_minutes: float | None = None
    """Minutes after which there is one in any case; null for none."""
    not_finite: Literal["stop", "drop"] = "drop"
    """What becomes of an update whose loss or gradient is not finite: it ends the run, or is dropped by every
    rank and counted; ten in a row end it in any case."""
    faults: RetryConfig = RetryConfig()
    """Going on after lost ranks."""

    def __post_init__(self) -> None:
        super().__post_init__()
        Places.__post_init__(self)
        at_least(self, 1, "pairs", "samplers", "updates", "batch", "checkpoint_every")
        positive(self, "checkpoint_minutes")
        _check_not_finite(self)


@dataclass(frozen=True)
class RolloutRole(RanksConfig):
    """Replicas of the student that roll out in its place."""

    ranks: int = 0
    """Replicas; 0 has the student roll out itself."""
    dtype: Literal["fp32", "bf16"] = "fp32"
    """Type that they compute in."""
    min_ranks: int | None = None
    """Fewest ranks that the run goes on with while nodes are missing; null waits for as many as it has."""

    def __post_init__(self) -> None:
        at_least(self, 0, "ranks", "cpus", "gpus")
        at_least(self, 1, "threads")
        if self.ranks:
            _check_fewest(self)


@dataclass(frozen=True)
class RolesConfig:
    """The roles of distillation."""

    student: DistilledRole = DistilledRole(
        engine=EngineConfig(learning_rate=2e-4, ema_decay=0.9, ema_start=40)
    )
    teacher: TeacherRole = TeacherRole()
    critic: CriticRole = CriticRole(engine=EngineConfig(learning_rate=4e-4))
    rollout: RolloutRole = RolloutRole()


@dataclass(frozen=True)
class SelectionConfig:
    """Measuring the averaged student while it trains, and which of its states is exported.

    Where a run ends and which of its states it exports is a choice, as `iterations` is: it moves no number of
    any state, so a run may go on under another one.
    """

    every: int = 0
    """Iterations between measurements by `evaluate.suite`, on prompts and noises that stay the same; the last
    iteration is always measured. 0 measures nothing."""
    by: str | None = None
    """Number that says which state is better: METRIC_SPAN, one of those that the suite compares."""
    videos: int = 64
    """Videos made for each measurement, of as many latent frames as `evaluate.frames` says."""
    keep: int = 1
    """Best states kept, each a whole model: at 14B 57 GB of fp32."""
    patience: int | None = None
    """End the run after this many measurements in a row without a better one; null never does."""
    export: Literal["last", "best"] = "last"
    """State that becomes the run's `model`."""
    cpus: float = 1.0
    """Logical CPUs that Ray reserves for measuring, beside the roles'."""
    gpus: float = 0.0
    """GPUs that Ray reserves for measuring, beside the roles'."""
    threads: int = 1
    """Threads that torch uses for measuring."""

    def __post_init__(self) -> None:
        at_least(self, 0, "every", "cpus", "gpus")
        at_least(self, 1, "keep", "patience", "threads")
        at_least(self, 2, "videos")
        if self.every:
            return
        for name, used in (("patience", self.patience is not None), ("export", self.export == "best")):
            if used:
                value = getattr(self, name)
                raise Invalid(
                    name, f"is {value} and needs measurements; set every to a number of iterations."
                )

    @property
    def choice(self) -> dict[str, Any] | None:
        """The settings that decide what is exported; None where that is the state after all iterations."""
        if self.patience is None and self.export == "last":
            return None
        return {name: getattr(self, name) for name in ("every", "by", "videos", "patience", "export")}


@dataclass(frozen=True)
class DistillConfig(Places):
    """Self Forcing: student, teacher and critic."""

    OUTPUTS, INPUTS = ("output",), ("teacher", "student", "critic")
    STORED = (*OUTPUTS, *INPUTS)

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
    """What the student makes scored videos from: its own rollout, or (baselines) real videos, noised chunk by
    chunk."""
    rollout_frames: int | None = None
    """Longest rollout in latent frames; lengths are drawn between video.frames and this, and the last
    video.frames are scored. Null is video.frames."""
    given_frames: int = 0
    """First latent frames of each rollout that are a real video's; 1 trains image-to-video."""
    exit_groups: int = 1
    """Parts of a batch with exit steps of their own, which together take every step as often as another; 1
    draws one for all, as published. A divisor of roles.student.engine.accumulation."""
    overlap: bool = True
    """Request coming rollouts and the teacher's coming scores while the critic trains; the results are the
    same to the bit."""
    cache_gradient: Literal["constant", "released"] = "constant"
    """Cached keys and values are constants, or pass gradient on as the released code does."""
    replay: bool = False
    """Roll out without a graph, and make the gradient by one forward over all chunks at their exit steps: the
    same but for rounding. Needs two forwards more a chunk, and holds a graph while it is pulled back only, so
    that all micro-batches are rolled out and scored ahead."""
    compile: bool = False
    """Compile a rollout's calls without gradient with TorchInductor; on a CPU that needs a C++ compiler, and
    is seldom faster."""
    gather: bool = False
    """Under roles.student.engine.zero_stage 3, have the student's weights whole on every rank for each
    rollout, gathered once, in place of gathering them at each of its calls."""
    objective: ObjectiveConfig = ObjectiveConfig()
    """The loss on the whole video."""
    discriminator: DiscriminatorConfig = DiscriminatorConfig()
    """The critic's classification branch, for the adversarial losses."""
    roles: RolesConfig = RolesConfig()
    """Ranks and optimizers of the three roles."""
    selection: SelectionConfig = SelectionConfig()
    """Keeping the best state, and ending in time."""
    alarms: AlarmConfig = AlarmConfig()
    """Numbers that are watched while the student learns."""
    faults: FaultConfig = FaultConfig()
    """Going on after lost workers."""
    checkpoint_every: int = 50
    """Iterations between checkpoints."""
    checkpoint_minutes: float | None = None
    """Minutes after which there is one in any case; null for none."""
    not_finite: Literal["stop", "drop"] = "stop"
    """What becomes of an update whose loss or gradient is not finite: it ends the run, or is dropped by every
    rank and counted; ten in a row end it in any case."""
    keep: int = 2
    """Checkpoints kept; the newest complete one always is."""
    keep_every: int = 0
    """Checkpoints after a multiple of so many iterations are kept beside those; 0 keeps none for that."""
    sample_every: int = 100
    """Iterations between sample videos; 0 makes none."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(
            self, 1, "iterations", "student_every", "batch", "checkpoint_every", "keep", "rollout_frames",
            "exit_groups",
        )  # fmt: skip
        parts = self.roles.student.engine.accumulation
        if parts % self.exit_groups:
            raise Invalid(
                "exit_groups",
                f"of {self.exit_groups} does not divide the roles.student.engine.accumulation of {parts}, "
                f"and a micro-batch lies in one group; set that to {self.exit_groups} or a multiple.",
            )
        if self.exit_groups > 1 and self.inputs != "rollout":
            raise Invalid("exit_groups", "is of rollouts, so it needs distill.inputs rollout; leave it out.")
        if self.roles.rollout.ranks and not self.replay:
            raise Invalid("roles.rollout.ranks", "are replicas, which keep no graph: set distill.replay.")
        if self.roles.rollout.ranks and self.gather:
            raise Invalid("gather", "is for a student that rolls out itself; leave roles.rollout.ranks out.")
        sharded = self.roles.student.engine.zero_stage == 3 and not self.roles.rollout.ranks
        if self.gather and not sharded:
            raise Invalid("gather", "is for roles.student.engine.zero_stage 3; leave it out.")
        if self.compile and sharded and not self.gather:
            raise Invalid("compile", "needs whole weights: set gather, or roles.student.engine.zero_stage 2.")
        for name, used in (("compile", self.compile), ("gather", self.gather)):
            if used and self.inputs != "rollout":
                raise Invalid(name, "is of rollouts, so it needs distill.inputs rollout; leave it out.")
        if self.replay and self.inputs != "rollout":
            raise Invalid("replay", "is of rollouts, so it needs distill.inputs rollout; leave it out.")
        if self.replay and self.cache_gradient != "constant":
            raise Invalid("replay", "has constant caches, so it needs distill.cache_gradient constant.")
        at_least(self, 0, "given_frames", "sample_every", "keep_every")
        positive(self, "checkpoint_minutes")
        _check_not_finite(self)
        for name, role in (("student", self.roles.student), ("critic", self.roles.critic)):
            schedule = role.engine.schedule
            if schedule.kind != "constant" and schedule.updates is None:
                raise Invalid(
                    f"roles.{name}.engine.schedule.updates",
                    f"must say after how many updates of the {name} its rate has fallen.",
                )

    @property
    def starts_from_data(self) -> bool:
        """Whether the student needs real videos to make its own."""
        return self.inputs != "rollout" or self.given_frames > 0

    @property
    def needs_teacher(self) -> bool:
        """Whether the objective reads the teacher; an adversarial one alone does not."""
        return any(name.removeprefix("data_") in TeacherWorker.makes for name in self.objective.reads)


@dataclass(frozen=True)
class EvaluateConfig(Places):
    """Evaluation of teacher, initial and distilled student, as far as they are there."""

    OUTPUTS, INPUTS = ("output",), ("prompts", "features")
    STORED = (*OUTPUTS, *INPUTS)

    output: str = "outputs/evaluation"
    """Where the report is written."""
    suite: str = "video"
    """What is measured: `video` what any video has; others, such as an example's own, ask for data of one
    kind."""
    prompts: str | None = None
    """Text file of one prompt a line; null takes the suite's own, such as those of the held-out videos."""
    features: str | None = None
    """TorchScript file of frames [N, channels, H, W] in [−1, 1] to features [N, D] for the kernel distance of
    suite video; null compares latents."""
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
        super().__post_init__()
        at_least(self, 1, "videos", "frames", "batch", "teacher_steps", "threads")
        at_least(self, -1, "teacher_guidance")
