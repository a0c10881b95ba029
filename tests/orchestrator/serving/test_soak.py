"""Two hundred viewers who come and go as they like, and what they leave behind: nothing."""

import random
import socket
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from urllib.parse import urlsplit

import pytest
from ray import serve
from websockets.exceptions import ConnectionClosed

from orchestrator.serving.client import Client, ReceivedChunk, ServerError
from orchestrator.serving.messages import VideoStart
from tests.orchestrator.serving.conftest import eventually

pytestmark = [pytest.mark.slow, pytest.mark.by_hand]
SIX = "a six drifting left"
VIEWERS = 200


def watches_to_the_end(client: Client, chance: random.Random) -> None:
    length = chance.randrange(1, 9)
    with client.stream(SIX, seed=chance.randrange(100), frames=length) as frames:
        assert len(list(frames)) == length


def leaves_in_the_middle(client: Client, chance: random.Random) -> None:
    with client.stream(SIX) as frames:
        for _ in range(chance.randrange(4)):
            next(frames)


def asks_and_hangs_up(client: Client, _: random.Random) -> None:
    where = urlsplit(client.url)
    with socket.create_connection((where.hostname, where.port)) as connection:
        connection.sendall(
            f"GET {where.path}/v1/streams?prompt=a%20two HTTP/1.1\r\nHost: {where.netloc}\r\n\r\n".encode()
        )


def plays_and_stops(client: Client, chance: random.Random) -> None:
    with client.session() as session:
        session.start(SIX, seed=chance.randrange(100))
        session.wait_for(ReceivedChunk)
        session.change_prompt("a two drifting up")
        session.control("stop")


def pauses_and_vanishes(client: Client, chance: random.Random) -> None:
    with client.session() as session:
        session.start(SIX, format="jpeg")
        session.wait_for(VideoStart)
        if chance.random() < 0.5:
            session.control("pause")
        session.socket.socket.shutdown(socket.SHUT_RDWR)


def gives_up_waiting(client: Client, _: random.Random) -> None:
    with client.session() as session:
        session.start(SIX)
        session.receive()


HABITS = (
    watches_to_the_end,
    leaves_in_the_middle,
    asks_and_hangs_up,
    plays_and_stops,
    pauses_and_vanishes,
    gives_up_waiting,
)


def test_viewers_who_come_and_go_leave_nothing_behind(client: Client) -> None:
    replica = serve.get_deployment_handle("StreamServer", "shared")

    def census() -> dict[str, int]:
        return replica.census.remote().result(timeout_s=60)

    before = census()

    def visit(number: int) -> str:
        chance = random.Random(number)
        try:
            with suppress(ConnectionClosed):
                chance.choice(HABITS)(client, chance)
        except ServerError as error:
            assert error.code == "no_slot"
            return "refused"
        return "served"

    with ThreadPoolExecutor(8) as crowd:
        outcomes = list(crowd.map(visit, range(VIEWERS)))
    assert outcomes.count("served") > VIEWERS // 4
    eventually(lambda: census() == before)
    with client.stream(SIX, frames=4) as frames:
        assert len(list(frames)) == 4
