"""One algorithm, however it is spread out: ranks, ZeRO stages, recomputation, accumulation and overlap change
no number."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from model.discriminator import ClassificationBranch, Discriminator
from model.forcing import ForcedPlan
from model.noise import SampleNoise, integer
from model.objectives import ObjectiveConfig
from model.objectives.flow_matching import flow_matching_loss
from model.objectives.gan import DiscriminatorConfig, gradient_penalty, relativistic_discriminator_loss
from model.rollout import Rollout, generate
from model.rollout_plan import RolloutPlan
from model.schedule import FlowSchedule
from model.score import ScorePlan, guided_x0, predict_x0
from orchestrator.config import DataConfig, RunConfig
from orchestrator.coordinator import Metrics
from tests.fixtures import furnished, write_real
from tests.orchestrator.groups import Groups, first_gradients_of, measured, weights_of
from workers.build import whole
from workers.dataset import ParquetDataset
from workers.model_directory import ModelDirectory
from workers.prompts import LatentDataset

pytestmark = pytest.mark.slow
UPDATES = 3
LEARNING = [  # of the quickstart
    "--distill.roles.student.engine.learning_rate=2e-4",
    "--distill.roles.critic.engine.learning_rate=4e-4",
]


@dataclass(frozen=True)
class Outcome:
    """What a run leaves behind: values without timings, and the first update's gradients."""

    metrics: list[Metrics]
    student: dict[str, Tensor]
    critic: dict[str, Tensor]


def relative(found: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    assert list(found) == list(expected)
    errors = {name: (found[name] - expected[name]).norm().item() for name in expected}
    norms = {name: gradient.norm().item() for name, gradient in expected.items()}
    # The last bias of a relativistic discriminator cancels: its gradient is zero but for rounding.
    return {name: error / (norms[name] if norms[name] > 1e-6 else 1.0) for name, error in errors.items()}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    overrides = [f"--distill.iterations={UPDATES}", "--distill.student_every=1", *LEARNING]
    return furnished(tmp_path_factory.mktemp("equivalence"), overrides=overrides)


def spread(
    config: RunConfig,
    *,
    ranks: int = 1,
    stage: int = 0,
    checkpointing: bool = False,
    accumulation: int = 1,
    teacher: tuple[int, int] = (1, 0),
    student_ranks: int | None = None,
) -> RunConfig:
    """The same run with student and critic on `ranks`, and the teacher on (ranks, ZeRO stage)."""
    roles = config.distill.roles

    def trained(role, of):
        engine = replace(role.engine, zero_stage=stage, accumulation=accumulation)
        return replace(role, ranks=of, engine=engine, activation_checkpointing=checkpointing)

    roles = replace(
        roles,
        student=trained(roles.student, student_ranks or ranks),
        teacher=replace(roles.teacher, ranks=teacher[0], zero_stage=teacher[1]),
        critic=trained(roles.critic, ranks),
    )
    return replace(config, distill=replace(config.distill, roles=roles))


def run(groups: Groups, config: RunConfig) -> Outcome:
    coordinator = groups.coordinator(config)
    metrics = [measured(values) for _, values in coordinator.run(0)]
    gradients = [first_gradients_of(group) for group in (coordinator.student, coordinator.critic)]
    return Outcome(metrics, *gradients)


@pytest.fixture(scope="module")
def base(groups: Groups, config: RunConfig) -> Outcome:
    return run(groups, spread(config))


def by_hand(config: RunConfig) -> Outcome:
    """The first student and critic update in this process, out of the model's functions and PyTorch alone."""
    distill, batch = config.distill, config.distill.batch
    student, critic = ModelDirectory(distill.student), ModelDirectory(distill.teacher)
    teacher, text = whole(critic), student.text_encoder()
    generator = whole(student).requires_grad_()
    fake_model: nn.Module = whole(critic).requires_grad_()
    settings = distill.discriminator
    if settings.taps:
        fake_model = Discriminator(whole(critic).requires_grad_(), settings)
        fake_model.branch = ClassificationBranch.drawn(config.student, settings)
    rows = ParquetDataset(config.data.train, ["prompt"]).batch(0, 2 * batch, config.seed)
    contexts = text.encode([row["prompt"] for row in rows])
    schedule, samples = FlowSchedule(config.score.shift), list(range(batch))

    def made(purpose: str, index: int) -> tuple[Tensor, Tensor]:
        """Videos of the student and their prompts."""
        context = contexts[index * batch : (index + 1) * batch]
        key, gradient, given = (config.seed, 0, purpose), purpose == "student", None
        if distill.starts_from_data:
            data, prompts = data_of(config, index)
            context, given = text.encode(prompts), data[:, : distill.given_frames]
        if distill.inputs != "rollout":
            forced = ForcedPlan(distill.inputs, key, gradient)
            return forced.predict(generator, config.rollout, data, context, samples), context
        window, chunk = config.video.frames, config.rollout.chunk
        longest = distill.rollout_frames or window
        frames = window + chunk * integer((longest - window) // chunk + 1, *key, "frames")
        plan = RolloutPlan.draw(
            config.rollout,
            frames,
            seed=config.seed,
            update=0,
            purpose=purpose,
            grad_frames=(window if frames == window else window - chunk) if gradient else 0,
            given_frames=distill.given_frames,
        )
        shape = config.video
        state = Rollout(
            config.rollout,
            plan,
            noise=SampleNoise([(*plan.noise, sample) for sample in samples]),
            cache=generator.new_cache(config.rollout.context_window(), shape.height, shape.width, "cpu"),
            shape=(batch, shape.channels, shape.height, shape.width),
            initial=given if distill.given_frames else None,
        )
        chunks = list(generate(generator, state, context))
        video = torch.cat([given, *chunks] if given is not None else chunks, dim=1)
        if frames > window:
            # The embedded codec makes a latent frame of each frame of pixels, so making one anew cuts its
            # pixels to their range.
            codec = config.video.make_codec()
            assert codec is not None
            first = codec.encode(codec.decode(video[:, -window].detach()[:, None]))
            video = torch.cat([first, video[:, 1 - window :]], dim=1)
        return video, context

    def noised(video: Tensor, purpose: str, like: str | None = None) -> tuple[Tensor, Tensor, Tensor]:
        plan = ScorePlan((config.seed, 0, purpose))
        noise, timestep = plan.draw(video, samples, config.score)
        if like:
            _, timestep = replace(plan, noise=(config.seed, 0, like)).draw(video, samples, config.score)
        return schedule.add_noise(video, noise, timestep), noise, timestep

    video, context = made("student", 0)
    noisy, _, timestep = noised(video, "score")
    real = guided_x0(
        teacher,
        noisy,
        timestep,
        cond=context,
        uncond=text.encode([""]),
        guidance=distill.roles.teacher.guidance,
        schedule=schedule,
    )
    leaves = {"video": video, "real": real}
    if settings.taps:
        velocity, leaves["logits"] = fake_model(noisy, timestep, context)
        leaves["fake"] = schedule.x0(velocity, noisy, timestep)
        data, prompts = data_of(config, 0)
        noisy_data, _, timestep = noised(data, "score-data", like="score")
        _, leaves["data_logits"] = fake_model(noisy_data, timestep, text.encode(prompts))
    else:
        leaves["fake"] = predict_x0(fake_model, noisy, timestep, context, schedule)
    student_loss = distill.objective(leaves)
    student_loss.backward()  # one graph, through teacher and critic where the objective says so
    gradients = gradients_of(generator)
    fake_model.zero_grad()

    engine = distill.roles.student.engine
    optimizer = torch.optim.AdamW(
        generator.parameters(),
        lr=engine.learning_rate,
        betas=engine.betas,
        eps=engine.eps,
        weight_decay=engine.weight_decay,
    )
    torch.nn.utils.clip_grad_norm_(generator.parameters(), engine.clip)
    optimizer.step()

    video, context = made("critic", 1)
    noisy, noise, timestep = noised(video, "critic-score")
    losses = {"student/loss": student_loss.item()}
    total = torch.zeros(())
    if settings.taps:
        data, prompts = data_of(config, 1)
        noisy_data, prompt = schedule.add_noise(data, noise, timestep), text.encode(prompts)
        velocity, logits = fake_model(noisy, timestep, context)
        _, data_logits = fake_model(noisy_data, timestep, prompt)
        total = relativistic_discriminator_loss(logits, data_logits) * settings.weight
        losses["critic/discriminator"] = total.item()
        draws = SampleNoise([(config.seed, 0, "critic-score", sample) for sample in samples])
        for step, x_t, text_of, before in (
            (1, noisy_data, prompt, data_logits),
            (2, noisy, context, logits),
        ):
            sigma, weight = (
                (settings.r1_sigma, settings.r1_weight)
                if step == 1
                else (settings.r2_sigma, settings.r2_weight)
            )
            _, perturbed = fake_model(x_t + sigma * draws.draw(x_t.shape, 0, step), timestep, text_of)
            penalty = 0.5 * weight * gradient_penalty(perturbed, before, sigma)
            losses[f"critic/r{step}"] = penalty.item()
            total = total + penalty
    else:
        velocity = fake_model(noisy, timestep, context).velocity
    critic_loss = flow_matching_loss(velocity, noise, video)
    (total + critic_loss).backward()
    losses["critic/loss"] = critic_loss.item()
    return Outcome([losses], gradients, gradients_of(fake_model))


def data_of(config: RunConfig, batch: int) -> tuple[Tensor, list[str]]:
    """Latents and prompts of a batch of the data."""
    assert config.data.real is not None
    real, size = LatentDataset(config.data.real, config.video, "prompt"), config.distill.batch
    latents, prompts = real.batch(batch * size, size, config.seed)
    return torch.stack(latents), prompts


def with_real(config: RunConfig) -> DataConfig:
    """The config's data sets, and one of real videos."""
    real = f"{config.root}/real"
    if not Path(real).exists():
        write_real(Path(real), config)
    return replace(config.data, real=real)


def gradients_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def check(found: Outcome, expected: Outcome, tolerance: float = 1e-5) -> None:
    for role in ("student", "critic"):
        errors = relative(getattr(found, role), getattr(expected, role))
        assert max(errors.values()) < tolerance, (role, {n: e for n, e in errors.items() if e > tolerance})
    for values, wanted in zip(found.metrics, expected.metrics, strict=True):
        assert values == pytest.approx(wanted, rel=1e-4)


def test_the_first_update_is_the_published_algorithm(base: Outcome, config: RunConfig) -> None:
    reference = by_hand(config)
    check(replace(base, metrics=[{name: base.metrics[0][name] for name in reference.metrics[0]}]), reference)


SPREAD = {
    "1-rank-zero-1": {"stage": 1},
    "1-rank-zero-2-recomputed-accumulated": {"stage": 2, "checkpointing": True, "accumulation": 2},
    "1-rank-zero-3-recomputed": {"stage": 3, "checkpointing": True},
    "2-ranks-zero-0-recomputed": {"ranks": 2, "checkpointing": True, "teacher": (2, 0)},
    "2-ranks-zero-1-accumulated": {"ranks": 2, "stage": 1, "accumulation": 2},
    "2-ranks-zero-2": {"ranks": 2, "stage": 2, "teacher": (2, 3)},
    "2-ranks-zero-3-accumulated": {"ranks": 2, "stage": 3, "accumulation": 2, "teacher": (2, 3)},
    "1-student-2-critics-zero-3-recomputed": {
        "ranks": 2,
        "student_ranks": 1,
        "stage": 3,
        "checkpointing": True,
        "teacher": (2, 0),
    },
}
SELDOM = ("1-rank-zero-1", "2-ranks-zero-1-accumulated", "1-student-2-critics-zero-3-recomputed")


@pytest.mark.parametrize(
    "how",
    [
        pytest.param(how, id=name, marks=[pytest.mark.by_hand] if name in SELDOM else [])
        for name, how in SPREAD.items()
    ],
)
def test_spreading_a_run_out_changes_no_number(
    groups: Groups, base: Outcome, config: RunConfig, how: dict
) -> None:
    assert len(base.metrics) == UPDATES and base.metrics[-1]["critic/loss"] != base.metrics[0]["critic/loss"]
    check(run(groups, spread(config, **how)), base)


def test_what_is_stratified_over_a_batch_is_so_for_any_ranks_and_micro_batches(
    groups: Groups, config: RunConfig
) -> None:
    config = replace(config, score=replace(config.score, timesteps="stratified"))

    def with_groups(**how: Any) -> RunConfig:
        shared = spread(config, **how)
        return replace(shared, distill=replace(shared.distill, exit_groups=2))

    expected = run(groups, with_groups(accumulation=2))
    for how in (
        {"accumulation": 4, "stage": 2},
        {"accumulation": 2, "ranks": 2, "stage": 3, "teacher": (2, 0)},
    ):
        check(run(groups, with_groups(**how)), expected)


@pytest.mark.parametrize(
    "how",
    [{}, {"ranks": 2, "stage": 3, "teacher": (2, 3)}, {"stage": 2, "accumulation": 2, "checkpointing": True}],
    ids=["1-rank", "2-ranks-zero-3", "1-rank-zero-2-recomputed-accumulated"],
)
@pytest.mark.parametrize("loss", ["sid", "gan"])
def test_gradients_that_flow_through_the_scores_are_those_of_one_graph(
    groups: Groups, config: RunConfig, how: dict, loss: str
) -> None:
    distill = replace(config.distill, iterations=1, objective=ObjectiveConfig({"sid": 1.0}))
    data = config.data
    if loss == "gan":
        data = with_real(config)
        distill = replace(
            distill,
            objective=ObjectiveConfig({"dmd": 1.0, "relativistic_gan": 0.5}),
            discriminator=DiscriminatorConfig(
                taps=(0, 1), concat_time=True, weight=0.7, r1_weight=0.3, r1_sigma=0.5,
                r2_weight=0.2, r2_sigma=0.5,
            ),
        )  # fmt: skip
    config = replace(config, data=data, distill=distill)
    found, reference = run(groups, spread(config, **how)), by_hand(config)
    assert len(found.metrics) == 1
    values = {name: found.metrics[0][name] for name in reference.metrics[0]}
    # The penalties' finite differences amplify rounding.
    check(replace(found, metrics=[values]), reference, tolerance=1e-4 if loss == "gan" else 1e-5)


@pytest.mark.parametrize(
    "inputs",
    [
        pytest.param({"inputs": "teacher_forcing"}, marks=pytest.mark.by_hand),
        {"inputs": "diffusion_forcing"},
        {"rollout_frames": 24},
        {"given_frames": 2},
    ],
    ids=lambda inputs: "-".join(map(str, *inputs.items())),
)
def test_whatever_the_student_starts_from_the_first_update_is_that_of_one_graph(
    groups: Groups, config: RunConfig, inputs: dict
) -> None:
    distill = replace(config.distill, iterations=1, **inputs)
    config = replace(config, data=with_real(config), distill=distill)
    reference = by_hand(config)
    found = run(groups, spread(config, ranks=2, stage=3, teacher=(2, 3)))
    values = {name: found.metrics[0][name] for name in reference.metrics[0]}
    check(replace(found, metrics=[values]), reference)


@pytest.mark.parametrize(
    "how",
    [
        {"ranks": 2, "stage": 3, "teacher": (2, 3), "checkpointing": True},
        {"ranks": 2, "stage": 2, "accumulation": 2},
        {"accumulation": 4},
    ],
    ids=["2-ranks-zero-3-recomputed", "2-ranks-zero-2-accumulated", "1-rank-accumulated"],
)
def test_a_replayed_gradient_changes_no_number(
    groups: Groups, base: Outcome, config: RunConfig, how: dict
) -> None:
    replayed = replace(config, distill=replace(config.distill, replay=True))
    check(run(groups, spread(replayed, **how)), base)


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.by_hand)])
def test_weights_gathered_once_a_rollout_are_the_same(
    groups: Groups, base: Outcome, config: RunConfig, compiled: bool
) -> None:
    sharded = spread(config, ranks=2, stage=3)
    gathered = replace(sharded, distill=replace(sharded.distill, gather=True, compile=compiled))
    check(run(groups, gathered), base)


@pytest.mark.parametrize("loss", ["dmd", pytest.param("sid", marks=pytest.mark.by_hand), "gan"])
def test_ranks_that_share_the_tokens_of_every_video_change_no_number(
    groups: Groups, config: RunConfig, loss: str
) -> None:
    """Teacher, replicated, and critic under ZeRO-2: each one group of two ranks."""
    distill, data = replace(config.distill, iterations=2), config.data
    if loss == "sid":
        distill = replace(distill, objective=ObjectiveConfig({"sid": 1.0}))
    if loss == "gan":
        data = with_real(config)
        objective = ObjectiveConfig({"dmd": 1.0, "gan": 0.5})
        branch = DiscriminatorConfig(taps=(0, 1), concat_time=True, r1_weight=0.3, r1_sigma=0.5)
        distill = replace(distill, objective=objective, discriminator=branch)
    plain = spread(replace(config, data=data, distill=distill), stage=2)
    expected, roles = run(groups, plain), plain.distill.roles
    roles = replace(
        roles,
        teacher=replace(roles.teacher, ranks=2, sequence=2),
        critic=replace(roles.critic, ranks=2, sequence=2),
    )
    shared = replace(plain, distill=replace(plain.distill, roles=roles))
    check(run(groups, shared), expected, tolerance=1e-4 if loss == "gan" else 1e-5)


@pytest.mark.parametrize(
    ("replicas", "how"),
    [
        (1, {"ranks": 2, "stage": 3, "teacher": (2, 0)}),
        pytest.param(2, {"stage": 2, "accumulation": 2}, marks=pytest.mark.by_hand),
        pytest.param(1, {"stage": 2, "accumulation": 2}, marks=pytest.mark.by_hand),
        pytest.param(2, {"ranks": 2, "stage": 3, "teacher": (2, 0)}, marks=pytest.mark.by_hand),
    ],
    ids=["1-2-ranks-zero-3", "2-1-rank-accumulated", "1-1-rank-accumulated", "2-2-ranks-zero-3"],
)
def test_replicas_that_roll_out_for_the_student_change_no_number(
    groups: Groups, base: Outcome, config: RunConfig, replicas: int, how: dict
) -> None:
    shared = spread(config, **how)
    roles = replace(shared.distill.roles, rollout=replace(shared.distill.roles.rollout, ranks=replicas))
    check(run(groups, replace(shared, distill=replace(shared.distill, replay=True, roles=roles))), base)


@pytest.mark.by_hand
def test_a_replay_is_the_gradient_where_it_flows_through_the_scores_and_over_long_rollouts(
    groups: Groups, config: RunConfig
) -> None:
    for changes in (
        {"objective": ObjectiveConfig({"sid": 1.0})},
        {"rollout_frames": 24},
        {"given_frames": 2},
    ):
        distill = replace(config.distill, iterations=2, **changes)
        plain = replace(config, data=with_real(config), distill=distill)
        expected = run(groups, spread(plain, accumulation=2))
        replayed = replace(plain, distill=replace(distill, replay=True))
        check(run(groups, spread(replayed, accumulation=2)), expected)


@pytest.mark.parametrize("replayed", [False, True])
def test_overlap_changes_no_bit(groups: Groups, config: RunConfig, replayed: bool) -> None:
    config = spread(config, ranks=2, stage=2, accumulation=2, teacher=(2, 0))
    config = replace(config, distill=replace(config.distill, replay=replayed))
    outcomes = []
    for overlap in (True, False):
        distill = replace(config.distill, student_every=2, overlap=overlap)
        coordinator = groups.coordinator(replace(config, distill=distill))
        parts = coordinator.plan.parts
        assert parts > 1, "of which all are to be there before their turn"
        ahead, metrics = [], []
        for _, values in coordinator.run(0):
            ahead.append((set(coordinator.ahead), set(coordinator.scored)))
            metrics.append(measured(values))
        if overlap:
            # The teacher scores what the student made for its next update while the critic still trains.
            for done, asked in enumerate(ahead[:-1], start=1):
                student = done + done % 2
                held = range(parts if replayed else 1) if student < UPDATES else range(0)
                coming = {(student, "student", part) for part in held}
                if done % 2:
                    coming |= {(done, "critic", part) for part in range(parts)}
                scored = {(student, "teacher", part) for part in held} if done % 2 == 0 else set()
                assert asked == (coming, scored)
        else:
            assert ahead == [(set(), set())] * UPDATES
        weights = [
            weights_of(coordinator.student),
            weights_of(coordinator.student, ema=True),
            weights_of(coordinator.critic),
        ]
        outcomes.append((metrics, weights))
    (metrics, weights), (sequential, expected) = outcomes
    assert metrics == sequential
    for found, wanted in zip(weights, expected, strict=True):
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)
