"""The loop that trains one model: the device of a rank, and what becomes of numbers that are not finite."""

import os
import re
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from threading import Event
from types import SimpleNamespace
from typing import Any

import pytest
import ray
import torch
from torch import Tensor, nn

from infra import storage
from orchestrator import cluster, single_model
from orchestrator.config import RunConfig
from orchestrator.fault import Fault
from orchestrator.recovery import GivenUp, RetryConfig
from orchestrator.run_state import RunState
from orchestrator.single_model import Task
from orchestrator.stages import PretrainConfig, TrainRole
from workers import zero
from workers.engine import EngineConfig, TrainEngine, free_port, init_process_group


def test_a_rank_computes_on_the_device_that_ray_train_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray Train shows every rank all GPUs of its node."""
    chosen: list[Any] = []
    started: list[dict[str, Any]] = []
    context = SimpleNamespace(get_world_rank=lambda: 1, get_world_size=lambda: 2)
    monkeypatch.setattr(ray.train, "get_context", lambda: context)
    monkeypatch.setattr(ray.train.torch, "get_device", lambda: torch.device("cuda:1"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: chosen[-1])
    fake = SimpleNamespace(init_distributed=lambda **how: started.append(how))
    monkeypatch.setattr(zero, "deepspeed", lambda: fake)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):  # restored afterwards
        monkeypatch.setenv(name, "0")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "1")

    assert single_model.join() == (1, 2)
    assert zero.device() == torch.device("cuda:1")
    assert chosen == [1] and os.environ["LOCAL_RANK"] == "1"
    assert (started[0]["dist_backend"], started[0]["rank"]) == ("nccl", 1)


class Line(Task):
    """A linear model of the numbers at each position of the data; `bad` updates have no finite loss."""

    compile = False

    def __init__(self, *bad: int):
        self.bad = bad
        self.seen: list[tuple[int, int]] = []

    def engine(self) -> TrainEngine:
        return TrainEngine(lambda: nn.Linear(1, 1), EngineConfig(learning_rate=0.1, zero_stage=0))

    def open(self, device: torch.device) -> None:
        pass

    def loss(
        self, module: Callable[..., Tensor], update: int, samples: range, *, batch: int, position: int
    ) -> Tensor:
        self.seen.append((update, position))
        x = torch.tensor([[float(position + sample)] for sample in samples]).cos()
        return module(x).square().mean() * (torch.nan if update in self.bad else 1)

    def export(self, engine: TrainEngine, path: str) -> None:
        pass


@ray.remote(num_cpus=0)
class Only:
    """The only rank, without Ray Train around it."""

    def __init__(self) -> None:
        init_process_group(
            rank=0, world_size=1, master_addr="127.0.0.1", master_port=free_port(), timeout_s=60
        )
        single_model.join = lambda: (0, 1)

    def run(
        self, settings: PretrainConfig, state: RunState, task: Line, *orders: str
    ) -> list[tuple[int, int]]:
        self.said: list[Any] = []
        reports, left = SimpleNamespace(put=self.said.append), list(orders)
        asked = {
            "reports": reports,
            "orders": SimpleNamespace(get=lambda: left.pop(0) if left else Event().wait()),
        }
        single_model._loop({"settings": settings, "seed": 0, "state": state, "task": task, **asked})
        return task.seen

    def reported(self) -> list[Any]:
        """Warnings, and what was measured after updates."""
        return [each for each in self.said if isinstance(each, str | tuple)]


def weights(checkpoint: str) -> dict[str, Tensor]:
    record = torch.load(f"{checkpoint}/engine-00000-of-00001.pt", weights_only=True)
    return {name: each["value"] for name, each in record["parameters"].items()}


def test_the_loop_goes_on_where_the_data_stood_and_stops_with_a_way_to_go_on(
    ray_cluster: object, tmp_path: Path
) -> None:
    settings = PretrainConfig(output=str(tmp_path), updates=4, batch=2, checkpoint_every=3)
    state, rank = RunState("pretrain", str(tmp_path), {}, keep=9), Only.remote()
    assert ray.get(rank.run.remote(settings, state, Line())) == [(0, 0), (1, 2), (2, 4), (3, 6)]
    # Every third state, and the last.
    assert [storage.read_metadata(state.path(done))["position"] for done in (3, 4)] == [6, 8]
    straight = weights(state.path(4))

    resumed = replace(state, checkpoint=state.path(3), done=3, position=6)
    assert ray.get(rank.run.remote(settings, resumed, Line())) == [(3, 6)]
    assert all(torch.equal(each, straight[name]) for name, each in weights(state.path(4)).items())
    longer = replace(settings, updates=6, batch=5, checkpoint_every=1)
    assert ray.get(rank.run.remote(longer, resumed, Line())) == [(3, 6), (4, 11), (5, 16)]

    # What the driver asks for.
    seldom = replace(settings, updates=9, checkpoint_every=100, output=f"{tmp_path}/asked")
    asked = replace(state, output=seldom.output)
    assert len(ray.get(rank.run.remote(seldom, asked, Line(), "checkpoint"))) == 9
    made = sorted(path.name for path in Path(seldom.output, "checkpoints").iterdir())
    assert len(made) == 2 and made[1] == "0000009"
    assert len(ray.get(rank.run.remote(seldom, asked, Line(), "stop"))) < 9

    with pytest.raises(FloatingPointError) as stopped:
        ray.get(rank.run.remote(replace(longer, not_finite="stop"), resumed, Line(5)))
    rate = "pretrain.role.engine.learning_rate"
    assert (
        f"pretrain: the loss of update 5 is not finite; go on with a lower {rate}, as in --{rate} VALUE "
        f"--allow-change {rate} --resume ({state.path(5)} led there and is kept in {tmp_path}/not-finite)."
    ) in str(stopped.value)
    assert not storage.is_complete(state.path(5)) and storage.is_complete(state.path(4))

    # Otherwise such an update is dropped, and changes nothing.
    each = replace(settings, updates=5, checkpoint_every=1)
    assert len(ray.get(rank.run.remote(each, resumed, Line(4)))) == 2
    dropped, before = weights(state.path(5)), weights(state.path(4))
    assert all(torch.equal(value, before[name]) for name, value in dropped.items())
    _, measured = ray.get(rank.reported.remote())[-1]
    assert measured["dropped_updates"] == 1
    more = replace(settings, updates=30, checkpoint_every=50)
    assert len(ray.get(rank.run.remote(more, resumed, Line(*range(4, 13))))) == 27
    counts = [(told[0], told[1]["dropped_updates"]) for told in ray.get(rank.reported.remote())]
    assert counts == [(10, 6), (20, 9), (30, 9)]
    with pytest.raises(FloatingPointError, match=r"gradients of 10 updates in a row, up to 13, are not fin"):
        ray.get(rank.run.remote(more, resumed, Line(*range(4, 14))))
    with pytest.raises(
        FloatingPointError, match=r"gradients of 3 updates in a row.* nothing was learned yet"
    ):
        ray.get(rank.run.remote(replace(more, updates=3), state, Line(0, 1, 2)))

    # What cannot be stored is said, and training goes on; without the last checkpoint it does not end well.
    (tmp_path / "file").write_text("no directory")
    broken = RunState("pretrain", f"{tmp_path}/file", {}, keep=9)
    with pytest.raises(storage.StorageError, match=r"file/checkpoints/0000004 cannot be written"):
        ray.get(rank.run.remote(replace(settings, checkpoint_every=2), broken, Line()))
    warned, _ = ray.get(rank.reported.remote())
    assert warned.startswith("pretrain: WARNING: no checkpoint after update 1, the next will be tried: ")
    ray.kill(rank)


class Mortal(Line):
    """One of its ranks is killed when it first comes to an update."""

    def __init__(self, mark: Path, dies: int):
        super().__init__()
        self.mark, self.dies = mark, dies

    def loss(
        self, module: Callable[..., Tensor], update: int, samples: range, *, batch: int, position: int
    ) -> Tensor:
        if update == self.dies and samples.stop == batch and not self.mark.exists():
            self.mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().loss(module, update, samples, batch=batch, position=position)


def train(config: RunConfig, state: RunState, task: Task, said: list[str]) -> None:
    @contextmanager
    def progress(done: int) -> Iterator[single_model.Report]:
        yield lambda done, losses: None

    tracker: Any = SimpleNamespace(metrics=lambda step, values: None)
    single_model.train(config, state, task, tracker=tracker, progress=progress, say=said.append)


def config(output: Path, ranks: int) -> RunConfig:
    settings = PretrainConfig(
        output=str(output),
        updates=18,
        batch=4,
        checkpoint_every=7,
        role=TrainRole(ranks=ranks, cpus=0.1),
        faults=RetryConfig(backoff_s=0.0),
    )
    return replace(RunConfig(), pretrain=settings)


def test_a_fault_is_overcome_as_often_as_it_is_worth_it(
    ray_cluster: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[int] = []

    def attempt(config: RunConfig, state: RunState, task: Task, reader: Any, *_: object) -> str:
        begun.append(state.done)
        if len(begun) == 1:
            for report in ((10, {"loss": 1.0, "dropped_updates": 0}), {"saved": (14, 56)}):
                reader.reports.put(report)
        else:
            ray.kill(reader.reports.actor)  # then nothing is known of what was reported
        reader.end()
        raise Fault("pretrain", "lost", "a pretrain rank was lost")

    monkeypatch.setattr(single_model, "_attempt", attempt)
    said = list[str]()
    with pytest.raises(
        GivenUp, match="pretrain: update 14 failed twice in the same way: a pretrain rank was"
    ):
        train(config(tmp_path, 1), RunState("pretrain", str(tmp_path), {}, keep=9), Line(), said)
    assert begun == [0, 14]
    told = "lost, found after 14 updates: a pretrain rank was lost"
    assert said == [f"pretrain: FAULT ({told}); going on from 14"]


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.by_hand)])
def test_lost_ranks_are_started_anew_and_change_no_number(
    ray_cluster: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ranks: int
) -> None:
    here, said = ray.get_runtime_context().get_node_id(), list[str]()
    monkeypatch.setattr(cluster, "draining_nodes", lambda: {here})
    ill = config(tmp_path / "ill", ranks)
    state = RunState("pretrain", ill.pretrain.output, {}, keep=9)
    train(ill, state, Mortal(tmp_path / "died", 17), said)
    (fault,) = (each for each in said if "FAULT" in each)
    # Whether the second checkpoint was whole by then is a matter of time.
    assert re.search(
        r"\(lost, found after 1[04] updates: a pretrain rank was.*; going on from (7|14)$", fault
    )
    # Each of the two groups of ranks was told that its node is being drained.
    assert said.count(f"pretrain: node {here} is being drained: a checkpoint is made") == 2

    well = config(tmp_path / "well", ranks)
    undisturbed = replace(state, output=well.pretrain.output)
    if ranks == 1:
        rank = Only.remote()
        ray.get(rank.run.remote(well.pretrain, undisturbed, Line()))
        ray.kill(rank)
    else:
        train(well, undisturbed, Line(), said)
    for number in range(ranks):
        name = f"engine-{number:05d}-of-{ranks:05d}.pt"
        mine, other = (
            torch.load(f"{each.path(18)}/{name}", weights_only=True)["parameters"]
            for each in (state, undisturbed)
        )
        assert mine.keys() == other.keys() != set()
        assert all(torch.equal(mine[each]["value"], other[each]["value"]) for each in other)
