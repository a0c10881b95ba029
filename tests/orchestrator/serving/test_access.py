"""Who may connect: tokens, tickets, origins and limits, by an injected clock."""

import asyncio
from pathlib import Path
from typing import Any

import pytest
from starlette.requests import HTTPConnection

from orchestrator.serving.access import TICKET_S, Access, Tickets, check_exposure
from orchestrator.serving.config import AccessConfig
from orchestrator.serving.problems import Problem
from tests.orchestrator.serving.conftest import Clock

TOKEN, OTHER = "0123456789abcdef-one", "0123456789abcdef-two"


def connection(server: str = "127.0.0.1", query: str = "", **headers: str) -> HTTPConnection:
    pairs = [(name.encode(), value.encode()) for name, value in {"host": "localhost:8000", **headers}.items()]
    return HTTPConnection(
        {"type": "http", "server": (server, 8000), "headers": pairs, "query_string": query.encode()}
    )


@pytest.fixture
def tickets(clock: Clock) -> Tickets:
    return Tickets(clock)


@pytest.fixture
def tokens(tmp_path: Path) -> str:
    (tmp_path / "tokens").write_text(f"{TOKEN}\n\n{OTHER}\n")
    return str(tmp_path / "tokens")


def make(config: AccessConfig, tickets: Tickets, clock: Clock) -> Access:
    async def redeem(ticket: str) -> str | None:
        return tickets.redeem(ticket)

    return Access(config, redeem, clock)


def admit(access: Access, **about: Any) -> str:
    return asyncio.run(access.admit(connection(**about)))


def refused(access: Access, **about: Any) -> int:
    with pytest.raises(Problem) as problem:
        admit(access, **about)
    return problem.value.status_code


def test_each_token_is_somebody(tokens: str, tickets: Tickets, clock: Clock) -> None:
    access = make(AccessConfig(tokens=tokens), tickets, clock)
    first, second = (admit(access, authorization=f"Bearer {token}") for token in (TOKEN, OTHER))
    assert first != second and TOKEN not in first
    assert admit(access, authorization=f"bearer {TOKEN}", server="10.0.0.1") == first
    assert [refused(access), refused(access, authorization="Bearer wrong")] == [401, 401]
    assert refused(access, authorization=f"Basic {TOKEN}") == 401


def test_a_ticket_stands_for_a_token_once_and_for_a_while(
    tokens: str, tickets: Tickets, clock: Clock
) -> None:
    access = make(AccessConfig(tokens=tokens), tickets, clock)
    who = admit(access, authorization=f"Bearer {TOKEN}")
    ticket, late = tickets.issue(who), tickets.issue(who)
    assert admit(access, query=f"ticket={ticket}") == who
    assert refused(access, query=f"ticket={ticket}") == 401
    clock.now += TICKET_S
    assert refused(access, query=f"ticket={late}") == 401


def test_without_tokens_only_this_machine_is_answered(tickets: Tickets, clock: Clock) -> None:
    access = make(AccessConfig(), tickets, clock)
    assert admit(access) == admit(access, authorization="Bearer any")
    assert admit(access) == admit(access, host="127.0.0.1") == admit(access, host="[::1]:8000", server="::1")
    assert refused(access, server="10.0.0.1") == 401
    # A page whose own name resolves to this machine.
    assert refused(access, host="evil.example:8000") == 401


def test_pages_of_other_sites_may_not_connect(tickets: Tickets, clock: Clock) -> None:
    access = make(AccessConfig(origins=("https://friend.example",)), tickets, clock)
    assert admit(access, origin="http://localhost:8000") == admit(access, origin="https://friend.example")
    assert refused(access, origin="http://evil.example") == refused(access, origin="null") == 403


def test_limits_are_a_tokens_own(tokens: str, tickets: Tickets, clock: Clock) -> None:
    access = make(AccessConfig(tokens=tokens, streams=1, requests_per_minute=60), tickets, clock)
    for _ in range(6):
        admit(access, authorization=f"Bearer {TOKEN}")
    assert refused(access, authorization=f"Bearer {TOKEN}") == 429
    admit(access, authorization=f"Bearer {OTHER}")
    clock.now += 1
    admit(access, authorization=f"Bearer {TOKEN}")
    with access.stream("one"), access.stream("two"), pytest.raises(Problem, match="1 streams open"):
        access.stream("one").__enter__()
    with access.stream("one"):
        pass


def test_a_server_that_others_reach_needs_tokens(tokens: str) -> None:
    check_exposure(AccessConfig(), "127.0.0.1")
    check_exposure(AccessConfig(tokens=tokens), "0.0.0.0")
    with pytest.raises(ValueError, match=r"there are no tokens; set access\.tokens"):
        check_exposure(AccessConfig(), "0.0.0.0")
