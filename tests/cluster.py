"""A real Ray cluster of two nodes on this machine, started by `ray start`, for tests that need one.

Every port and directory is its own, so that any number of such clusters, and of `ray.init()`, may run side by
side. Its processes carry a mark in their environment, and exactly those are killed at the end.
"""

import json
import os
import random
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

BIN = Path(sys.executable).parent
MARK = "SELF_FORCING_TEST_CLUSTER"
NODE_PORTS = (
    "node-manager-port",
    "object-manager-port",
    "dashboard-agent-listen-port",
    "dashboard-agent-grpc-port",
    "runtime-env-agent-port",
    "metrics-export-port",
)


@dataclass(frozen=True)
class TwoNodeCluster:
    """A head node with the resource `head` and a second node with the resource `second`."""

    address: str
    """`host:port` of the control service (GCS)."""
    dashboard_url: str
    """`http://host:port` of the dashboard and job server."""
    token: str
    """What the cluster accepts, and nothing else."""
    environment: dict[str, str]
    """A whole environment for subprocesses: the token, and this interpreter's scripts first on the path."""
    directory: str
    """Where each node has a directory of its resource's name."""
    add: Callable[[str], None]
    """Start another node with that resource, and wait until it is there."""

    def raylet(self, resource: str) -> int | None:
        """The process id of the raylet of a node, if it runs."""
        for process in psutil.process_iter(["name", "cmdline"]):
            if process.info["name"] == "raylet" and any(
                f"{self.directory}/{resource}/" in word for word in process.info["cmdline"] or ()
            ):
                return process.pid
        return None


@contextmanager
def two_node_cluster(
    *, cpus_per_node: int = 4, object_store_bytes: int = 256 << 20, **settings: str
) -> Iterator[TwoNodeCluster]:
    """Start the cluster, wait until both nodes and the job server answer, and kill it at the end.

    `settings` are more of the nodes' environment. The token is the one in `RAY_AUTH_TOKEN` if the tests have
    set it (Ray caches one a process), else a new one.
    """
    token = os.environ.get("RAY_AUTH_TOKEN") or secrets.token_hex(32)
    mark = secrets.token_hex(8)
    # Ray's sockets lie below it, and a socket's path may have 107 characters at most.
    directory = tempfile.mkdtemp(prefix="sf", dir="/tmp")
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment = inherited | {
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": token,
        "RAY_USAGE_STATS_ENABLED": "0",
        **settings,
    }
    gcs, dashboard, client, *node_ports = free_ports(3 + 2 * len(NODE_PORTS))
    address = f"127.0.0.1:{gcs}"

    def add(resource: str) -> None:
        process = node(
            resource, free_ports(len(NODE_PORTS)), f"--address={address}", "--include-log-monitor=false"
        )
        _wait(lambda: process.poll() == 0, process, f"{directory}/{resource}.log")

    cluster = TwoNodeCluster(address, f"http://127.0.0.1:{dashboard}", token, environment, directory, add)

    def node(resource: str, ports: list[int], *options: str) -> subprocess.Popen:
        command = [
            str(BIN / "ray"),
            "start",
            *options,
            "--node-ip-address=127.0.0.1",
            f"--num-cpus={cpus_per_node}",
        ]
        # A directory for each, as on two machines: in a shared one, each node unpacks a job's files over the
        # other's.
        command += [f"--temp-dir={directory}/{resource}"]
        command += [f"--object-store-memory={object_store_bytes}", f"--resources={json.dumps({resource: 1})}"]
        command += [f"--{name}={port}" for name, port in zip(NODE_PORTS, ports, strict=True)]
        with open(f"{directory}/{resource}.log", "w") as log:
            return subprocess.Popen(
                command, env=environment | {MARK: mark}, stdout=log, stderr=subprocess.STDOUT
            )

    try:
        head = node(
            "head",
            node_ports[::2],
            "--head",
            f"--port={gcs}",
            f"--dashboard-port={dashboard}",
            f"--ray-client-server-port={client}",
        )
        # The second node starts once the first has one to show, for it gives up when it does not soon see
        # that.
        _wait(lambda: _listens(node_ports[0]), head, f"{directory}/head.log")
        second = node("second", node_ports[1::2], f"--address={address}", "--include-log-monitor=false")
        for process, name in ((second, "second"), (head, "head")):
            _wait(lambda: process.poll() == 0, process, f"{directory}/{name}.log")  # noqa: B023
        yield cluster
    finally:
        kill_marked(mark)
        shutil.rmtree(directory, ignore_errors=True)


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on, below the range from which the system gives out ports of its own
    accord."""
    ports: list[int] = []
    for port in random.sample(range(20_000, 32_000), 12_000):
        if len(ports) == count:
            break
        with socket.socket() as candidate:
            try:
                candidate.bind(("0.0.0.0", port))
            except OSError:
                continue
            ports.append(port)
    return ports


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _wait(condition, process: subprocess.Popen, log: str, timeout_s: float = 180.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        if process.poll() not in (None, 0) or time.monotonic() > deadline:
            raise RuntimeError(f"`ray start` failed:\n{Path(log).read_text()}")
        time.sleep(0.1)


def kill_marked(mark: str) -> None:
    """Kill every process that inherited the mark: nodes, workers, and the drivers of jobs."""
    while marked := [process for process in psutil.process_iter() if _is_marked(process.pid, mark)]:
        for process in marked:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(marked, timeout=5)


def _is_marked(pid: int, mark: str) -> bool:
    # Not psutil's environ(): it stops at the zeros that Ray's agents leave there when they change their
    # title.
    try:
        return f"{MARK}={mark}".encode() in Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        return False
