"""A training run's record in MLflow, which may come and go without the run noticing.

What is to be recorded goes into a bounded queue, which costs the caller microseconds. One background thread moves it
to a spool in the run's directory and from there, in batches, to the tracking server, for as long as that answers; what
has not arrived stays in the spool and catches up when the server is back, or when the same run is resumed. MLflow's
own identity for a point (name, step, time, value) makes a repeated delivery harmless on its database-backed stores,
and the spool's offset keeps repetitions to the one batch that was under way when a process was killed.

What is MLflow's own is in `infra/mlflow_run.py`. Importing this module does not import mlflow; starting a tracker does.
"""

import json
import logging
import math
import os
import queue
import re
import shlex
import threading
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import yaml

from infra import storage
from infra.mlflow_run import MlflowRun, load_mlflow, sqlite_file, system_monitors, upload_seconds
from infra.provenance import git_commit, versions
from infra.redaction import Redactor
from infra.settings import at_least
from infra.spool import Record, Spool, find_spool

Status = Literal["FINISHED", "FAILED", "KILLED"]

_log = logging.getLogger(__name__)

_QUEUE_SIZE = 100_000  # calls
_POINTS_PER_BATCH = 1000
_SHIP_EVERY_S = 1.0
_LONGEST_WAIT_S = 30.0  # between attempts while MLflow does not answer
_FINISHING_WAIT_S = 0.2  # the same while a finishing run waits for it


@dataclass(frozen=True)
class TrackingConfig:
    """Where runs are recorded."""

    uri: str | None = None
    """Tracking URI: `sqlite:///path/to/mlflow.db` or `http(s)://host:port`. Unset: MLFLOW_TRACKING_URI, or an sqlite
    file with the runs."""

    experiment: str = "self-forcing"
    """Name of the MLflow experiment, created if absent."""

    system_metrics_every_s: float = 10.0
    """Seconds between samples of this machine's CPU, memory, disk, network and GPU use; 0 for none."""

    def __post_init__(self) -> None:
        at_least(self, 0, "system_metrics_every_s")


def sqlite_uri(database: Path) -> str:
    """The tracking URI of an sqlite file."""
    return f"sqlite:///{database.absolute()}"


def tracking_uri(uri: str | None, root: str | Path) -> str:
    """`uri` where it is set, else `MLFLOW_TRACKING_URI`, else `outputs/mlflow.db` below `root`."""
    return uri or os.environ.get("MLFLOW_TRACKING_URI") or sqlite_uri(Path(root) / "outputs" / "mlflow.db")


class Tracker:
    """One run's record. Made by `Tracker.start`; as a context manager it finishes with the block's outcome."""

    def __init__(
        self, config: TrackingConfig, *, uri: str, spool: Spool, opening: Record, redactor: Redactor
    ) -> None:
        """For `Tracker.start`, which makes the parts."""
        self._config = config
        self._uri = uri
        self._spool = spool
        self._opening = opening
        self._redactor = redactor
        self._queue: queue.Queue[Record] = queue.Queue(_QUEUE_SIZE)
        self._wake = threading.Event()
        self._collecting = threading.Lock()
        self._deadline: float | None = None  # set by `finish`
        self._finished = False
        # The rest is the thread's.
        self._run: MlflowRun | None = None
        self._unwritten: list[Record] = []
        self._dropped = 0
        self._refused: list[str] = []
        self._failure: str | None = None
        self._warned = False
        # A run resumed from a checkpoint repeats the steps since; those points are there already.
        self._earlier_steps = _last_steps(spool)
        self._monitors = system_monitors() if config.system_metrics_every_s > 0 else []
        self._system_step = 1 + max(
            (step for name, step in self._earlier_steps.items() if name.startswith("system/")), default=-1
        )
        self._enqueue(opening)
        self._thread = threading.Thread(target=self._work, name="tracking", daemon=True)
        self._thread.start()

    @classmethod
    def start(
        cls,
        config: TrackingConfig,
        *,
        folder: Path,
        run_name: str,
        stage: str,
        params: Mapping[str, Any],
        parents: Mapping[str, str] | None = None,
        tags: Mapping[str, str] | None = None,
        resume_run_id: str | None = None,
    ) -> Self:
        """Starts recording, whether or not the tracking server answers.

        Args:
            config: `uri` must be set.
            folder: the run's directory; the spool lives in its `tracking/`.
            run_name: shown in the UI.
            stage: what kind of run this is: `pretrain`, `initialize`, `distill`, `evaluate`.
            params: the resolved config. Recorded whole as the artifact `config.yaml`, and flattened as params. What
                a resumed run changed is recorded as tags `resumed.<name>`, for MLflow's params never change.
            parents: role → `run_id` of a run this one comes from (`teacher`, `initial_student`).
            tags: anything else to find the run by.
            resume_run_id: the `run_id` of the run to go on with.

        Raises:
            ValueError: the tracking URI is of no known kind, or `resume_run_id` cannot be an id.
        """
        redactor = Redactor()
        uri = checked_uri(config.uri, redactor)
        load_mlflow()  # here, so that the thread does not race with the caller's imports
        spool = _open_spool(folder / "tracking", resume_run_id)
        clean = redactor.tree(params)
        config_file = spool.folder / "config.yaml"
        storage.write_text(config_file, yaml.safe_dump(clean, sort_keys=False))
        opening = {
            "kind": "open",
            "time": _now_ms(),
            "name": redactor.text(run_name),
            "params": flatten(clean),
            "parents": dict(parents or {}),
            "tags": {**redactor.tree(tags or {}), "stage": stage, **versions(), **git_commit()},
        }
        tracker = cls(config, uri=uri, spool=spool, opening=opening, redactor=redactor)
        tracker.artifact(config_file)
        return tracker

    @property
    def run_id(self) -> str:
        """Names the run in checkpoints, as `resume_run_id` and among `parents`: MLflow's id once that is known."""
        return self._spool.run_id or self._spool.folder.name

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Records one value for each name at `step`. Returns within microseconds.

        A resumed run's repetition of a step that an earlier process recorded under the same name is left out.
        """
        numbers = {name: float(value) for name, value in values.items()}
        self._enqueue({"kind": "metrics", "time": _now_ms(), "step": int(step), "values": numbers})

    def artifact(self, path: Path, folder: str | None = None) -> None:
        """Records a file, or a directory's content, under `folder`. It must stay in place until it has arrived."""
        self._enqueue({"kind": "artifact", "time": _now_ms(), "path": str(path.absolute()), "folder": folder})

    def finish(self, status: Status = "FINISHED", *, timeout_s: float = 20.0) -> str | None:
        """Waits at most `timeout_s` for everything to arrive, and closes the run. Later calls do nothing.

        Returns:
            The sentence that says what was not recorded and where it is kept, which is also logged as a warning; or
            `None` where all of it was recorded.
        """
        if self._finished:
            return None
        self._collect()  # makes room in the queue
        self._enqueue({"kind": "close", "time": _now_ms(), "status": status})
        self._finished = True
        self._collect()
        self._deadline = time.monotonic() + timeout_s
        self._wake.set()
        # The thread moves the deadline while it uploads, as far as the size of the files asks for.
        while self._thread.is_alive() and (left := self._deadline - time.monotonic()) > 0:
            self._thread.join(left)
        missing = self._missing()
        if missing:
            _log.warning(missing)
        return missing

    def url(self) -> str | None:
        """Address of the run's page (of the server's first page until the run exists); `None` without a server."""
        if not self._uri.startswith("http"):
            return None
        return self._redactor.text(self._uri).rstrip("/") + self._page()

    def how_to_open(self) -> str:
        """One sentence for a person who wants to look at the run."""
        if url := self.url():
            return f"Open {url}"
        uri = shlex.quote(self._redactor.text(self._uri))
        return f"Run `mlflow ui --backend-store-uri {uri}` and open http://127.0.0.1:5000{self._page()}"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is None:
            self.finish()
        else:
            self.finish("FAILED" if issubclass(kind, Exception) else "KILLED")

    def _page(self) -> str:
        return f"/#/experiments/{self._run.experiment_id}/runs/{self._run.run_id}" if self._run else ""

    def _enqueue(self, record: Record) -> None:
        if self._finished:
            return
        try:
            self._queue.put_nowait(record)
        except queue.Full:
            self._dropped += 1
        self._wake.set()

    def _collect(self) -> None:
        """Moves the queue into the spool."""
        with self._collecting:
            while len(self._unwritten) < _QUEUE_SIZE:
                try:
                    record = self._queue.get_nowait()
                except queue.Empty:
                    break
                if record["kind"] == "metrics":
                    record["values"] = self._without_repeated(record["step"], record["values"])
                self._unwritten.append(record)
            try:
                self._spool.append(self._unwritten)
            except OSError as error:
                self._note_failure(error)
            else:
                self._unwritten = []

    def _without_repeated(self, step: int, values: dict[str, float]) -> dict[str, float]:
        return {
            name: value for name, value in values.items() if step > self._earlier_steps.get(name, step - 1)
        }

    def _work(self) -> None:
        wait = 0.0
        ship_at = time.monotonic()
        sample_at = ship_at + self._config.system_metrics_every_s if self._monitors else math.inf
        while True:
            deadline = self._deadline
            if deadline is None:
                self._wake.wait(max(0.0, min(ship_at, sample_at) - time.monotonic()))
                self._wake.clear()
            if time.monotonic() >= sample_at:
                sample_at = time.monotonic() + self._config.system_metrics_every_s
                self._sample_system()
            self._collect()
            if time.monotonic() >= ship_at or deadline is not None:
                try:
                    self._ship()
                    self._failure, wait = None, _SHIP_EVERY_S
                except Exception as error:  # whatever it is, the run that is being recorded goes on
                    self._note_failure(error)
                    wait = min(2 * wait or _SHIP_EVERY_S, _LONGEST_WAIT_S)
                ship_at = time.monotonic() + wait
            if deadline is not None:
                if self._failure is None or time.monotonic() >= deadline:
                    return
                time.sleep(_FINISHING_WAIT_S)

    def _sample_system(self) -> None:
        values: dict[str, float] = {}
        try:
            for monitor in self._monitors:
                monitor.collect_metrics()
                values |= {f"system/{name}": value for name, value in monitor.aggregate_metrics().items()}
                monitor.clear_metrics()
        except Exception as error:  # a machine that cannot be asked is no reason to stop recording
            _log.debug("No more system metrics: %s", error)
            self._monitors = []
        self.metrics(self._system_step, values)
        self._system_step += 1

    def _note_failure(self, error: Exception) -> None:
        self._failure = self._one_line(root_cause(error))
        if not self._warned and self._deadline is None:  # `finish` has its own sentence
            self._warned = True
            _log.warning(
                "MLflow at %s does not record for now (%s); the run goes on, and its record is kept in %s.",
                self._redactor.text(self._uri),
                self._failure,
                self._spool.path,
            )

    def _one_line(self, reason: str) -> str:
        return self._redactor.text(" ".join(reason.split()))[:300]

    def _ship(self) -> None:
        """Delivers what is in the spool. Raises whatever keeps it from arriving."""
        if self._run is None:
            run = MlflowRun.open(
                self._uri,
                experiment=self._config.experiment,
                run_id=self.run_id,
                name=self._opening["name"],
                start_ms=next((record["time"] for record, _ in self._spool.read(0)), _now_ms()),
            )
            # A run that has vanished from the server is told from the beginning.
            self._spool.arrived(0 if run.created else self._spool.offset, run.run_id)
            self._run = run
        while batch := self._next_batch():
            refused = self._deliver(self._run, [record for record, _ in batch])
            self._refused += [self._one_line(reason) for reason in refused]
            self._spool.arrived(batch[-1][1], self._run.run_id)
            if self._deadline is not None and time.monotonic() >= self._deadline:
                raise TimeoutError("the time to finish was too short for everything to arrive")
            self._collect()

    def _deliver(self, run: MlflowRun, records: list[Record]) -> list[str]:
        """`run.deliver`; a finishing run waits longer for artifacts, unless they do not arrive."""
        before = self._deadline
        if before is None or records[0]["kind"] != "artifact":
            return run.deliver(records)
        began, extra = time.monotonic(), upload_seconds(Path(records[0]["path"]))
        self._deadline = before + extra
        try:
            refused = run.deliver(records)
        except Exception:
            self._deadline = before
            raise
        self._deadline = before + min(extra, time.monotonic() - began)
        return refused

    def _next_batch(self) -> list[tuple[Record, int]]:
        """Consecutive metrics up to what one request takes, or one record of another kind; each with its end."""
        batch: list[tuple[Record, int]] = []
        points = 0
        for record, end in self._spool.read(self._spool.offset):
            if record["kind"] != "metrics":
                return batch or [(record, end)]
            points += len(record["values"])
            if batch and points > _POINTS_PER_BATCH:
                break
            batch.append((record, end))
        return batch

    def _missing(self) -> str | None:
        sentences = []
        waiting = [record for record, _ in self._spool.read(self._spool.offset)]
        if waiting:
            points = sum(len(record["values"]) for record in waiting if record["kind"] == "metrics")
            artifacts = sum(record["kind"] == "artifact" for record in waiting)
            sentences.append(
                f"MLflow did not record {points} metric points, {artifacts} artifacts and the end of run {self.run_id} "
                f"({self._failure or 'no answer in time'}); they are kept in {self._spool.path} and are sent when "
                "the run is resumed while MLflow answers."
            )
        if self._refused:
            sentences.append(
                f"MLflow refused {len(self._refused)} records, the first because: {self._refused[0]}"
            )
        if lost := self._dropped + len(self._unwritten):
            sentences.append(
                f"{lost} records were lost: the spool in {self._spool.folder} could not take them."
            )
        return " ".join(sentences) or None


def _now_ms() -> int:
    return int(time.time() * 1000)


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """`{"a": {"b": [1, 2]}}` as `{"a.b": "[1, 2]"}`."""
    flat: dict[str, str] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value if isinstance(value, str) else json.dumps(value)
    return flat


def checked_uri(uri: str | None, redactor: Redactor) -> str:
    """The tracking URI, an sqlite file's made absolute; ValueError where it is of no known kind."""
    if uri is None or not re.match(r"sqlite:///[^:?]|(https?|postgresql|mysql|mssql)(\+\w+)?://", uri or ""):
        raise ValueError(
            f"tracking.uri is {redactor.text(str(uri))!r}, which is no tracking URI; "
            "use sqlite:///path/to/mlflow.db or http://host:port."
        )
    database = sqlite_file(uri)
    return sqlite_uri(database) if database else uri


def _open_spool(root: Path, resume_run_id: str | None) -> Spool:
    if resume_run_id is None:
        return Spool(root / uuid.uuid4().hex)
    if not re.fullmatch(r"[\w\-]+", resume_run_id):
        raise ValueError(f"The run to resume is named {resume_run_id!r}, which is no MLflow run id.")
    folder = find_spool(root, resume_run_id)
    return Spool(folder) if folder else Spool(root / resume_run_id, run_id=resume_run_id)


def root_cause(error: BaseException) -> str:
    """What a person can act on: MLflow wraps a refused connection four times."""
    while cause := error.__cause__ or error.__context__:
        error = cause
    return f"{type(error).__name__}: {error}"


def _last_steps(spool: Spool) -> dict[str, int]:
    steps: dict[str, int] = {}
    for record, _ in spool.read(0):
        for name in record.get("values", ()):
            steps[name] = max(record["step"], steps.get(name, record["step"]))
    return steps
