"""What every test shares: one local Ray, with token authentication, and one MLflow server for the whole session."""

import os
import secrets
from collections.abc import Iterator

import pytest

from orchestrator import cluster
from tests.mlflow_server import Server

# Before anything reads a token: Ray caches the one it finds, one a process, and would otherwise read or write one in
# the home directory.
os.environ["RAY_AUTH_MODE"] = "token"
os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
os.environ.pop("RAY_AUTH_TOKEN_PATH", None)
os.environ.pop("RAY_ADDRESS", None)
os.environ.pop("RAY_API_SERVER_ADDRESS", None)


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[cluster.Cluster]:
    """A local Ray of 16 logical CPUs and a 1 GiB object store. Give back what you take: others use it after you."""
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
