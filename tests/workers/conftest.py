"""What the tests of this folder share."""

from collections.abc import Iterator

import pytest
import ray

from tests.workers.ranks import Rank


@pytest.fixture(scope="session")
def ranks(ray_cluster: object) -> Iterator[dict[int, list]]:
    """Groups of one and of two ranks."""
    made = {size: [Rank.remote() for _ in range(size)] for size in (1, 2)}
    for size, ranks in made.items():
        port = ray.get(ranks[0].port.remote())
        ray.get([actor.join.remote(rank, size, port) for rank, actor in enumerate(ranks)], timeout=120)
    yield made
    for ranks in made.values():
        for actor in ranks:
            ray.kill(actor)
