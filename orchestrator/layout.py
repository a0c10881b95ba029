"""The same batch on fewer ranks."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from orchestrator.config import RunConfig


def fitted(config: RunConfig, most: Mapping[str, int]) -> RunConfig | None:
    """The config on at most so many ranks of each role, and on as many of them as there can be.

    The batch and its exit groups stay, by more accumulation, and no rank has more videos at once than before.
    None where a role would have fewer ranks than its `min_ranks`.
    """
    distill, roles = config.distill, config.distill.roles
    if all(getattr(roles, name).ranks <= ranks for name, ranks in most.items()):
        return config
    found = []
    for parts in range(roles.student.engine.accumulation, distill.batch + 1):
        if distill.batch % parts or parts % distill.exit_groups:
            continue
        ranks = {
            name: _ranks(config, getattr(roles, name), distill.batch // parts, most[name]) for name in most
        }
        own = _accumulation(config, ranks["critic"]) if all(ranks.values()) else None
        if own is not None:
            found.append((sum(ranks.values()), -parts, ranks, own))
    if not found:
        return None
    _, parts, ranks, own = max(found, key=lambda each: each[:2])
    changed: dict[str, Any] = {name: replace(getattr(roles, name), ranks=ranks[name]) for name in most}
    for name, accumulation in (("student", -parts), ("critic", own)):
        engine = replace(changed[name].engine, accumulation=accumulation)
        changed[name] = replace(changed[name], engine=engine)
    return replace(config, distill=replace(distill, roles=replace(roles, **changed)))


def _ranks(config: RunConfig, role: Any, size: int, most: int) -> int:
    """The most ranks of a role that share micro-batches of `size` evenly; 0 where there are none."""
    limit = config.distill.batch // config.distill.roles.student.engine.accumulation // role.groups
    together = role.ranks // role.groups  # ranks that share their videos
    choices = range(min(most, role.ranks) // together, ((role.min_ranks or role.ranks) - 1) // together, -1)
    groups = next((groups for groups in choices if size % groups == 0 and size // groups <= limit), 0)
    return groups * together


def _accumulation(config: RunConfig, ranks: int) -> int | None:
    """The fewest micro-batches in which so many ranks of the critic learn from a batch."""
    role, batch = config.distill.roles.critic, config.distill.batch
    choices, groups = range(role.engine.accumulation, batch + 1), ranks // role.sequence
    least = role.groups * role.engine.accumulation
    return next((each for each in choices if batch % (groups * each) == 0 and groups * each >= least), None)
