"""Registered models as others load them: through MLflow alone, past a server that asks for a password."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import av
import pytest

from infra.registry import Registry
from pipelines import cli
from tests.fixtures import TINY_RECIPE, furnished
from tests.mlflow_server import Server
from tests.s3_server import S3Server
from workers.model_directory import ModelDirectory

pytestmark = pytest.mark.slow

OUTSIDER = """
import json, sys
import mlflow, pandas
model = mlflow.pyfunc.load_model(sys.argv[1])
table = pandas.DataFrame(json.loads(sys.argv[2]))
for number, video in enumerate(model.predict(table)["video"]):
    open(f"{sys.argv[3]}/{number}.mp4", "wb").write(video)
print(json.dumps({
    "inputs": [column["name"] for column in model.metadata.signature.inputs.to_dict()],
    "example": model.input_example.to_dict("records"),
}))
"""


@contextmanager
def running(server: Server) -> Iterator[Server]:
    server.launch()
    try:
        server.wait()
        yield server
    finally:
        server.kill()


def outsider(uri: str, model: str, rows: list[dict], folder: Path) -> dict:
    """What a process that knows MLflow and has this package makes of a registered model."""
    folder.mkdir()
    words = [sys.executable, "-W", "ignore", "-c", OUTSIDER, model, json.dumps(rows), str(folder)]
    environment = {**os.environ, "MLFLOW_TRACKING_URI": uri}
    done = subprocess.run(words, env=environment, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def shape_of(file: Path) -> tuple[int, float]:
    """Frames and rate of a video."""
    with av.open(str(file)) as container:
        frames = sum(1 for _ in container.decode(video=0))
        return frames, float(container.streams.video[0].average_rate)


@pytest.mark.by_hand
def test_a_run_registers_its_student_past_a_password_and_others_play_it(
    ray_cluster: object,
    s3_server: S3Server,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    config = furnished(tmp_path)
    cli.main(["prepare", str(TINY_RECIPE), f"--root={tmp_path}/data"])
    access = tmp_path / "auth.ini"
    access.write_text(
        f"[mlflow]\ndefault_permission = READ\ndatabase_uri = sqlite:///{tmp_path}/auth.db\n"
        "admin_username = admin\nadmin_password = a-long-password\n"
        "authorization_function = mlflow.server.auth:authenticate_request_basic_auth\n"
    )
    options = ("--app-name", "basic-auth", "--artifacts-destination", "s3://bucket/through the server")
    keys = {"MLFLOW_AUTH_CONFIG_PATH": str(access), "MLFLOW_FLASK_SERVER_SECRET_KEY": "a-secret"}
    with running(Server(tmp_path / "server", *options, **keys)) as server:
        registered = ["--register=passed", "--alias=serving", f"--tracking.uri={server.uri}"]
        held_out = f"--data.held_out={tmp_path}/data/outputs/data/held_out"
        asked = ["distill", str(TINY_RECIPE), f"--root={tmp_path}", held_out, *registered]
        model = f"{config.distill.output}/model"

        student = config.distill.student
        assert cli.main(["register", student, "--name=passed", f"--tracking.uri={server.uri}"]) == 2
        error = capfd.readouterr().err
        error = error.splitlines()[-1]
        assert "the registry at" in error and "authenticated" in error, error

        monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "admin")
        monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "a-long-password")
        assert cli.main(asked) == 0, capfd.readouterr().err
        said = " ".join(capfd.readouterr().out.split())
        assert "promote: serving names models:/passed/1" in said and "a-long-password" not in said

        registry = Registry(server.uri)
        version = registry.resolve("models:/passed@serving")
        metrics, params = registry.recorded(version)
        assert "digit_accuracy_inside" in metrics and "evaluation.suite" in params
        distilled = ModelDirectory(model).card.lineage["distilled"]
        tags = server.client().get_model_version("passed", "1").tags
        assert tags["lineage.distilled"] == distilled

        rows = [{"prompt": "a six drifting left", "seed": 3}, {"prompt": "a two drifting up", "frames": 5}]
        told = outsider(server.uri, "models:/passed@serving", rows, tmp_path / "videos")
        assert told["inputs"] == ["prompt", "seed", "frames"] and told["example"][0]["seed"] == 0
        assert [shape_of(tmp_path / f"videos/{n}.mp4") for n in (0, 1)] == [(6, 8.0), (5, 8.0)]
        command = ["generate", "--model=models:/passed@serving", f"--registry={server.uri}", "--seed=3"]
        video = tmp_path / "ours.mp4"
        assert cli.main([*command, "--prompt=a six drifting left", f"--output={video}"]) == 0
        assert video.read_bytes() == (tmp_path / "videos/0.mp4").read_bytes()


@pytest.mark.by_hand
def test_artifacts_go_straight_to_a_store(
    s3_server: S3Server, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model = furnished(tmp_path).distill.student
    options = ("--no-serve-artifacts", "--default-artifact-root", "s3://bucket/straight")
    with running(Server(tmp_path / "server", *options)) as server:
        assert cli.main(["register", model, "--name=straight", f"--tracking.uri={server.uri}"]) == 0
        assert Registry(server.uri).resolve("models:/straight/1").source.startswith("s3://bucket/straight/")
        outsider(server.uri, "models:/straight/1", [{"prompt": "a two drifting up"}], tmp_path / "videos")
        assert shape_of(tmp_path / "videos/0.mp4") == (6, 8.0)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--alias=serving",), "--alias moves to what --register makes"),
        (("--register=a b",), "a registered model cannot be called 'a b'"),
        (("--register=a", "--alias=latest"), "an alias cannot be called 'latest'"),
        (("--register=a", "--rollout.window=null", "--rollout.positions=absolute"), "set rollout.window"),
        (("--register=a",), "there are no prompts to evaluate with"),
    ],
)
def test_what_could_not_be_registered_is_said_before_the_run(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], words: tuple[str, ...], says: str
) -> None:
    asked = ["distill", str(TINY_RECIPE), f"--root={tmp_path}", "--evaluate.suite=video", *words]
    assert cli.main(asked) == 2
    assert says in capfd.readouterr().err
