"""`self-forcing promote`: moves an alias to another version of a registered model, or back.

The version has to pass the gate: of what `evaluate` measured of the version that the alias names now, and the
suite of that evaluation compares, nothing may have become worse by more than a margin. Servers that follow
the alias load what it names next.
"""

import json
import math
from collections.abc import Mapping
from typing import Any

from infra.registry import Reference, Registry, Version
from infra.tracking import tracking_uri
from pipelines import suites
from pipelines.console import say
from pipelines.suite import Compared

Params = Mapping[str, str]


class Refused(RuntimeError):
    """A version did not pass the gate."""


def gate(
    new: Mapping[str, float],
    now: Mapping[str, float],
    *,
    compared: Mapping[str, Compared],
    margin: float | None,
    names: tuple[str, str],
) -> None:
    """The gate; Refused, naming the first metric that fails it.

    `new` are metrics of the version that is to be promoted and `now` of the one that the alias names; what
    was not measured of the latter is not compared. `compared` says which way each is better and by how much
    it may be worse, for which `margin` stands instead where it is given. `names` are the versions'.
    """
    for name, how in compared.items():
        if name not in now:
            continue
        if name not in new:
            raise Refused(f"{name} of {names[0]} was not measured, and is {now[name]:.4g} of {names[1]}.")
        allowed = how.margin if margin is None else margin
        # Rounding must not refuse what is worse by the margin itself.
        if how.sign * (now[name] - new[name]) > allowed + 1e-9:
            worse = f"worse than {now[name]:.4g} of {names[1]} by more than {allowed:g}"
            raise Refused(f"{name} of {names[0]} is {new[name]:.4g}, {worse}.")


def compared_by(new: Params, now: Params, names: tuple[str, str]) -> dict[str, Compared]:
    """What the gate compares, from the recorded params of two measured versions.

    Refused, saying how to go on, where their numbers do not mean the same.
    """
    first, second = (
        json.loads(params["evaluation.suite"]) if "evaluation.suite" in params else suites.unnamed()
        for params in (new, now)
    )
    pairs = {"evaluate.suite": (first["name"], second["name"])}
    pairs["version of the suite"] = (first["version"], second["version"])
    for key in sorted(first["basis"].keys() & second["basis"].keys()):
        pairs[f"{key} of the suite"] = (first["basis"][key], second["basis"][key])
    for what, (here, there) in pairs.items():
        if here != there:
            raise Refused(
                f"there is nothing to compare: {names[0]} was measured with {what} {here} and {names[1]} "
                f"with {there}; evaluate both alike and register them with --metrics, or promote with "
                "--ungated."
            )
    return suites.compared(second)


def promote(
    registry: Registry, version: Version, alias: str, *, margin: float | None = None, gated: bool = True
) -> None:
    """Have `alias` name `version`, if it passes the gate; where it names none yet there is no gate.

    Refused where it does not pass; ValueError for a margin or an alias that cannot be.
    """
    if margin is not None and not 0 <= margin < math.inf:
        raise ValueError(f"margin is {margin:g}; it must be at least 0 and finite.")
    Reference(version.name, alias=alias)
    before = registry.named(version.name, alias)
    if before == version:
        say(f"promote: {alias} names {version} already")
        return
    if before is not None and gated:
        _compare(registry, version, before, margin)
    registry.promote(version, alias, before=before)
    say(f"promote: {alias} names {version}" + (f" instead of {before}" if before else ""))


def _compare(registry: Registry, version: Version, before: Version, margin: float | None) -> None:
    (new, how), (now, how_now) = registry.recorded(version), registry.recorded(before)
    names = (str(version), str(before))
    if not new:
        what = f"{version} was registered without metrics, and {before} serves"
        raise Refused(f"{what}; register it with --metrics, or promote with --ungated.")
    if not now:
        say(
            f"promote: there is nothing to compare {version} with: {before} was registered without metrics; "
            "the next promotion is compared with what is promoted now"
        )
        return
    compared = compared_by(how, how_now, names)
    gate(new, now, compared=compared, margin=margin, names=names)
    for name in sorted(how.keys() & how_now.keys() - {"evaluation.suite"}):
        if name.startswith("evaluation.") and how[name] != how_now[name]:
            what = f"promote: the two were measured with {name} {how_now[name]} and {how[name]}"
            say(f"{what}; evaluate both alike to compare like with like")
    if not compared.keys() & now.keys():
        say(f"promote: there is nothing to compare: no metric that decides is defined for {before}")
    for name in compared:
        if name in now:
            say(f"promote: {name} {now[name]:.4g} -> {new[name]:.4g}")


def command(_: None, options: Any) -> None:
    """Move an alias or roll it back; ValueError for what cannot be, Refused by the gate."""
    registry = Registry(tracking_uri(options.tracking.uri, options.root))
    if options.rollback == (options.version is not None):
        raise ValueError("promote needs the number of a version, or --rollback, and not both.")
    if options.rollback:
        left, restored = registry.roll_back(options.name, options.alias)
        say(f"promote: {options.alias} names {restored} again instead of {left}")
    else:
        version = registry.resolve(f"models:/{options.name}/{options.version}")
        promote(registry, version, options.alias, margin=options.margin, gated=not options.ungated)
