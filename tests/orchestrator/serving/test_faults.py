"""A replica that dies, and one that is asked to stop, while viewers watch."""

import threading
from collections.abc import Callable
from dataclasses import replace

import httpx
import pytest
import ray
from ray import serve
from websockets.exceptions import ConnectionClosed

from orchestrator.serving.client import Client, ReceivedChunk
from orchestrator.serving.messages import VideoStart
from tests.orchestrator.serving.conftest import CONFIG, eventually

pytestmark = pytest.mark.slow
SIX = "a six drifting left"


def replicas(application: str) -> list[str]:
    """Names of the actors that stream."""
    actors = ray.util.list_named_actors(all_namespaces=True)
    return [
        actor["name"] for actor in actors if actor["name"].startswith(f"SERVE_REPLICA::{application}#Stream")
    ]


def test_a_viewer_of_a_killed_replica_goes_on_from_its_seed(deploy: Callable) -> None:
    with deploy("killed") as url:
        client = Client(url)
        with client.stream(SIX, seed=5, frames=40) as frames:
            whole = list(frames)
        with client.session() as session, client.stream(SIX, seed=5) as frames:
            session.start(SIX, seed=5, format="jpeg")
            session.wait_for(VideoStart)
            seen = [next(frames) for _ in range(5)]
            (name,) = replicas("killed")
            ray.kill(ray.get_actor(name, namespace="serve"))
            # Both are told that it is over; nobody waits for ever.
            with pytest.raises(httpx.RemoteProtocolError):
                seen += list(frames)
            with pytest.raises(ConnectionClosed):
                while True:
                    session.wait_for(ReceivedChunk)
        eventually(
            lambda: (
                httpx.get(f"{url}/healthz", timeout=60).status_code == 200 and replicas("killed") != [name]
            )
        )
        with client.stream(SIX, seed=5, first_frame=len(seen), frames=40) as frames:
            assert seen + list(frames) == whole[: max(len(seen), 40)]


@pytest.mark.by_hand
def test_a_viewer_comes_back_to_the_replica_that_holds_the_stream(deploy: Callable) -> None:
    with deploy("two", replace(CONFIG, replicas=2)) as url:
        client = Client(url)
        with client.session() as session:
            session.start(SIX, format="jpeg")
            request_id = session.wait_for(VideoStart).request_id
            numbers = [session.wait_for(ReceivedChunk).about.generation_chunk_index]
        # A connection may lead to either replica.
        for _ in range(6):
            with client.reconnected(request_id, len(numbers)) as again:
                numbers += [again.wait_for(ReceivedChunk).about.generation_chunk_index for _ in range(2)]
        assert numbers == list(range(13))


def test_a_replica_that_is_asked_to_stop_lets_its_streams_end(deploy: Callable) -> None:
    with deploy("drained", replace(CONFIG, drain_s=60)) as url, Client(url).stream(SIX, frames=200) as frames:
        seen = [next(frames)]
        stopping = threading.Thread(target=serve.delete, args=("drained",))
        stopping.start()
        seen += list(frames)
        stopping.join()
    assert len(seen) == 200
