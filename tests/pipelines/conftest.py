"""What takes a while to make, made once."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import ray
import torch.distributed as dist

from orchestrator import single_model
from workers.engine import free_port, init_process_group


@ray.remote(num_cpus=0)
class _Rank:
    """A rank that trains one model after the other."""

    def run(self, loop: Callable[[Any], None], config: Any) -> None:
        if not dist.is_initialized():
            init_process_group(
                rank=0, world_size=1, master_addr="127.0.0.1", master_port=free_port(), timeout_s=600
            )
        single_model.join = lambda: (0, 1)
        loop(config)


@pytest.fixture(scope="session")
def _rank(ray_cluster: object) -> Iterator[Any]:
    rank = _Rank.remote()
    yield rank
    ray.kill(rank)


@pytest.fixture
def reused_rank(_rank: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training of one model finds its rank started. For tests that look at what is trained; others start Ray
    Train."""

    class Trainer:
        def __init__(self, loop: Callable[[Any], None], *, train_loop_config: Any, **_: Any) -> None:
            self.work = (loop, train_loop_config)

        def fit(self) -> None:
            ray.get(_rank.run.remote(*self.work))

    monkeypatch.setattr(single_model, "TorchTrainer", Trainer)
