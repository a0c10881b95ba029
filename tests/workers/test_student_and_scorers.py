"""A kept graph is used once, at the weights it was made with; and what a worker refuses is readable where the
driver stands."""

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import ray
import torch

from model.adapters import AdapterConfig
from model.rollout_plan import RolloutPlan
from model.score import ScorePlan
from orchestrator.config import RunConfig
from orchestrator.roles import settings_of
from orchestrator.worker_group import WorkerGroup
from tests.fixtures import furnished
from workers.batch import Batch
from workers.critic import CriticWorker
from workers.student import StudentWorker

pytestmark = pytest.mark.slow
SAMPLES = [0, 1]


class SteppableStudent(StudentWorker):
    """Can be made to step its weights although it should not."""

    def force_step(self) -> int:
        for parameter in self.engine.module.parameters():
            parameter.grad = torch.ones_like(parameter)
        self.engine._pending = self.engine.config.accumulation
        return self.engine.step().stepped and self.engine.version


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    return furnished(tmp_path_factory.mktemp("workers"))


def group(name: str, kind: type, **settings: object) -> WorkerGroup:
    actor = ray.remote(kind).options(num_cpus=0.1).remote(rank=0, ranks=1, threads=1, **settings)
    return WorkerGroup(name, [actor])


@pytest.fixture(scope="module")
def roles(ray_cluster: object, config: RunConfig) -> Iterator[tuple[WorkerGroup, WorkerGroup]]:
    roles = config.distill.roles
    student = group(
        "student",
        SteppableStudent,
        model=config.distill.student,
        data=settings_of(config)["student"]["data"],
        rollout=config.rollout,
        objective=config.distill.objective,
        score=config.score,
        directions=True,
        compile=False,
        gather=False,
        engine=replace(roles.student.engine, zero_stage=0),
        activation_checkpointing=False,
        adapters=AdapterConfig(),
    )
    critic = group(
        "critic",
        CriticWorker,
        model=config.distill.teacher,
        data=settings_of(config)["critic"]["data"],
        score=config.score,
        discriminator=config.distill.discriminator,
        relativistic=False,
        sequence=1,
        engine=replace(roles.critic.engine, zero_stage=0),
        activation_checkpointing=False,
        adapters=AdapterConfig(),
    )
    for each in (student, critic):
        each.start(timeout_s=120)
    yield student, critic
    for each in (student, critic):
        ray.kill(each.actors[0])


def column(name: str, tensor: Callable[[int], torch.Tensor]) -> Batch:
    return Batch(SAMPLES, {name: [ray.put(tensor(sample)) for sample in SAMPLES]})


def contexts(config: RunConfig) -> Batch:
    sizes = config.student
    return column("context", lambda sample: torch.full((sizes.text_len, sizes.text_dim), 0.1 * sample))


def test_a_graph_is_pulled_back_once_at_its_own_weights(
    roles: tuple[WorkerGroup, WorkerGroup], config: RunConfig
) -> None:
    student, critic = roles
    prompts = contexts(config)

    def rollout(*, gradient: bool) -> Batch:
        plan = RolloutPlan.draw(
            config.rollout,
            config.video.frames,
            seed=0,
            update=0,
            purpose="student",
            grad_frames=config.video.frames if gradient else 0,
        )
        request, videos = student.scatter("rollout", plan, prompts, makes=("video",))
        assert request.wait()["seconds"] > 0
        return videos

    def pullback(videos: Batch) -> dict[str, float]:
        # The critic's answer against nothing: some gradient, which is all that is needed here.
        plan = ScorePlan((0, 0, "score"))
        _, fake = critic.scatter("score", plan, videos | prompts, makes=("fake",))
        real = Batch(SAMPLES, {"real": [zeros_like.remote(video) for video in videos["video"]]})
        judged, _ = student.scatter("judge", plan, fake | real)
        return judged.wait() | student.scatter("pullback", None, Batch(SAMPLES))[0].wait()

    def step() -> dict[str, float]:
        return student.scatter("step", None, Batch())[0].wait()

    def refused(call: object, message: str) -> None:
        with pytest.raises(RuntimeError) as caught:
            call()
        assert str(caught.value) == f"student: {message}"

    no_graph = "judge needs the graph of a rollout with gradient, and none is alive."
    videos = rollout(gradient=False)
    refused(lambda: pullback(videos), no_graph)

    videos = rollout(gradient=True)
    refused(
        lambda: rollout(gradient=True),
        "a video with gradient was asked for while the graph of the last one is alive; pull it back first.",
    )
    refused(
        step,
        "step was called while the graph of a rollout is alive; pull it back first.",
    )
    rollout(gradient=False)  # evaluation in between is fine
    assert pullback(videos)["loss"] > 0
    refused(lambda: pullback(videos), no_graph)
    assert step()["grad_norm"] > 0

    videos = rollout(gradient=True)
    assert ray.get(student.actors[0].force_step.remote()) == 2
    refused(lambda: pullback(videos), "the graph was made with weights 1, and they are now 2.")
    # And the worker is whole: the next update goes through.
    pullback(rollout(gradient=True))
    assert step()["grad_norm"] > 0


@pytest.mark.by_hand
def test_a_score_is_pulled_back_once_at_its_own_weights(
    roles: tuple[WorkerGroup, WorkerGroup], config: RunConfig
) -> None:
    _, critic = roles
    videos = column("video", lambda sample: torch.ones(config.video.shape) * (sample + 1))
    cotangents = column("fake", lambda sample: torch.ones(config.video.shape) * (sample + 1))
    inputs, kept = videos | contexts(config), ScorePlan((0, 0, "score"), gradient=True)
    no_graph = "pullback needs the graph of a score, and none is alive."

    def refused(verb: str, plan: object, batch: Batch, says: str) -> None:
        with pytest.raises(RuntimeError) as caught:
            critic.scatter(verb, plan, batch)[0].wait()
        assert str(caught.value).startswith(f"critic: {says}")

    refused("pullback", None, cotangents, no_graph)
    critic.scatter("score", kept, inputs)
    refused("score", kept, inputs, "a score to be pulled back was asked for while")
    refused("update", kept, inputs, "update was called while the graph of a score is alive")
    _, made = critic.scatter("pullback", None, cotangents, makes=("gradient",))
    gradients = ray.get(made["gradient"])
    assert all(gradient.shape == config.video.shape and gradient.any() for gradient in gradients)
    refused("pullback", None, cotangents, no_graph)


@ray.remote(num_cpus=0)
def zeros_like(video: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(video)


def test_a_workers_defect_keeps_its_own_trace(
    roles: tuple[WorkerGroup, WorkerGroup], config: RunConfig
) -> None:
    _, critic = roles
    inputs = column("video", lambda _: torch.zeros(config.video.shape)) | column(
        "context", lambda _: torch.zeros(1)
    )
    with pytest.raises(RuntimeError, match=r"^critic: ") as caught:
        critic.scatter("update", ScorePlan(()), inputs)[0].wait()
    assert "critic.py" in str(caught.value.__cause__)
