"""What replicas share: tickets, and what each of them counts. An actor of its own, so that any replica can answer."""

import time
from typing import Any

from ray import serve

from orchestrator.serving.access import Tickets
from orchestrator.serving.metrics import exposition

SILENT_S = 30.0
"""Seconds after which a replica that reports no more is left out."""


@serve.deployment(ray_actor_options={"num_cpus": 0})
class Desk:
    """One for all replicas."""

    def __init__(self) -> None:
        self.tickets = Tickets()
        self.reports: dict[str, tuple[float, list[Any]]] = {}

    def issue(self, who: str) -> str:
        return self.tickets.issue(who)

    def redeem(self, ticket: str) -> str | None:
        return self.tickets.redeem(ticket)

    def report(self, replica: str, metrics: list[Any]) -> None:
        now = time.monotonic()
        self.reports[replica] = (now, metrics)
        self.reports = {name: told for name, told in self.reports.items() if now - told[0] < SILENT_S}

    def metrics(self) -> bytes:
        """For Prometheus."""
        return exposition({name: metrics for name, (_, metrics) in self.reports.items()})
