"""One run on the MLflow side: found or created, and given the records of a spool.

With `infra/registry.py` the only module that imports mlflow, and not before it is used: that takes a second.
Every call here may fail for want of a server, and every one may be repeated: repetitions change nothing.
"""

import importlib
import logging
import math
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from infra.spool import Record

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric, Run

_KEY_TAG = "self_forcing.key"  # this side's name for a run, by which it is found again
_LONGEST_PARAM = 6000  # characters; MLflow cuts longer ones
_ARTIFACT_ATTEMPTS = 3
_SLOWEST_UPLOAD = 1e6  # bytes a second, of an artifact and of what a server does with it
_REFUSALS = ("INVALID_PARAMETER_VALUE", "BAD_REQUEST")  # repeating the request would not help
_ENVIRONMENT = {
    # Left alone, MLflow repeats a request for minutes. The tracker repeats, so each request may fail early.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "15",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
}


def load_mlflow() -> None:
    """Imports mlflow with settings for a client in the background; what the environment sets comes first."""
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    importlib.import_module("mlflow.tracking")
    # It reports a new database at length.
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.WARNING)


@dataclass
class MlflowRun:
    """A run that exists on the tracking server."""

    client: "MlflowClient"
    run_id: str
    experiment_id: str
    created: bool  # nothing had been delivered to it when it was opened
    _artifact_attempts: int = 0

    @classmethod
    def open(cls, uri: str, *, experiment: str, run_id: str, name: str, start_ms: int) -> Self:
        """Finds a run, or creates it; its `experiment` too.

        `run_id` is MLflow's id, or the caller's key under which an earlier call created the run. `name` is
        shown in the UI; `start_ms` is when the run began, in milliseconds since 1970.
        """
        from mlflow.tracking import MlflowClient

        database = sqlite_file(uri)
        if database:
            database.parent.mkdir(parents=True, exist_ok=True)
        client = MlflowClient(uri)
        run = _find_run(client, run_id)
        created = run is None
        if run is None:
            # Artifacts lie beside an sqlite file, where MLflow would take the current directory.
            place = (database.parent / "mlflow-artifacts").as_uri() if database else None
            found = client.get_experiment_by_name(experiment)
            place_id = found.experiment_id if found else client.create_experiment(experiment, place)
            tags = {_KEY_TAG: run_id}
            run = client.create_run(place_id, start_time=start_ms, run_name=name, tags=tags)
        return cls(client, run.info.run_id, run.info.experiment_id, created)

    def deliver(self, records: Sequence[Record]) -> list[str]:
        """Delivers metrics (any number), or one record of another kind; says why any were refused for good.

        Raises whatever kept the records from arriving; repeat the call later.
        """
        from mlflow.exceptions import MlflowException

        try:
            match records[0]["kind"]:
                case "metrics":
                    self._log("metrics", _metrics(records), at_once=1000)
                case "open":
                    self._opening(records[0])
                case "artifact":
                    return self._artifact(records[0])
                case "close":
                    self.client.set_terminated(self.run_id, records[0]["status"], records[0]["time"])
        except MlflowException as error:
            if error.error_code not in _REFUSALS:
                raise
            # One bad name must not take the others with it.
            parts = _points(records) if records[0]["kind"] == "metrics" else list(records)
            if len(parts) == 1:
                return [str(error)]
            return [reason for part in parts for reason in self.deliver([part])]
        return []

    def _log(self, what: str, items: Sequence[Any], *, at_once: int = 100) -> None:
        """In requests of at most `at_once`, which is what MLflow takes."""
        for start in range(0, len(items), at_once):
            some = {what: items[start : start + at_once]}
            self.client.log_batch(self.run_id, **some, synchronous=True)

    def _opening(self, opening: Record) -> None:
        from mlflow.entities import Param, RunTag

        run = self.client.get_run(self.run_id)
        if run.info.status != "RUNNING":
            self.client.update_run(self.run_id, status="RUNNING")
        known = run.data.params
        params = {_allowed(name): value[:_LONGEST_PARAM] for name, value in opening["params"].items()}
        tags = opening["tags"] | self._link(opening)
        # Params of a run never change in MLflow, so what a resumed run sets differently becomes a tag.
        tags |= {
            f"resumed.{name}": value for name, value in params.items() if known.get(name, value) != value
        }
        self._log("params", [Param(name, value) for name, value in params.items() if name not in known])
        self._log("tags", [RunTag(_allowed(name), value) for name, value in tags.items()])

    def _link(self, opening: Record) -> dict[str, str]:
        """Tags that lead from this run to its parents; on the parents it sets tags that lead here."""
        tags, links = {}, []
        for role, parent_id in opening["parents"].items():
            parent = _find_run(self.client, parent_id)
            tags[f"lineage.{role}"] = parent.info.run_id if parent else parent_id
            if parent:
                here = parent.info
                self.client.set_tag(here.run_id, f"lineage.child.{self.run_id}", opening["tags"]["stage"])
                links.append(f"[{role}](#/experiments/{here.experiment_id}/runs/{here.run_id})")
        return tags | ({"mlflow.note.content": "From " + ", ".join(links)} if links else {})

    def _artifact(self, record: Record) -> list[str]:
        path = Path(record["path"])
        if not path.exists():
            return [f"the artifact {path} is gone"]
        log = self.client.log_artifacts if path.is_dir() else self.client.log_artifact
        try:
            with _patience(path):
                log(self.run_id, str(path), record["folder"])
        except Exception as error:
            self.client.get_run(self.run_id)  # raises where the server is down: the artifact waits too
            self._artifact_attempts += 1
            if self._artifact_attempts < _ARTIFACT_ATTEMPTS:
                raise
            self._artifact_attempts = 0
            return [f"the artifact {path}: {error}"]
        self._artifact_attempts = 0
        return []


def upload_seconds(path: Path) -> float:
    """How long the upload of a file, or of a directory's files, may take on a slow line."""
    files = [each for each in path.rglob("*") if each.is_file()] if path.is_dir() else [path]
    return sum(each.stat().st_size for each in files if each.exists()) / _SLOWEST_UPLOAD


@contextmanager
def _patience(path: Path) -> Iterator[None]:
    """MLflow's limit on a request, plus the time in which a server stores these files elsewhere."""
    name = "MLFLOW_HTTP_REQUEST_TIMEOUT"
    usual = os.environ.setdefault(name, _ENVIRONMENT[name])
    os.environ[name] = str(int(usual) + math.ceil(upload_seconds(path)))
    try:
        yield
    finally:
        os.environ[name] = usual


def system_monitors() -> list[Any]:
    """MLflow's own monitors of CPU, memory, disk, network and GPUs, where this machine has what they need.

    Its `SystemMetricsMonitor`, which holds them all, opens the tracking store as soon as it is made.
    """
    from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
    from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
    from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
    from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor

    monitors: list[Any] = []
    for kind in (CPUMonitor, DiskMonitor, NetworkMonitor, GPUMonitor):
        with suppress(ImportError, RuntimeError):  # no NVIDIA library; no driver
            monitors.append(kind())
    return monitors


def sqlite_file(uri: str) -> Path | None:
    """The database file of an sqlite tracking URI."""
    return Path(uri.removeprefix("sqlite:///")).absolute() if uri.startswith("sqlite:///") else None


def _allowed(name: str) -> str:
    """`name` with the characters that MLflow allows in names."""
    return re.sub(r"[^\w.\-/ :]", "_", name)


def _points(records: Sequence[Record]) -> list[Record]:
    """The same metrics as one record for each point."""
    return [
        {**record, "values": {name: value}} for record in records for name, value in record["values"].items()
    ]


def _metrics(records: Sequence[Record]) -> list["Metric"]:
    from mlflow.entities import Metric

    return [
        Metric(_allowed(name), value, each["time"], each["step"])
        for each in records
        for name, value in each["values"].items()
    ]


def _find_run(client: "MlflowClient", run_id: str) -> "Run | None":
    """The run with this id of MLflow's or of ours; `None` where there is none, or it was deleted."""
    from mlflow.exceptions import MlflowException

    try:
        run = client.get_run(run_id)
        if run.info.lifecycle_stage == "active":
            return run
    except MlflowException as error:
        if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", *_REFUSALS):
            raise
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    runs = client.search_runs(experiments, f"tags.`{_KEY_TAG}` = '{run_id}'", max_results=1)
    return runs[0] if runs else None
