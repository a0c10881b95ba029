"""`self-forcing promote`: moves an alias to another version of a registered model, or back.

The version has to pass the gate: of what `evaluate` measured of the version that the alias names now, nothing may have
become worse by more than a margin. Servers that follow the alias load what it names next.
"""

import math
from collections.abc import Mapping, Sequence

from infra.registry import Reference, Registry, Version
from pipelines import cli
from pipelines.console import say

COMPARED = {
    "digit_accuracy_inside": 1,
    "digit_accuracy_beyond": 1,
    "motion_following_overall": 1,
    "kernel_distance_overall": -1,
}
"""What the gate compares: `METRIC_SPAN` as `pipelines/report.py` has them, and 1 where more is better, −1 where less is.

Diversity is not among them, for neither more nor less of it is better; a model that makes few different videos has a
larger kernel distance."""
MARGIN = 0.02
"""By how much a metric may be worse, in its own unit."""


class Refused(RuntimeError):
    """A version did not pass the gate."""


def gate(
    new: Mapping[str, float], now: Mapping[str, float], *, margin: float, names: tuple[str, str]
) -> None:
    """The gate; Refused, naming the first metric that fails it.

    Args:
        new: metrics of the version that is to be promoted.
        now: metrics of the version that the alias names; what was not measured of it is not compared.
        margin: by how much each may be worse.
        names: what the two versions are called.
    """
    if not any(name in new for name in COMPARED):
        raise Refused(
            f"{names[0]} was registered without metrics, and {names[1]} serves; register it with --metrics."
        )
    for name, sign in COMPARED.items():
        if name not in now:
            continue
        if name not in new:
            raise Refused(f"{name} of {names[0]} was not measured, and is {now[name]:.4g} of {names[1]}.")
        # Rounding must not refuse what is worse by the margin itself.
        if sign * (now[name] - new[name]) > margin + 1e-9:
            raise Refused(
                f"{name} of {names[0]} is {new[name]:.4g}, worse than {now[name]:.4g} of {names[1]} by more than {margin:g}."
            )


def promote(registry: Registry, version: Version, alias: str, *, margin: float = MARGIN) -> None:
    """Have `alias` name `version`, if it passes the gate; where it names none yet there is no gate.

    Refused where it does not pass; ValueError for a margin or an alias that cannot be.
    """
    if not 0 <= margin < math.inf:
        raise ValueError(f"margin is {margin:g}; it must be at least 0 and finite.")
    Reference(version.name, alias=alias)
    before = registry.named(version.name, alias)
    if before == version:
        say(f"promote: {alias} names {version} already")
        return
    if before is not None:
        (new, how), (now, how_now) = registry.recorded(version), registry.recorded(before)
        gate(new, now, margin=margin, names=(str(version), str(before)))
        for name in sorted(how.keys() & how_now.keys()):
            if name.startswith("evaluation.") and how[name] != how_now[name]:
                say(f"promote: the two were measured with {name} {how_now[name]} and {how[name]}")
        for name in COMPARED:
            if name in now:
                say(f"promote: {name} {now[name]:.4g} -> {new[name]:.4g}")
    registry.promote(version, alias, before=before)
    say(f"promote: {alias} names {version}" + (f" instead of {before}" if before else ""))


def main(arguments: Sequence[str]) -> int:
    """Move an alias or roll it back; ValueError for what cannot be, Refused for a version that does not pass the gate."""
    parser = cli.registry_parser("promote")
    parser.add_argument("name", type=str, help="registered model")
    parser.add_argument("version", type=int, nargs="?", help="version to promote")
    parser.add_argument("--alias", type=str, default="serving", help="alias to move")
    parser.add_argument("--margin", type=float, default=MARGIN, help="by how much each metric may be worse")
    parser.add_argument(
        "--rollback", action="store_true", help="return to the version before the last promotion"
    )
    uri, options = cli.parse_registry(parser, arguments)
    registry = Registry(uri)
    if options.rollback == (options.version is not None):
        raise ValueError("promote needs the number of a version, or --rollback, and not both.")
    if options.rollback:
        left, restored = registry.roll_back(options.name, options.alias)
        say(f"promote: {options.alias} names {restored} again instead of {left}")
    else:
        version = registry.resolve(f"models:/{options.name}/{options.version}")
        promote(registry, version, options.alias, margin=options.margin)
    return 0
