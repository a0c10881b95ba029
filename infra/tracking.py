"""A training run's record in MLflow, which may come and go without the run noticing.

What is to be recorded goes into a bounded queue, which costs the caller microseconds. One background thread
moves it to a spool in the run's directory and from there, in batches, to the tracking server, for as long as
that answers; what has not arrived stays in the spool and catches up when the server is back, or when the same
run is resumed. MLflow's own identity for a point (name, step, time, value) makes a repeated delivery harmless
on its database-backed stores, and the spool's offset keeps repetitions to the one batch that was under way
when a process was killed.

What is MLflow's own is in `infra/mlflow_run.py`. A tracker imports mlflow, this module does not.
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
from typing import Any, Literal, Self

import yaml

from infra import storage
from infra.mlflow_run import MlflowRun, load_mlflow, sqlite_file, system_monitors, upload_seconds
from infra.provenance import git_commit, versions
from infra.redaction import Redactor
from infra.settings import at_least
from infra.spool import Record, Spool, find_spool, record

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
    """Tracking URI: `sqlite:///path/to/mlflow.db` or `http(s)://host:port`. Unset: MLFLOW_TRACKING_URI, or an
    sqlite file with the runs."""

    experiment: str = "self-forcing"
    """Name of the MLflow experiment, created if absent."""

    system_metrics_every_s: float = 10.0
    """Seconds between samples of this machine's CPU, memory, disk, network and GPU use; 0 for none."""

    def __post_init__(self) -> None:
        at_least(self, 0, "system_metrics_every_s")
        if self.uri:  # where it is not set, what takes its place is checked when it does
            checked_uri(self.uri, Redactor())


def sqlite_uri(database: Path) -> str:
    """The tracking URI of an sqlite file."""
    return f"sqlite:///{database.absolute()}"


def tracking_uri(uri: str | None, root: str | Path) -> str:
    """`uri` where it is set, else `MLFLOW_TRACKING_URI`, else `outputs/mlflow.db` below `root`."""
    return uri or os.environ.get("MLFLOW_TRACKING_URI") or sqlite_uri(Path(root) / "outputs" / "mlflow.db")


class Tracker:
    """One run's record; as a context manager it finishes with the block's outcome."""

    def __init__(
        self,
        config: TrackingConfig,
        *,
        folder: Path,
        run_name: str,
        stage: str,
        params: Mapping[str, Any],
        parents: Mapping[str, str] | None = None,
        tags: Mapping[str, str] | None = None,
        resume_run_id: str | None = None,
    ) -> None:
        """Starts recording, whether or not the tracking server answers.

        The spool lives in `folder`/tracking. `run_name` is shown in the UI, and `stage` says what kind of run
        this is: `pretrain`, `initialize`, `distill`, `evaluate`. `params`, the resolved config, is recorded
        whole as the artifact `config.yaml`, and flattened as params; what a resumed run changed becomes tags
        `resumed.<name>`, for MLflow's params never change. `parents` maps roles (`teacher`,
        `initial_student`) to the `run_id` of the run each comes from, and `resume_run_id` is that of the run
        to go on with. ValueError where the tracking URI is missing or of no known kind, or the id is none.
        """
        self._config = config
        self._redactor = Redactor()
        self._uri = checked_uri(config.uri, self._redactor)
        load_mlflow()  # here, so that the thread does not race with the caller's imports
        self._spool = _open_spool(folder / "tracking", resume_run_id)
        self._name = self._redactor.text(run_name)
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
        # What goes on from a checkpoint repeats the steps since; those points are there already.
        self._last_steps = _last_steps(self._spool)
        self._monitors = system_monitors() if config.system_metrics_every_s > 0 else []
        system = [step for name, step in self._last_steps.items() if name.startswith("system/")]
        self._system_step = 1 + max(system, default=-1)
        clean = self._redactor.tree(params)
        config_file = self._spool.folder / "config.yaml"
        storage.write_text(config_file, yaml.safe_dump(clean, sort_keys=False))
        tags = {**self._redactor.tree(tags or {}), "stage": stage, **versions(), **git_commit()}
        self._enqueue("open", params=flatten(clean), parents=dict(parents or {}), tags=tags)
        self.artifact(config_file)
        self._thread = threading.Thread(target=self._work, name="tracking", daemon=True)
        self._thread.start()

    @property
    def run_id(self) -> str:
        """Names the run in checkpoints and as a parent: MLflow's id once that is known."""
        return self._spool.run_id or self._spool.folder.name

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Records one value for each name at `step`. Returns within microseconds.

        A repetition of a step that was recorded under the same name, by this process or, of a resumed run, by
        an earlier one, is left out.
        """
        self._enqueue("metrics", step=int(step), values={name: float(v) for name, v in values.items()})

    def artifact(self, path: Path, folder: str | None = None) -> None:
        """Records a file, or a directory's content, under `folder`. It must stay until it has arrived."""
        self._enqueue("artifact", path=str(path.absolute()), folder=folder)

    def finish(self, status: Status = "FINISHED", *, timeout_s: float = 20.0) -> str | None:
        """Waits at most `timeout_s` for everything to arrive, and closes the run. Later calls do nothing.

        Returns the sentence that says what was not recorded and where it is kept, which is also logged as a
        warning; `None` where all of it was recorded.
        """
        if self._finished:
            return None
        self._collect()  # makes room in the queue
        self._enqueue("close", status=status)
        self._finished = True
        self._collect()
        self._deadline = time.monotonic() + timeout_s
        self._wake.set()
        # The thread moves the deadline while it uploads, as far as the size of the files asks for.
        while self._thread.is_alive() and (left := self._deadline - time.monotonic()) > 0:
            self._thread.join(left)
        if missing := self._missing():
            _log.warning(missing)
        return missing

    def url(self) -> str | None:
        """Address of the run's page (until it exists the server's first one); `None` without a server."""
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

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.finish("FINISHED" if kind is None else "FAILED" if issubclass(kind, Exception) else "KILLED")

    def _page(self) -> str:
        return f"/#/experiments/{self._run.experiment_id}/runs/{self._run.run_id}" if self._run else ""

    def _enqueue(self, kind: str, **fields: Any) -> None:
        if self._finished:
            return
        try:
            self._queue.put_nowait(record(kind, **fields))
        except queue.Full:
            self._dropped += 1
        self._wake.set()

    def _collect(self) -> None:
        """Moves the queue into the spool."""
        with self._collecting:
            while len(self._unwritten) < _QUEUE_SIZE and not self._queue.empty():
                each = self._queue.get_nowait()  # only this method takes
                if each["kind"] == "metrics":
                    step, known = each["step"], self._last_steps
                    fresh = {k: v for k, v in each["values"].items() if step > known.get(k, step - 1)}
                    each["values"] = fresh
                    known |= dict.fromkeys(fresh, step)
                self._unwritten.append(each)
            try:
                self._spool.append(self._unwritten)
            except OSError as error:
                self._note_failure(error)
            else:
                self._unwritten = []

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
        self._failure = self._redactor.line(root_cause(error))
        if not self._warned and self._deadline is None:  # `finish` has its own sentence
            self._warned = True
            said = "MLflow at %s does not record for now (%s); the run goes on, and its record is kept in %s."
            _log.warning(said, self._redactor.text(self._uri), self._failure, self._spool.path)

    def _ship(self) -> None:
        """Delivers what is in the spool. Raises whatever keeps it from arriving."""
        if self._run is None:
            run = MlflowRun.open(
                self._uri,
                experiment=self._config.experiment,
                run_id=self.run_id,
                name=self._name,
                start_ms=next((each["time"] for each, _ in self._spool.read(0)), int(time.time() * 1000)),
            )
            # A run that has vanished from the server is told from the beginning.
            self._spool.arrived(0 if run.created else self._spool.offset, run.run_id)
            self._run = run
        while batch := self._next_batch():
            refused = self._deliver(self._run, [each for each, _ in batch])
            self._refused += [self._redactor.line(reason) for reason in refused]
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
        """Consecutive metrics up to what one request takes, or another record; each with its end."""
        batch: list[tuple[Record, int]] = []
        points = 0
        for each, end in self._spool.read(self._spool.offset):
            if each["kind"] != "metrics":
                return batch or [(each, end)]
            points += len(each["values"])
            if batch and points > _POINTS_PER_BATCH:
                break
            batch.append((each, end))
        return batch

    def _missing(self) -> str | None:
        sentences = []
        if waiting := [each for each, _ in self._spool.read(self._spool.offset)]:
            points = sum(len(each["values"]) for each in waiting if each["kind"] == "metrics")
            artifacts = sum(each["kind"] == "artifact" for each in waiting)
            sentences.append(
                f"MLflow did not record {points} metric points, {artifacts} artifacts and the end of run "
                f"{self.run_id} ({self._failure or 'no answer in time'}); they are kept in "
                f"{self._spool.path} and are sent when the run is resumed while MLflow answers."
            )
        if self._refused:
            first = self._refused[0]
            sentences.append(f"MLflow refused {len(self._refused)} records, the first because: {first}")
        if lost := self._dropped + len(self._unwritten):
            where = f"the spool in {self._spool.folder} could not take them"
            sentences.append(f"{lost} records were lost: {where}.")
        return " ".join(sentences) or None


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """`{"a": {"b": [1, 2]}}` as `{"a.b": "[1, 2]"}`."""
    flat: dict[str, str] = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{name}.")
        else:
            flat[name] = value if isinstance(value, str) else json.dumps(value)
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
    for each, _ in spool.read(0):
        for name in each.get("values", ()):
            steps[name] = max(each["step"], steps.get(name, each["step"]))
    return steps
