"""Roles → placement groups: who shares devices with whom, and where the actors of each rank go."""

from collections.abc import Mapping, Sequence
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, placement_group_table
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from orchestrator.cluster import reserve
from orchestrator.stages import PlacementConfig, RanksConfig

Options = dict[str, Any]


def place(
    roles: Mapping[str, RanksConfig], config: PlacementConfig, *, grows: bool
) -> tuple[PlacementGroup, dict[str, list[Options]]]:
    """Reserve room for all ranks of all roles, and say with which Ray options each actor is to be created.

    Colocated, rank i of every role shares one bundle, and its devices; disaggregated, a role has bundles of
    its own, spread over nodes. `grows` is whether more nodes may come; if not, there is nothing to wait for.
    ValueError says which resource is missing.
    """
    together = config.mode == "colocated"
    bundles, places = (_colocated if together else _disaggregated)(roles)
    said = [f"{role.ranks} {name} rank{'s' if role.ranks > 1 else ''}" for name, role in roles.items()]
    timeout_s = config.timeout_s if grows else min(config.timeout_s, 5.0)
    strategy = "PACK" if together else "SPREAD"
    group = reserve(bundles, purpose=", ".join(said), strategy=strategy, timeout_s=timeout_s)
    options: dict[str, list[Options]] = {name: [] for name in places}
    for name, ranks in places.items():
        for bundle, gpus in ranks:
            where = PlacementGroupSchedulingStrategy(group, bundle)
            resources = {"num_cpus": roles[name].cpus, "num_gpus": gpus}
            options[name].append({**resources, "scheduling_strategy": where})
    return group, options


def there(options: Sequence[Options]) -> list[Options]:
    """Those of the ranks' options whose place is on a node that lives."""
    found: list[Options] = []
    tables: dict[PlacementGroup, Mapping[int, str]] = {}
    alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
    for option in options:
        where = option.get("scheduling_strategy")
        if where is None:  # anywhere
            found.append(option)
            continue
        group = where.placement_group
        if group not in tables:
            tables[group] = placement_group_table(group)["bundles_to_node_id"]
        if tables[group].get(where.placement_group_bundle_index) in alive:
            found.append(option)
    return found


Places = dict[str, list[tuple[int, float]]]
"""For each role's ranks: the bundle, and the share of its GPUs."""


def _colocated(roles: Mapping[str, RanksConfig]) -> tuple[list[dict[str, float]], Places]:
    bundles: list[dict[str, float]] = []
    places: Places = {name: [] for name in roles}
    for rank in range(max(role.ranks for role in roles.values())):
        here = {name: role for name, role in roles.items() if rank < role.ranks}
        gpus, asked = max(role.gpus for role in here.values()), sum(role.gpus for role in here.values())
        bundles.append(_bundle(sum(role.cpus for role in here.values()), gpus))
        for name, role in here.items():
            # Roles on one device take turns; Ray is told a share each, so that all of them fit.
            places[name].append((rank, round(role.gpus * gpus / asked, 4) if asked else 0.0))
    return bundles, places


def _disaggregated(roles: Mapping[str, RanksConfig]) -> tuple[list[dict[str, float]], Places]:
    bundles: list[dict[str, float]] = []
    places: Places = {name: [] for name in roles}
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    for name, role in roles.items():
        whole = _bundle(role.cpus * role.ranks, role.gpus * role.ranks)
        fits = any(all(node.get(each, 0) >= amount for each, amount in whole.items()) for node in nodes)
        # A role stays on one node where it fits on one, for its ranks talk to each other most; unless some of
        # them are to outlive the loss of a node.
        if fits and getattr(role, "min_ranks", None) is None:
            bundles.append(whole)
            places[name] = [(len(bundles) - 1, role.gpus)] * role.ranks
            continue
        for _ in range(role.ranks):
            bundles.append(_bundle(role.cpus, role.gpus))
            places[name].append((len(bundles) - 1, role.gpus))
    return bundles, places


def _bundle(cpus: float, gpus: float) -> dict[str, float]:
    return {"CPU": cpus, **({"GPU": gpus} if gpus else {})}
