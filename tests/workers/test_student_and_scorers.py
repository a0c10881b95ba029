"""A kept graph is used once, at the weights it was made with; and what a worker refuses is readable where the driver stands."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import ray
import torch

from model.rollout_plan import RolloutPlan
from model.score import ScorePlan
from orchestrator.config import RunConfig
from orchestrator.worker_group import WorkerGroup
from tests.fixtures import furnished
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
        rollout=config.rollout,
        objective=config.distill.objective,
        engine=replace(roles.student.engine, zero_stage=0),
        activation_checkpointing=False,
    )
    critic = group(
        "critic",
        CriticWorker,
        model=config.distill.teacher,
        score=config.score,
        discriminator=config.distill.discriminator,
        relativistic=False,
        engine=replace(roles.critic.engine, zero_stage=0),
        activation_checkpointing=False,
    )
    for each in (student, critic):
        each.start(timeout_s=120)
    yield student, critic
    for each in (student, critic):
        ray.kill(each.actors[0])


def contexts(config: RunConfig) -> list[ray.ObjectRef]:
    sizes = config.student
    return [ray.put(torch.full((sizes.text_len, sizes.text_dim), 0.1 * sample)) for sample in SAMPLES]


def test_a_graph_is_pulled_back_once_at_its_own_weights(
    roles: tuple[WorkerGroup, WorkerGroup], config: RunConfig
) -> None:
    student, critic = roles
    prompts = contexts(config)

    def rollout(*, gradient: bool) -> list[ray.ObjectRef]:
        plan = RolloutPlan.draw(
            config.rollout,
            config.video.frames,
            seed=0,
            update=0,
            purpose="student",
            grad_frames=config.video.frames if gradient else 0,
        )
        stats, videos = student.scatter("rollout", SAMPLES, prompts, head=(plan,))
        assert student.stats(stats)["seconds"] > 0
        return videos

    def pullback(videos: list[ray.ObjectRef]) -> dict[str, float]:
        # The critic's answer against the video itself: some gradient, which is all that is needed here.
        _, fake = critic.scatter("score", SAMPLES, videos, prompts, head=(False, ScorePlan((0, 0, "score"))))
        (stats,) = student.scatter("judge", SAMPLES, fake, prompts_like(videos), results=0)
        loss = student.stats(stats)
        (stats,) = student.scatter("pullback", SAMPLES, results=0)
        return loss | student.stats(stats)

    def prompts_like(videos: list[ray.ObjectRef]) -> list[ray.ObjectRef]:
        return [zeros_like.remote(video) for video in videos]

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
        lambda: student.stats(student.broadcast("step")),
        "step was called while the graph of a rollout is alive; pull it back first.",
    )
    rollout(gradient=False)  # evaluation in between is fine
    assert pullback(videos)["loss"] > 0
    refused(lambda: pullback(videos), no_graph)
    assert student.stats(student.broadcast("step"))["grad_norm"] > 0

    videos = rollout(gradient=True)
    assert ray.get(student.actors[0].force_step.remote()) == 2
    refused(lambda: pullback(videos), "the graph was made with weights 1, and they are now 2.")
    # And the worker is whole: the next update goes through.
    pullback(rollout(gradient=True))
    assert student.stats(student.broadcast("step"))["grad_norm"] > 0


def test_a_score_is_pulled_back_once_at_its_own_weights(
    roles: tuple[WorkerGroup, WorkerGroup], config: RunConfig
) -> None:
    _, critic = roles
    prompts = contexts(config)
    videos = [ray.put(torch.ones(config.video.shape) * (sample + 1)) for sample in SAMPLES]
    plan = ScorePlan((0, 0, "score"))

    def refused(verb: str, *columns: list[ray.ObjectRef], head: tuple, says: str) -> None:
        with pytest.raises(RuntimeError) as caught:
            critic.stats(critic.scatter(verb, SAMPLES, *columns, head=head)[0])
        assert str(caught.value).startswith(f"critic: {says}")

    refused(
        "pullback", videos, head=(["fake"],), says="pullback needs the graph of a score, and none is alive."
    )
    critic.scatter("score", SAMPLES, videos, prompts, head=(True, plan))
    refused("score", videos, prompts, head=(True, plan), says="a score to be pulled back was asked for while")
    with pytest.raises(RuntimeError, match="update was called while the graph of a score is alive"):
        critic.stats(critic.scatter("update", SAMPLES, videos, prompts, head=(plan,), results=0)[0])
    _, gradients = critic.scatter("pullback", SAMPLES, videos, head=(["fake"],))
    assert all(gradient.shape == config.video.shape and gradient.any() for gradient in ray.get(gradients))
    refused(
        "pullback", videos, head=(["fake"],), says="pullback needs the graph of a score, and none is alive."
    )


@ray.remote(num_cpus=0)
def zeros_like(video: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(video)


def test_a_workers_defect_keeps_its_own_trace(
    roles: tuple[WorkerGroup, WorkerGroup], config: RunConfig
) -> None:
    _, critic = roles
    videos = [ray.put(torch.zeros(config.video.shape))] * 2
    with pytest.raises(RuntimeError, match=r"^critic: ") as caught:
        critic.stats(
            critic.scatter(
                "update", SAMPLES, videos, [ray.put(torch.zeros(1))] * 2, head=(ScorePlan(()),), results=0
            )[0]
        )
    assert "critic.py" in str(caught.value.__cause__)
