"""The coordinator moves references: no tensor is ever rebuilt in its process."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import av
import pytest
import ray
import torch
from PIL import Image
from ray import ObjectRef
from ray._private import tensor_serialization_utils

from infra import storage
from orchestrator.checkpoints import Checkpoints, load
from orchestrator.coordinator import Coordinator
from orchestrator.run_state import RunState
from orchestrator.worker_group import Request
from pipelines.distill import card_of, check_models, sample
from pipelines.media import SHEET_HEIGHT
from pipelines.selection import write_student
from tests.fixtures import furnished
from tests.orchestrator.groups import Groups, measured, weights_of
from workers.batch import Batch, Read
from workers.model_directory import ModelDirectory

pytestmark = pytest.mark.slow


class TensorArrived(AssertionError):
    pass


@contextmanager
def no_tensor_may_arrive() -> Iterator[None]:
    """Whatever a pickle or Ray calls to rebuild a tensor or its storage raises in this process."""

    def refuse(*_: object, **__: object) -> None:
        raise TensorArrived

    with pytest.MonkeyPatch.context() as patch:
        for name in dir(torch._utils):
            if name.startswith("_rebuild_"):
                patch.setattr(torch._utils, name, refuse)
        patch.setattr(torch.storage, "_load_from_bytes", refuse)
        patch.setattr(tensor_serialization_utils, "_zero_copy_tensors_deserializer", refuse)
        yield


def leaves(value: object) -> Iterator[object]:
    """Everything that is not a container, below a value."""
    if isinstance(value, dict):
        for item in value.items():
            yield from leaves(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from leaves(item)
    elif isinstance(value, Batch):
        yield from leaves([value.samples, value.columns])
    elif isinstance(value, Request):
        yield from leaves([value.group.role, value.verb, value.stats])
    else:
        yield value


def test_no_tensor_reaches_the_coordinators_process(groups: Groups, tmp_path: Path) -> None:
    config = furnished(tmp_path, overrides=["--distill.iterations=4", "--distill.student_every=2"])
    roles = replace(config.distill.roles, student=replace(config.distill.roles.student, ranks=2))
    config = replace(config, distill=replace(config.distill, roles=roles))
    models = check_models(config)
    coordinator = groups.coordinator(config)
    state = RunState("distill", str(tmp_path), {}, keep=2)
    with no_tensor_may_arrive():
        for done, metrics in coordinator.run(0):
            assert all(isinstance(leaf, int | str | ObjectRef | Read) for leaf in leaves(coordinator.ahead))
            assert bool(coordinator.ahead) == (done < 4)
            assert all(type(value) is float for value in metrics.values())
            with Checkpoints(state, coordinator.groups) as checkpoints:
                checkpoints.begin(done, 0)
        found = storage.newest_complete(f"{tmp_path}/checkpoints")
        assert found is not None and storage.read_metadata(found)["done"] == 4
        load(found, coordinator.groups)
        files = sample(config, coordinator, 4)
        path = f"{tmp_path}/model"
        write_student(coordinator.student, path, card_of(config, models, "run"))

        # The guard works: fetching what the coordinator only refers to trips it.
        made, _ = coordinator.rollout(4, "critic", 0)
        with pytest.raises(Exception) as caught:
            ray.get(made["video"][0])
        assert "TensorArrived" in repr(caught.value) + str(caught.value)
        assert made["context"][0] == Read("train", "context", coordinator.plan.position(4, "critic", 0))
    with av.open(files[0]) as container:
        assert len(list(container.decode(video=0))) == config.video.frames
        assert container.streams.video[0].average_rate == config.video.fps
    with Image.open(files[1]) as sheet:  # eight videos of six frames
        assert sheet.size == (config.video.frames * SHEET_HEIGHT, 8 * SHEET_HEIGHT)
    assert ray.get(made["video"][0]).shape == config.video.shape
    assert asdict(ModelDirectory(path).card)["lineage"] == {"distilled": "run"}


@pytest.mark.by_hand
def test_a_group_that_lost_a_rank_is_made_anew_and_goes_on_with_the_same_numbers(
    groups: Groups, tmp_path: Path
) -> None:
    config = furnished(tmp_path, overrides=["--distill.iterations=4", "--distill.student_every=2"])
    critic = replace(config.distill.roles.critic, ranks=2)
    config = replace(
        config, distill=replace(config.distill, roles=replace(config.distill.roles, critic=critic))
    )
    roles = groups.roles(config)
    trained = {role: roles.groups[role] for role in ("student", "critic")}
    state = RunState("distill", str(tmp_path), {}, keep=1)
    expected = []
    for done, metrics in Coordinator(config, roles.groups).run(0):
        expected.append(measured(metrics))
        if done == 2:
            with Checkpoints(state, roles.groups) as checkpoints:
                checkpoints.begin(done, 0)
    weights = {role: weights_of(group) for role, group in trained.items()}

    held, lost = roles.groups["critic"], roles.groups["critic"].actors[1]
    ray.kill(lost)
    with pytest.raises(RuntimeError, match="a critic rank was lost"):
        list(Coordinator(config, roles.groups).run(0))
    roles.rebuild("critic")
    assert roles.groups["critic"] is held and lost not in held.actors
    load(state.path(2), roles.groups)
    again = [measured(metrics) for _, metrics in Coordinator(config, roles.groups).run(2)]
    assert again == expected[2:]
    for role, group in trained.items():
        found = weights_of(group)
        assert all(torch.equal(found[name], weights[role][name]) for name in found)
