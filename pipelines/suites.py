"""The suites by name, and what a stored evaluation says of its own."""

from collections.abc import Mapping
from dataclasses import asdict
from importlib import import_module
from typing import Any

from pipelines.suite import Compared, Suite
from pipelines.tenants import brought

SUITES = {"video": "pipelines.video_suite", **brought("SUITES")}
"""Name → module with a `SUITE`."""
_UNNAMED = next(iter(brought("SUITES")))
"""What measured where no suite is named: there was no other one when such files were written."""


def find(name: str) -> Suite:
    """ValueError for a suite that is none."""
    if name not in SUITES:
        raise ValueError(f"evaluate.suite is {name!r}; use one of {', '.join(SUITES)}.")
    return import_module(SUITES[name]).SUITE


def described(name: str, suite: Suite, basis: Mapping[str, str]) -> dict[str, Any]:
    """What is stored of a suite beside its numbers."""
    compared = {key: asdict(each) for key, each in suite.compared.items()}
    return {"name": name, "version": suite.version, "basis": dict(basis), "compared": compared}


def unnamed() -> dict[str, Any]:
    """The same, for numbers that were stored before suites had names."""
    return described(_UNNAMED, find(_UNNAMED), {})


def compared(stored: Mapping[str, Any]) -> dict[str, Compared]:
    """What a stored suite says that a promotion compares; KeyError or TypeError if nothing."""
    stated = stored["compared"].items()
    return {name: Compared(int(each["sign"]), float(each["margin"])) for name, each in stated}
