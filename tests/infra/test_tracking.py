"""The record of a run arrives whole, exactly once and without secrets, and its absence costs the run
nothing."""

import logging
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, cast

import pytest
import yaml

from infra.mlflow_run import MlflowRun
from infra.spool import Spool
from infra.tracking import Tracker, TrackingConfig, sqlite_uri
from tests.mlflow_server import Server, free_port, wait_for

STEPS = list(range(400))


def start(uri: str, folder: Path, **overrides: Any) -> Tracker:
    config = TrackingConfig(uri=uri, system_metrics_every_s=overrides.pop("system_metrics_every_s", 0))
    defaults = {"run_name": folder.name, "stage": "distill", "params": {"student": {"lr": 1e-4}}}
    return Tracker(config, folder=folder, **(defaults | overrides))


def steps_and_values(client: Any, run_id: str, name: str) -> list[tuple[int, float]]:
    return sorted((metric.step, metric.value) for metric in client.get_metric_history(run_id, name))


@pytest.mark.slow
def test_everything_arrives_and_runs_are_linked(mlflow_server: Server, tmp_path: Path) -> None:
    teacher = start(mlflow_server.uri, tmp_path / "teacher", stage="pretrain")
    assert teacher.finish() is None
    sample = tmp_path / "sample.gif"
    sample.write_bytes(b"GIF89a")
    params = {"student": {"lr": 1e-4, "zero": {"stage": 2}}, "steps": [1000, 750], "name": None}
    with start(
        mlflow_server.uri,
        tmp_path / "student",
        params=params,
        parents={"teacher": teacher.run_id, "initial_student": "ab" * 16},
        tags={"recipe": "quickstart"},
        system_metrics_every_s=0.2,
    ) as student:
        student.metrics(1, {"student/loss": 0.5, "critic/loss": float("nan")})
        student.metrics(2, {"student/loss": 0.25, "critic/loss": float("inf")})
        student.artifact(sample, "samples/1")
        wait_for(lambda: student.url() != mlflow_server.uri, "the run's page")
        client = mlflow_server.client()
        wait_for(
            lambda: "system/cpu_utilization_percentage" in client.get_run(student.run_id).data.metrics,
            "system metrics",
        )
    run = client.get_run(student.run_id)
    assert student.how_to_open() == (
        f"Open {mlflow_server.uri}/#/experiments/{run.info.experiment_id}/runs/{run.info.run_id}"
    )
    assert (run.info.run_name, run.info.status) == ("student", "FINISHED")
    assert run.data.params == {
        "student.lr": "0.0001",
        "student.zero.stage": "2",
        "steps": "[1000, 750]",
        "name": "null",
    }
    assert steps_and_values(client, student.run_id, "student/loss") == [(1, 0.5), (2, 0.25)]
    assert [step for step, _ in steps_and_values(client, student.run_id, "critic/loss")] == [1, 2]
    assert run.data.tags["recipe"] == "quickstart" and run.data.tags["stage"] == "distill"
    assert {
        f"version.{name}" for name in ("python", "torch", "ray", "deepspeed", "mlflow")
    } <= run.data.tags.keys()
    assert run.data.tags["lineage.teacher"] == teacher.run_id
    assert run.data.tags["lineage.initial_student"] == "ab" * 16  # not on this server, and named all the same
    assert f"/runs/{teacher.run_id}" in run.data.tags["mlflow.note.content"]
    assert client.get_run(teacher.run_id).data.tags[f"lineage.child.{student.run_id}"] == "distill"
    downloaded = Path(client.download_artifacts(student.run_id, "", str(tmp_path)))
    assert yaml.safe_load((downloaded / "config.yaml").read_text()) == params
    assert (downloaded / "samples" / "1" / "sample.gif").read_bytes() == b"GIF89a"


@pytest.mark.slow
def test_killed_server_neither_stops_nor_slows_and_catches_up_once(
    mlflow_server: Server, tmp_path: Path
) -> None:
    tracker = start(mlflow_server.uri, tmp_path / "run")
    for step in STEPS[:100]:
        tracker.metrics(step, {"loss": step / 2})
    client = mlflow_server.client()
    wait_for(lambda: tracker.url() != mlflow_server.uri, "the run")
    wait_for(lambda: len(steps_and_values(client, tracker.run_id, "loss")) == 100, "the first points")

    mlflow_server.kill()
    image = tmp_path / "sheet.png"
    image.write_bytes(b"PNG")
    calls = []
    for step in STEPS[100:300]:
        began = time.perf_counter()
        tracker.metrics(step, {"loss": step / 2})
        calls.append(time.perf_counter() - began)
    tracker.artifact(image)
    assert sorted(calls)[100] < 1e-4 and sum(calls) < 0.5
    wait_for(lambda: tracker._failure, "the tracker to notice")  # and go on
    mlflow_server.launch()
    for step in STEPS[300:]:
        tracker.metrics(step, {"loss": step / 2})
    mlflow_server.wait()
    assert tracker.finish() is None
    assert steps_and_values(client, tracker.run_id, "loss") == [(step, step / 2) for step in STEPS]
    assert {entry.path for entry in client.list_artifacts(tracker.run_id)} == {"config.yaml", "sheet.png"}

    # Killed before it noted what had arrived: the whole record is sent again, and nothing is there twice.
    spool = Spool(tmp_path / "run" / "tracking" / tracker._spool.folder.name)
    spool.arrived(0, tracker.run_id)
    assert start(mlflow_server.uri, tmp_path / "run", resume_run_id=tracker.run_id).finish() is None
    assert steps_and_values(client, tracker.run_id, "loss") == [(step, step / 2) for step in STEPS]


CRASHING_RUN = """
import sys, time
from pathlib import Path
from infra.tracking import Tracker, TrackingConfig
uri, folder = sys.argv[1], Path(sys.argv[2])
tracker = Tracker(TrackingConfig(uri=uri, system_metrics_every_s=0), folder=folder, run_name="crash",
                        stage="distill", params={"lr": 1, "updates": 200})
for step in range(250):
    tracker.metrics(step, {"loss": step / 2})
print(tracker.run_id, flush=True)
time.sleep(600)
"""


@pytest.mark.slow
def test_run_that_was_never_recorded_and_killed_catches_up_when_resumed(
    mlflow_server: Server, tmp_path: Path
) -> None:
    mlflow_server.kill()
    command = [sys.executable, "-c", CRASHING_RUN, mlflow_server.uri, str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        run_id = process.stdout.readline().strip()
        spool = tmp_path / "tracking" / run_id / "spool.jsonl"
        wait_for(lambda: '"step": 249' in spool.read_text(), "the spool")
    finally:
        process.kill()
        process.wait()
    with open(spool, "a") as file:
        file.write('{"kind": "metr')  # the kill came in the middle of a line
    mlflow_server.launch()
    mlflow_server.wait()
    tracker = start(mlflow_server.uri, tmp_path, params={"lr": 1, "updates": 400}, resume_run_id=run_id)
    for step in STEPS[200:]:  # from the checkpoint at 200: 200 to 249 are repeated, with the same numbers
        tracker.metrics(step, {"loss": step / 2})
    assert tracker.finish("FAILED") is None
    assert tracker.run_id != run_id
    client = mlflow_server.client()
    assert steps_and_values(client, tracker.run_id, "loss") == [(step, step / 2) for step in STEPS]
    run = client.get_run(tracker.run_id)
    assert run.info.status == "FAILED"
    assert run.data.params == {"lr": "1", "updates": "200"} and run.data.tags["resumed.updates"] == "400"

    # The id from before MLflow knew the run still names it, as a parent too.
    child = start(mlflow_server.uri, tmp_path / "child", parents={"student": run_id})
    assert child.finish() is None
    assert client.get_run(child.run_id).data.tags["lineage.student"] == tracker.run_id


def test_server_that_never_answers(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "300")  # so who waits for one request is found out
    with socket.socket() as silent, caplog.at_level(logging.WARNING):
        silent.bind(("127.0.0.1", 0))
        silent.listen()  # accepts, and never says a word
        uri = f"http://me:pa55word@127.0.0.1:{silent.getsockname()[1]}"
        began = time.perf_counter()
        tracker = start(uri, tmp_path)
        for step in range(1000):
            tracker.metrics(step, {"loss": 1.0, "norm": 2.0})
        sentence = tracker.finish(timeout_s=0.5)
        assert time.perf_counter() - began < 150
    spool = tmp_path / "tracking" / tracker.run_id / "spool.jsonl"
    assert "2000 metric points, 1 artifacts" in sentence and str(spool) in sentence
    assert sentence in caplog.text and tracker.finish() is None
    assert spool.read_text().count('"metrics"') == 1000
    assert tracker.how_to_open() == f"Open http://[redacted]@{uri.partition('@')[2]}"
    assert "pa55word" not in caplog.text + spool.read_text()


def test_unreachable_server_is_reported_without_waiting_for_the_end(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tracker = start(f"http://127.0.0.1:{free_port()}", tmp_path)
    wait_for(lambda: "the run goes on" in caplog.text, "the warning")
    assert "refused" in tracker.finish("KILLED", timeout_s=0.3)


@pytest.mark.slow
def test_sqlite_file_needs_no_server_and_holds_no_secret(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WAREHOUSE_CREDENTIAL", "S3CR3T-environment")
    monkeypatch.chdir(tmp_path)
    uri = "sqlite:///runs/mlflow db.sqlite"
    tracker = start(
        uri,
        tmp_path / "run",
        params={
            "hub": {"token": "S3CR3T-token", "api_key": "S3CR3T-key"},
            "data": {
                "uri": "https://me:S3CR3T-uri@host/data?signature_key=S3CR3T-query",
                "note": "S3CR3T-environment",
            },
            "env_vars": {"DB_PASSWORD": "S3CR3T-password", "AWS_SECRET_ACCESS_KEY": "S3CR3T-aws"},
        },
        tags={"login": "password=S3CR3T-tag", "credential": "S3CR3T-credential"},
        run_name="of S3CR3T-environment",
        system_metrics_every_s=60,
    )
    tracker.metrics(1, {"loss": 1.0, "bad//name": 1.0})
    tracker.metrics(2, {"loss": 2.0})
    tracker.artifact(tmp_path / "gone.mp4")
    sentence = tracker.finish()
    assert "refused 2 records" in sentence and "bad//name" in sentence
    assert tracker.how_to_open().startswith(
        f"Run `mlflow ui --backend-store-uri '{sqlite_uri(tmp_path / 'runs/mlflow db.sqlite')}'` and open "
    )

    from mlflow.tracking import MlflowClient

    client = MlflowClient(sqlite_uri(tmp_path / "runs/mlflow db.sqlite"))
    assert steps_and_values(client, tracker.run_id, "loss") == [(1, 1.0), (2, 2.0)]
    assert client.get_run(tracker.run_id).data.params["hub.token"] == "[redacted]"
    assert [entry.path for entry in client.list_artifacts(tracker.run_id)] == ["config.yaml"]
    files = [entry for entry in tmp_path.rglob("*") if entry.is_file()]
    names = {entry.name for entry in files}
    assert {"mlflow db.sqlite", "config.yaml", "spool.jsonl"} <= names
    assert "mlflow.db" not in names, "MLflow's monitors open no store of their own"
    assert [entry for entry in files if b"S3CR3T" in entry.read_bytes()] == []


@pytest.mark.parametrize("uri", [None, "", "runs/mlflow", "ftp://host", "sqlite://", "sqlite:///:memory:"])
def test_wrong_uri_is_one_clear_sentence(tmp_path: Path, uri: str | None) -> None:
    with pytest.raises(
        ValueError, match=r"tracking\.uri is .* use sqlite:///path/to/mlflow\.db or http://host:port"
    ):
        start(uri, tmp_path)


def test_importing_does_not_import_mlflow() -> None:
    code = "import sys, infra.tracking; sys.exit('mlflow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_the_server_may_take_as_long_as_an_artifacts_size_asks_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow import environment_variables

    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "15")
    allowed: list[int] = []

    class Client:
        """Asks MLflow what it would ask before a request."""

        def log_artifact(self, *_: object) -> None:
            allowed.append(environment_variables.MLFLOW_HTTP_REQUEST_TIMEOUT.get())

        log_artifacts = log_artifact

    for name, size in (("small", 10), ("large", 2_000_000_000)):
        (tmp_path / name).mkdir()
        with open(tmp_path / name / "file", "wb") as file:
            file.truncate(size)
    run = MlflowRun(cast(Any, Client()), "run", "experiment", created=True)
    for path in (tmp_path / "small" / "file", tmp_path / "large" / "file", tmp_path / "large"):
        assert run.deliver([{"kind": "artifact", "path": str(path), "folder": None}]) == []
    assert allowed == [16, 2015, 2015]
    assert environment_variables.MLFLOW_HTTP_REQUEST_TIMEOUT.get() == 15
