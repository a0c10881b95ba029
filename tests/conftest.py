"""What every test of a session shares: one local Ray with tokens, an MLflow server and an S3 server."""

import os
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import torch.distributed as dist

from orchestrator import cluster, single_model
from pipelines import distill
from tests.mlflow_server import Server
from tests.orchestrator.groups import Groups, all_groups, reused_roles
from tests.s3_server import S3Server, reached
from workers.engine import free_port, init_process_group

# Before anything reads a token: Ray caches the one it finds, one a process, and would otherwise read or write
# one in the home directory.
os.environ["RAY_AUTH_MODE"] = "token"
os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
os.environ.pop("RAY_AUTH_TOKEN_PATH", None)
os.environ.pop("RAY_ADDRESS", None)
os.environ.pop("RAY_API_SERVER_ADDRESS", None)
# Ray Train looks at its ranks every so often, and every training of a few seconds ends with such a wait.
os.environ["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"] = "0.1"
os.environ["RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"] = "0"  # as on the command line


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Where tests run two at a time, those that share the roles' actors, ranks, or a Serve, stay with one of
    the two; others with those of their file."""
    for item in items:
        file = item.path.relative_to(Path(__file__).parent)
        shared = file.parts[0] in ("orchestrator", "workers")
        item.add_marker(pytest.mark.xdist_group((file.parent if shared else file).as_posix()))


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """An S3 server that this process and all that it starts reach, with the bucket `bucket`."""
    server = S3Server()
    with reached(server, SELF_FORCING_CACHE=str(tmp_path_factory.mktemp("cache"))):
        server.create("bucket")
        yield server
    server.stop()


@pytest.fixture(scope="session")
def ray_cluster(s3_server: S3Server) -> Iterator[cluster.Cluster]:
    """A local Ray of 16 logical CPUs and a 1 GiB object store. Give back what you take: others use it after
    you."""
    with cluster.connect("local", num_cpus=16, object_store_bytes=1 << 30) as connected:
        yield connected


@pytest.fixture(scope="session")
def _mlflow_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("mlflow"))
    yield server
    server.kill()


@pytest.fixture
def mlflow_server(_mlflow_server: Server) -> Server:
    """A running MLflow server, whose runs and models of other tests are there too."""
    _mlflow_server.ensure()
    return _mlflow_server


@pytest.fixture
def s3_bucket(s3_server: S3Server) -> Callable[[str], str]:
    """A bucket of the S3 server: prefix → location."""
    host = s3_server.url.removeprefix("http://")
    query = f"endpoint_override={host}&scheme=http&region=us-east-1"
    return lambda prefix: f"s3://key:secret@bucket/{prefix}?{query}"


@pytest.fixture(scope="session")
def groups(ray_cluster: object) -> Iterator[Groups]:
    """The roles' actors, as far as they are asked for."""
    with all_groups() as made:
        yield made


@pytest.fixture
def reused_actors(groups: Groups, monkeypatch: pytest.MonkeyPatch) -> None:
    """`distill` in this process finds its actors started. For tests that look at other things than their
    start."""
    monkeypatch.setattr(
        distill, "placed_roles", lambda config, grows, reference: reused_roles(groups, config, reference)
    )


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
