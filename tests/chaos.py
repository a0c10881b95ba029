"""Faults at chosen moments of a run in this process: what is done to a rank while it is at a call."""

import os
import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import ray
import torch

from infra.storage import StorageError
from orchestrator.coordinator import Coordinator
from orchestrator.worker_group import WorkerGroup


@dataclass(frozen=True)
class Moment:
    """The first time from an iteration on that a role is asked for a call."""

    role: str
    call: str
    iteration: int = 0
    nth: int = 1
    """Or the time after that."""


Action = Callable[[WorkerGroup], None]


def send(what: signal.Signals, rank: int = 0) -> Action:
    """An action: the signal to the process of a rank."""
    return lambda group: os.kill(pid(group, rank), what)


def spoil(what: str, rank: int = 0) -> Action:
    """An action: the next call of a rank fails, as one does that is out of `memory`, or whose data cannot be
    read for `storage`."""

    def act(group: WorkerGroup) -> None:
        actor: Any = group.actors[rank]
        ray.get(actor.__ray_call__.remote(_fail_next, what))

    return act


def _fail_next(worker: Any, what: str) -> None:
    errors = {
        "memory": torch.OutOfMemoryError("out of memory, as the test wants it"),
        "storage": StorageError("the store does not answer, as the test wants it"),
    }

    def fail(*_: Any) -> Any:
        del worker._whole
        raise errors[what]

    worker._whole = fail


_pids: dict[Any, int] = {}


def pid(group: WorkerGroup, rank: int) -> int:
    """The process of a rank, which is asked once, and answers when it is at no other call."""
    actor = group.actors[rank]
    if actor not in _pids:
        _pids[actor] = ray.get(actor.__ray_call__.remote(lambda _: os.getpid()))
    return _pids[actor]


BEFORE = "before"
"""Attribute of an action that is to be taken before the call is asked for."""


def before(action: Action) -> Action:
    setattr(action, BEFORE, True)
    return action


@contextmanager
def injected(
    actions: Mapping[Moment, Action], done: Callable[[Moment, int], None] = lambda moment, iteration: None
) -> Iterator[dict[Moment, Action]]:
    """Inside the block, each action is taken once, at its moment, and `done` told of it; yields those that
    are still to come."""
    waiting, times = dict(actions), dict.fromkeys(actions, 0)
    scatter, broadcast = WorkerGroup.scatter, WorkerGroup.broadcast
    update_student, update_critic = Coordinator.update_student, Coordinator.update_critic
    now = 0

    def due(group: WorkerGroup, call: str) -> Moment | None:
        own = [each for each in waiting if (each.role, each.call) == (group.role, call)]
        for moment in own:
            times[moment] += moment.iteration <= now
        return next((each for each in own if times[each] >= each.nth), None)

    def then(group: WorkerGroup, call: str, ask: Callable[[], Any]) -> Any:
        if (moment := due(group, call)) is None:
            return ask()
        action, at = waiting.pop(moment), now
        for rank in range(len(group.actors)):
            pid(group, rank)
        if hasattr(action, BEFORE):
            done(moment, at)
            action(group)
            return ask()
        answer = ask()
        done(moment, at)
        action(group)
        return answer

    def scattered(group: WorkerGroup, verb: str, *rest: Any, **more: Any) -> Any:
        return then(group, verb, lambda: scatter(group, verb, *rest, **more))

    def broadcasted(group: WorkerGroup, method: str, *rest: Any) -> Any:
        return then(group, method, lambda: broadcast(group, method, *rest))

    def student(coordinator: Coordinator, iteration: int, timer: Any) -> None:
        nonlocal now
        now = iteration
        update_student(coordinator, iteration, timer)

    def critic(coordinator: Coordinator, iteration: int, timer: Any) -> None:
        nonlocal now
        now = iteration
        update_critic(coordinator, iteration, timer)

    with (
        mock.patch.object(WorkerGroup, "scatter", scattered),
        mock.patch.object(WorkerGroup, "broadcast", broadcasted),
        mock.patch.object(Coordinator, "update_student", student),
        mock.patch.object(Coordinator, "update_critic", critic),
    ):
        yield waiting
