"""Ray itself: reach a cluster or start one here, ship our code to it, and reserve a share of its machines.

The same pipeline runs in three places, and `connect` finds out which: on this machine (no address: a Ray of
our own, stopped at the end), on a running cluster (`--address` or `RAY_ADDRESS`), and inside a Ray job.

**Tokens.** A cluster with token authentication refuses every call that lacks its token. Ray looks for the
token in `RAY_AUTH_TOKEN`, then in the file that `RAY_AUTH_TOKEN_PATH` names, then in `~/.ray/auth_token`, and
sends it only if `RAY_AUTH_MODE` is `token`, which `use_token` sets wherever a token can be found: given an
explicit address, Ray leaves the variable unset. A Ray started here always has tokens on, and writes a new one
to `~/.ray/auth_token` if there is none (into its own environment where that cannot be written). Workers and
jobs inherit the token from their node.
"""

import logging
import math
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import ray
from ray._private.authentication.authentication_token_generator import generate_new_authentication_token
from ray._private.authentication.authentication_token_setup import generate_and_save_token
from ray._private.grpc_utils import init_grpc_channel
from ray._private.services import canonicalize_bootstrap_address
from ray._private.state import state
from ray._raylet import (  # type: ignore[attr-defined]  # compiled, without stubs
    AuthenticationMode,
    AuthenticationTokenLoader,
    Config,
    get_authentication_mode,
)
from ray.exceptions import AuthenticationError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group

PACKAGES = ("orchestrator", "workers", "model", "pipelines", "infra")
CODE_ROOT = Path(__file__).resolve().parents[1]
# Beside what .gitignore and .rayignore name, and .git, .venv, venv and __pycache__, which Ray leaves out.
EXCLUDES = ["outputs", "mlruns", "mlartifacts", "*.egg-info", ".mypy_cache", ".pytest_cache", ".ruff_cache"]
TOKEN_ADVICE = (
    "set RAY_AUTH_TOKEN, or RAY_AUTH_TOKEN_PATH to a file, to what `ray get-auth-token` prints on the head "
    "node"
)
_QUIET: dict[str, Any] = {"logging_level": "error", "log_to_driver": False}


@dataclass(frozen=True)
class Cluster:
    """The Ray cluster that this process is a driver of."""

    address: str  # `host:port` of its control service (GCS): what `--address` takes
    started_here: bool  # by `connect`, so that it ends with this process and never grows


@contextmanager
def connect(
    address: str | None = None,
    *,
    num_cpus: int | None = None,
    object_store_bytes: int | None = None,
    timeout_s: float = 10.0,
) -> Iterator[Cluster]:
    """Make this process a Ray driver for the length of the `with` block.

    `address` is `host:port`, `auto` (a cluster running on this machine), `local` (start one) or `None`:
    `RAY_ADDRESS` if that is set, as it is inside a Ray job, and otherwise `local`. If this process is a
    driver already, that connection is used and left open. `num_cpus` (logical; default: the machine's) and
    `object_store_bytes` (default: Ray's, 30 % of memory, within /dev/shm) matter to a Ray started here only.

    On a running cluster, workers import the code that this process imports: the checkout becomes their
    working directory, or an installed wheel's packages are shipped. So a relative path means something else
    to a worker: make paths absolute first. Inside a job, the job's own environment stays as it is.

    Raises `ValueError` if the cluster cannot be reached within `timeout_s` seconds or refuses the token.
    """
    if ray.is_initialized():
        yield Cluster(ray.get_runtime_context().gcs_address, started_here=False)
        return
    address = address or os.environ.get("RAY_ADDRESS") or "local"
    if address == "local":
        _start(num_cpus, object_store_bytes)
    else:
        _join(address, timeout_s)
    try:
        yield Cluster(ray.get_runtime_context().gcs_address, started_here=address == "local")
    finally:
        ray.shutdown()


def _start(num_cpus: int | None, object_store_bytes: int | None) -> None:
    _set_token_mode(os.environ.get("RAY_AUTH_MODE", "token"))
    _ensure_token()
    # Inherited by the node and its workers; with a runtime environment every worker would start from cold.
    paths = [str(CODE_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(os.pathsep.join(paths).split(os.pathsep)))
    try:
        ray.init(
            address="local",
            num_cpus=num_cpus,
            object_store_memory=object_store_bytes,
            include_dashboard=False,
            **_QUIET,
        )
    except OSError as error:
        raise RuntimeError(f"Ray did not start on this machine: {error}.") from error
    except Exception as error:  # Ray raises a bare Exception where its node does not answer in time
        what = f"Ray did not start on this machine ({str(error).strip().splitlines()[0]})"
        raise RuntimeError(f"{what}; try again when it is less busy.") from error


def _join(address: str, timeout_s: float) -> None:
    if "://" in address:
        raise ValueError(
            f"address {address} is not one that a pipeline can run from: give host:port of the cluster's "
            "control service (GCS), or hand the run over with `self-forcing submit`."
        )
    use_token()
    address = probe(address, timeout_s)
    environment = None
    if "RAY_JOB_CONFIG_JSON_ENV_VAR" not in os.environ:
        checkout = (CODE_ROOT / "pyproject.toml").exists()
        environment = code_environment(CODE_ROOT if checkout else None)
    try:
        ray.init(address=address, runtime_env=environment, **_QUIET)
    except (ConnectionError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0].rstrip(".:")
        raise ValueError(
            f"this machine cannot work on the Ray cluster at {address} ({reason}): start the pipeline on "
            f"one of the cluster's nodes under Ray {ray.__version__} and Python {sys.version.split()[0]}, "
            "or hand it over with `self-forcing submit`."
        ) from error


def use_token() -> None:
    """Have this process send Ray's token if it can find one, unless `RAY_AUTH_MODE` says otherwise.

    Raises `ValueError` if `RAY_AUTH_TOKEN_PATH` names no readable file, or a token is missing.
    """
    mode = os.environ.get("RAY_AUTH_MODE")
    tokens = AuthenticationTokenLoader.instance()
    try:
        found = tokens.has_token(ignore_auth_mode=True)
    except AuthenticationError as error:
        where = f"RAY_AUTH_TOKEN_PATH is {os.environ.get('RAY_AUTH_TOKEN_PATH')}"
        raise ValueError(f"{where}, which cannot be read or is empty: {TOKEN_ADVICE}.") from error
    if mode == "token" and not found:
        raise ValueError(f"RAY_AUTH_MODE is token, but there is no token: {TOKEN_ADVICE}.")
    _set_token_mode(mode or ("token" if found else "disabled"))


def _ensure_token() -> None:
    """Make the token of a Ray started here; for its processes alone where the home cannot be written."""
    logging.getLogger(generate_and_save_token.__module__).setLevel(logging.WARNING)
    tokens = AuthenticationTokenLoader.instance()
    if os.environ["RAY_AUTH_MODE"] != "token" or tokens.has_token(ignore_auth_mode=True):
        return
    try:
        generate_and_save_token()
    except OSError:
        os.environ["RAY_AUTH_TOKEN"] = generate_new_authentication_token()
    tokens.reset_cache()


def _set_token_mode(mode: str) -> None:
    os.environ["RAY_AUTH_MODE"] = mode
    # Ray reads the variable once, when it is imported. Read again only where it must be: that also forgets
    # the settings that a connected process has from its cluster.
    if (get_authentication_mode() == AuthenticationMode.TOKEN) != (mode == "token"):
        Config.initialize("")


def refused_token(who: str) -> ValueError:
    """What to say where a server accepts no token of ours, or asks for one that we have not."""
    said = "refuses this token" if os.environ.get("RAY_AUTH_MODE") == "token" else "asks for a token"
    return ValueError(f"{who} {said}: {TOKEN_ADVICE}.")


def probe(address: str, timeout_s: float) -> str:
    """Ask the control service at `address` (`host:port` or `auto`) whether it lives; its `host:port`.

    `ray.init` would retry an unreachable address for minutes and a wrong token for 20 s, both noisily. Raises
    `ValueError` for no answer within `timeout_s` seconds, another answer than Ray's, or a refused token.
    """
    unfound: Exception | None = None
    found = None
    try:
        found = canonicalize_bootstrap_address(address)
    except (ConnectionError, ValueError) as error:
        unfound = error
    if found is None:
        advice = "give host:port of the cluster's control service (GCS, port 6379 by default)"
        raise ValueError(f"no Ray cluster found by address {address}: {advice}.") from unfound
    with init_grpc_channel(found) as channel:
        alive = channel.unary_unary("/ray.rpc.NodeInfoGcsService/CheckAlive")
        try:
            alive(b"", timeout=timeout_s)
        except grpc.RpcError as error:
            if error.code() is grpc.StatusCode.UNAUTHENTICATED:
                raise refused_token(f"the Ray cluster at {found}") from error
            late = error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
            met = "no answer" if late else "nothing there speaks Ray"
            raise ValueError(
                f"cannot reach a Ray cluster at {found} within {timeout_s:g} s ({met}): check that it runs "
                "and that the address names its control service (GCS, port 6379 by default), not its "
                "dashboard."
            ) from error
    return found


def code_environment(working_dir: Path | None) -> dict:
    """The Ray runtime environment in which a cluster's workers can import our packages.

    They run in a copy of `working_dir` (`None`: where the node runs them); if our packages are not in it,
    those of this process are shipped beside it. What .gitignore, .rayignore and `EXCLUDES` name stays here.
    """
    environment: dict = {"excludes": EXCLUDES}
    if working_dir is not None:
        environment["working_dir"] = str(working_dir)
    if working_dir is None or not (working_dir / "orchestrator" / "cluster.py").exists():
        environment["py_modules"] = [str(CODE_ROOT / name) for name in PACKAGES]
    return environment


def draining_nodes() -> set[str]:
    """Ids of nodes that are to go away: spot instances that are reclaimed, nodes that are scaled down."""
    return set(state.get_draining_nodes())


class Draining:
    """Which of a run's nodes Ray has begun to drain; looked up every few seconds at most."""

    EVERY_S = 5.0

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self.clock, self._looked, self._known = clock, -math.inf, set[str]()

    def begun(self, used: set[str]) -> set[str]:
        """Those of `used` that are being drained, and were not when this was last asked."""
        if not used or self.clock() - self._looked < self.EVERY_S:
            return set()
        self._looked = self.clock()
        draining = draining_nodes() & used
        told, self._known = draining - self._known, draining
        return told


def reserve(
    bundles: Sequence[Mapping[str, float]], *, purpose: str, strategy: str = "PACK", timeout_s: float = 60.0
) -> PlacementGroup:
    """Reserve `bundles`, each like `{"CPU": 1, "GPU": 1}` and all on one node, as a placement group.

    `strategy` is Ray's: `PACK`, `SPREAD`, `STRICT_PACK` (one node for all) or `STRICT_SPREAD` (a node for
    each). Waits up to `timeout_s` seconds, so that a cluster may grow or another run may end. Raises
    `ValueError` with `purpose`, what was asked for, what there is and what is free, and withdraws it.
    """
    group = placement_group([dict(bundle) for bundle in bundles], strategy=strategy)
    try:
        ready = group.wait(timeout_s)
    except BaseException:
        remove_placement_group(group)
        raise
    if not ready:
        # Before the group is removed, so that nothing of it counts as free that was not.
        missing = _missing(bundles, strategy)
        remove_placement_group(group)
        raise ValueError(f"no room for {purpose} within {timeout_s:g} s: {missing}")
    return group


def release(group: PlacementGroup) -> None:
    """Give a reservation back. Actors and tasks that still run in it are killed."""
    remove_placement_group(group)


def _missing(bundles: Sequence[Mapping[str, float]], strategy: str) -> str:
    """What keeps `bundles` from being placed: the first of the reasons that holds, in words."""
    asked: Counter[str] = Counter()
    for bundle in bundles:
        asked.update(bundle)
    total, free = ray.cluster_resources(), ray.available_resources()
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]

    def fits(request: Mapping[str, float]) -> bool:
        return any(all(node.get(name, 0) >= amount for name, amount in request.items()) for node in nodes)

    def amounts(names: Iterable[str]) -> str:
        shown = []
        for name in names:
            has, left = (
                total.get(name, 0),
                math.floor(free.get(name, 0) * 100) / 100,
            )  # never more than there is
            shown.append(f"{name}: {asked[name]:g} asked for, {has:g} in the cluster, {left:g} free")
        return ", ".join(shown)

    lacking = [name for name in asked if asked[name] > total.get(name, 0)]
    if lacking:
        return f"{amounts(lacking)}; ask for fewer ranks or less for each, or add nodes."
    if strategy == "STRICT_SPREAD" and len(bundles) > len(nodes):
        wanted = f"{len(bundles)} nodes asked for, {len(nodes)} in the cluster"
        return f"{wanted}; ask for fewer ranks or add nodes."
    for request in [asked] if strategy == "STRICT_PACK" else bundles:
        if not fits(request):
            largest = ", ".join(f"{name} {max(node.get(name, 0) for node in nodes):g}" for name in request)
            wanted = ", ".join(f"{name} {amount:g}" for name, amount in request.items())
            most = f"the most that any node has is {largest}"
            return f"{wanted} asked for on one node, {most}; ask for less on one node."
    short = [name for name in asked if asked[name] > free.get(name, 0)]
    if short:
        return f"{amounts(short)}; wait for other runs to end, or ask for less."
    return f"{amounts(asked)}, but not together on nodes as {strategy} wants them; wait, or use PACK."
