"""What every test shares: one local Ray for the whole session, with token authentication."""

import os
import secrets
from collections.abc import Iterator

import pytest

from orchestrator import cluster

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
