"""`self-forcing serve`: the streaming endpoint, on Ray Serve."""

import errno
import fcntl
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import ray
from ray import serve
from ray.serve.context import _get_global_client

from infra.settings import absolute
from infra.storage import Files
from infra.tracking import tracking_uri
from orchestrator.cluster import Cluster, connect
from orchestrator.serving.access import check_exposure
from orchestrator.serving.app import application
from orchestrator.serving.config import ServeConfig
from orchestrator.serving.models import locate
from pipelines.console import say
from workers.model_directory import never_trained, showable
from workers.streamer import check

NAME = "self-forcing"


def command(config: ServeConfig, options: Any) -> None:
    """Serve until interrupted; ValueError for settings that cannot work or a model that cannot stream."""
    if (options.certificate is None) != (options.key is None):
        raise ValueError("certificate and key belong together; give both or neither.")
    if options.certificate is not None and os.environ.get("RAY_SERVE_ENABLE_HA_PROXY") == "1":
        raise ValueError(
            "with RAY_SERVE_ENABLE_HA_PROXY=1 there is no HTTPS: leave out certificate and key and let a "
            "proxy in front end TLS."
        )
    check_exposure(config.access, options.host)
    if config.registered:
        config = replace(config, registry=tracking_uri(config.registry, "."))
    else:
        config = replace(config, model=absolute(config.model))
    source, _ = check(locate(config)[1])
    for sentence in never_trained(source.card):
        say(f"serve: {sentence}")
    if config.light_decoder is not None:
        config = replace(config, light_decoder=absolute(config.light_decoder))
    showable(source.card.video.shown_by(config.light_decoder), source.path)
    address = options.address or os.environ.get("RAY_ADDRESS") or "local"
    if address == "local" and not ray.is_initialized():
        _check_port(options.host, options.port)
    scheme = "http" if options.certificate is None else "https"
    with (
        _videos(config.videos.storage) as storage,
        _ended_by_sigterm() as listen,
        connect(options.address) as cluster,
    ):
        listen()
        config = replace(config, videos=replace(config.videos, storage=storage))
        began = _start(options, cluster)
        try:
            serve.run(application(config), name=NAME)
            say(
                f"serve: {config.model} at {scheme}://{options.host}:{options.port}/ with {config.slots} "
                "slots a replica; stop with Ctrl-C"
            )
            wait()
        finally:
            serve.delete(NAME)
            if began and not serve.status().applications:
                serve.shutdown()


def wait() -> None:
    """Until a signal comes."""
    threading.Event().wait()


def _start(options: Any, cluster: Cluster) -> bool:
    """Have Ray Serve run as asked for; whether it was started here. ValueError where it runs otherwise
    already."""
    client = _get_global_client(raise_if_no_controller_running=False)
    if client is None:
        here = cluster.address.rpartition(":")[0] == ray.util.get_node_ip_address()
        if here and not cluster.started_here:  # else it was looked at before Ray was started
            _check_port(options.host, options.port)
        asked = {"host": options.host, "port": options.port}
        serve.start(http_options={**asked, "ssl_certfile": options.certificate, "ssl_keyfile": options.key})
        return True
    running = client.http_config
    for name, given, there in (
        ("host", options.host, running.host),
        ("port", options.port, running.port),
        ("certificate", options.certificate, running.ssl_certfile),
        ("key", options.key, running.ssl_keyfile),
    ):
        if given != there:
            raise ValueError(
                f"{name} is {given}, and Ray Serve runs on this cluster already with {there}; give host "
                f"{running.host}, port {running.port} and the certificate and key that it was started with, "
                "if any."
            )
    for name, there in client.get_serve_details()["applications"].items():
        if name == NAME or there["route_prefix"] == "/":
            raise ValueError(
                f"address names a cluster that serves the application {name} at {there['route_prefix']} "
                "already; end that first, or use another cluster."
            )
    return False


def _check_port(host: str, port: int) -> None:
    """ValueError where nobody could listen there: Serve would share the port (SO_REUSEPORT)."""
    try:
        family, kind, protocol, _, place = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(place)
    except socket.gaierror:
        raise ValueError(f"host {host} is no address of this machine.") from None
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise ValueError(
                f"port {port} of {host} is taken by another server; choose another port."
            ) from None
        raise ValueError(f"host {host} and port {port} cannot be listened at ({error.strerror}).") from None


@contextmanager
def _videos(location: str) -> Iterator[str]:
    """Where videos are kept, as replicas name it, held against other servers where it is a directory.

    ValueError where it cannot be read, or another server holds it.
    """
    files = Files(location)
    try:
        files.names()
    except OSError as error:
        raise ValueError(f"videos.storage: {location} cannot be read ({error}).") from None
    directory = files.path(".")
    if directory is None:
        yield files.location
        return
    directory.mkdir(parents=True, exist_ok=True)
    held = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(held)
        raise ValueError(
            f"videos.storage: another server keeps its videos in {location}; name another directory."
        ) from None
    try:
        yield files.location
    finally:
        os.close(held)


@contextmanager
def _ended_by_sigterm() -> Iterator[Callable[[], None]]:
    """SIGTERM ends the block as Ctrl-C does, and the process with the code of one that it ended.

    Ray's own handler, which aborts, comes with `connect`: what is given puts this one in its place again.
    """

    def end(*_: Any) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise SystemExit(128 + signal.SIGTERM)

    def listen() -> None:
        signal.signal(signal.SIGTERM, end)

    before = signal.getsignal(signal.SIGTERM)
    listen()
    try:
        yield listen
    finally:
        signal.signal(signal.SIGTERM, before)
