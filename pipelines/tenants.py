"""Examples that ship with the package, each with data, suites and commands of its own.

A tenant is a package that declares what it brings, by name: `SUITES` and `SOURCES` (modules), and `COMMANDS`.
It is found by name only, so nothing else here depends on one.
"""

from importlib import import_module
from typing import Any

TENANTS = ("pipelines.digits",)


def brought(what: str) -> dict[str, Any]:
    """All that tenants declare as `what`."""
    return {name: each for tenant in TENANTS for name, each in vars(import_module(tenant))[what].items()}
