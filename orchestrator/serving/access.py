"""Who may connect, and how much each may ask for."""

import hmac
import os
import secrets
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from urllib.parse import urlsplit

from starlette.requests import HTTPConnection

from orchestrator.serving.config import AccessConfig
from orchestrator.serving.problems import Problem

TICKET_S = 30.0
"""Seconds that a ticket is good for."""
LOOPBACK = ("127.0.0.1", "::1", "localhost")


def read_tokens(config: AccessConfig) -> tuple[str, ...]:
    """Tokens from the file or the environment; ValueError for a file that is missing or empty, for tokens too
    short to be safe, and for none where HAProxy stands before the replicas: everybody seems to come from this
    machine then."""
    if config.tokens is None:
        tokens = os.environ.get("SELF_FORCING_TOKENS", "").split(",")
    else:
        try:
            tokens = Path(config.tokens).read_text().splitlines()
        except OSError as error:
            raise ValueError(f"access.tokens: {config.tokens} cannot be read ({error.strerror}).") from None
    found = tuple(token.strip() for token in tokens if token.strip())
    if config.tokens is not None and not found:
        raise ValueError(f"access.tokens: {config.tokens} holds no token; write one a line.")
    if any(len(token) < 16 for token in found):
        raise ValueError("a token has fewer than 16 characters; use for example `openssl rand -hex 32`.")
    if not found and os.environ.get("RAY_SERVE_ENABLE_HA_PROXY") == "1":
        raise ValueError(
            "with RAY_SERVE_ENABLE_HA_PROXY=1 tokens are needed: name a file at access.tokens or set "
            "SELF_FORCING_TOKENS."
        )
    return found


class Tickets:
    """Tickets that stand for a token once: browsers cannot send a token with a WebSocket or an <img>."""

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock = clock
        self._open: dict[str, tuple[str, float]] = {}

    def issue(self, who: str) -> str:
        now = self._clock()
        self._open = {ticket: held for ticket, held in self._open.items() if held[1] > now}
        ticket = secrets.token_urlsafe(24)
        self._open[ticket] = (who, now + TICKET_S)
        return ticket

    def redeem(self, ticket: str) -> str | None:
        """Who it was issued to; none where it is unknown, used or too old."""
        who, until = self._open.pop(ticket, (None, 0.0))
        return who if until > self._clock() else None


class Access:
    """Admission to a replica."""

    def __init__(
        self,
        config: AccessConfig,
        redeem: Callable[[str], Awaitable[str | None]],
        clock: Callable[[], float] = time.monotonic,
    ):
        """`redeem` says whom a ticket stands for."""
        self.config = config
        self._tokens = read_tokens(config)
        self._redeem = redeem
        self._clock = clock
        self._streams: dict[str, int] = defaultdict(int)
        self._requests: dict[str, tuple[float, float]] = {}

    async def admit(self, connection: HTTPConnection) -> str:
        """A name for who is asking, counted as a request; Problem (401, 403 or 429) where there is none."""
        self._check_origin(connection)
        who = await self._identify(connection)
        self._count(who)
        return who

    def _check_origin(self, connection: HTTPConnection) -> None:
        """Another site's page must not use what its visitor may use."""
        origin = connection.headers.get("origin")
        if origin is None or origin in self.config.origins:
            return
        if urlsplit(origin).netloc != connection.headers.get("host"):
            raise Problem(403, "origin", f"pages of {origin} may not connect; see access.origins.")

    async def _identify(self, connection: HTTPConnection) -> str:
        scheme, _, given = connection.headers.get("authorization", "").partition(" ")
        # Where there are no tokens, clients that cannot do without one send any.
        if scheme.lower() == "bearer" and self._tokens:
            # Every token is compared, so that the time says nothing.
            matches = [hmac.compare_digest(given.encode(), token.encode()) for token in self._tokens]
            if any(matches):
                return sha256(given.encode()).hexdigest()[:12]
        elif ticket := connection.query_params.get("ticket"):
            if (who := await self._redeem(ticket)) is not None:
                return who
        elif not self._tokens:
            return self._local(connection)
        raise Problem(
            401,
            "invalid_token",
            "a valid token is needed: send it as `Authorization: Bearer TOKEN`.",
            WWW_Authenticate="Bearer",
        )

    @staticmethod
    def _local(connection: HTTPConnection) -> str:
        """Without tokens, whoever came by a loopback address, and under a loopback name: a page that has its
        own name resolve to this machine is a stranger."""
        address = (connection.scope.get("server") or ("", 0))[0]
        host = urlsplit(f"//{connection.headers.get('host', '')}").hostname
        if address not in LOOPBACK or host not in LOOPBACK:
            raise Problem(
                401,
                "no_tokens",
                "this server has no tokens, so it answers its own machine only; see access.tokens.",
            )
        return "local"

    def _count(self, who: str) -> None:
        """A bucket that fills at the allowed rate and holds a tenth of a minute's requests."""
        rate, now = self.config.requests_per_minute / 60, self._clock()
        most = max(1.0, rate * 6)
        left, then = self._requests.get(who, (most, now))
        left = min(most, left + rate * (now - then))
        if left < 1:
            wait = str(int((1 - left) / rate) + 1)
            raise Problem(429, "rate_limit_exceeded", "too many requests; slow down.", Retry_After=wait)
        self._requests[who] = (left - 1, now)

    @property
    def open_streams(self) -> int:
        return sum(self._streams.values())

    @contextmanager
    def stream(self, who: str) -> Iterator[None]:
        """Count a stream for as long as it is open; Problem (429) where there are too many."""
        if self._streams[who] >= self.config.streams:
            raise Problem(
                429,
                "too_many_streams",
                f"this token has {self.config.streams} streams open, which is as many as it may have.",
                Retry_After="5",
            )
        self._streams[who] += 1
        try:
            yield
        finally:
            self._streams[who] -= 1
            if not self._streams[who]:
                del self._streams[who]


def check_exposure(config: AccessConfig, host: str) -> None:
    """ValueError where tokens cannot be read, or where a server that other machines reach would have none."""
    if not read_tokens(config) and host not in LOOPBACK:
        raise ValueError(
            f"host {host} can be reached by others, and there are no tokens; set access.tokens or "
            "SELF_FORCING_TOKENS, or listen on 127.0.0.1."
        )
