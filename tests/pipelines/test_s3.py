"""A lineage whose data sets, models and checkpoints lie in S3, while the store fails now and then."""

import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from infra import storage
from infra.storage import cache, s3
from orchestrator.checkpoints import Checkpoints
from orchestrator.serving.client import Client
from pipelines import cli
from tests.fixtures import TINY_RECIPE, furnished, write_real
from tests.orchestrator.serving.conftest import CONFIG, deploy, serve_url, student  # noqa: F401 (fixtures)
from tests.s3_server import S3Server
from workers.dataset import ParquetDataset
from workers.model_directory import ModelDirectory

pytestmark = pytest.mark.slow
BASE = "s3://bucket/tiny run"


@pytest.fixture
def server(ray_cluster: object, s3_server: S3Server) -> Iterator[S3Server]:
    yield s3_server
    s3_server.fails = 0.0
    storage.discard(BASE)


def copy_up(path: Path, location: str) -> None:
    """A directory as it is, as another tool would copy it."""
    for file in sorted(path.rglob("*")):
        if file.is_file():
            s3.upload(file, place(location) / file.relative_to(path).as_posix())


def place(location: str) -> s3.Place:
    found = s3.at(location)
    assert found is not None
    return found


def copy_model(path: str, location: str) -> None:
    staging = storage.begin(location)
    with storage.reading(path) as there, storage.writing(staging) as here:
        for name in storage.digests(path):
            (here / name).parent.mkdir(parents=True, exist_ok=True)
            (here / name).write_bytes((there / name).read_bytes())
    storage.publish(staging, location, storage.read_metadata(path))


def test_a_distillation_in_s3_resumes_on_an_emptied_node_and_ends_with_the_same_weights(
    server: S3Server, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = furnished(tmp_path)
    copy_up(Path(config.data.train), f"{BASE}/prompts")
    write_real(tmp_path / "videos", config)
    copy_up(tmp_path / "videos", f"{BASE}/videos")
    for name in ("teacher", "student"):
        copy_model(getattr(config.distill, name), f"{BASE}/{name}")
    local = [str(TINY_RECIPE), f"--root={tmp_path}", "--distill.checkpoint_every=2"]
    inputs = [f"--distill.{name}={BASE}/{name}" for name in ("teacher", "student")]
    local += [f"--data.held_out={tmp_path}/videos"]
    data = [f"--data.train={BASE}/prompts", f"--data.held_out={BASE}/videos"]
    stored = [*local, *inputs, *data, f"--distill.output={BASE}/run"]

    server.fails = 0.3
    assert cli.main(["distill", *stored, "--distill.iterations=4"]) == 0
    assert storage.newest_complete(f"{BASE}/run/checkpoints") == f"{BASE}/run/checkpoints/0000004"
    for entry in cache.root().iterdir():  # another node goes on
        if entry.is_dir():
            storage.discard(entry)
    assert cli.main(["distill", *stored, "--resume"]) == 0
    assert cli.main(["distill", *local]) == 0
    server.fails = 0.0
    ours, theirs = ModelDirectory(f"{BASE}/run/model"), ModelDirectory(tmp_path / "outputs/distilled/model")
    for name in theirs.keys():  # noqa: SIM118 (not a mapping)
        assert torch.equal(ours.get(name), theirs.get(name)), name
    said = " ".join(capfd.readouterr().out.split())
    assert f"{BASE}/run/samples/0000006.mp4" in said
    assert len(re.findall(r"latents are compared with \d+ held-out videos", said)) == 3
    assert {each.name for each in storage.stored(f"{BASE}/run/samples", ".png") or ()} >= {"0000006.png"}
    assert storage.read_bytes(f"{BASE}/run/watch/numbers.json")

    video = tmp_path / "video.mp4"
    asked = ["--prompt=a six drifting left", f"--output={video}"]
    assert cli.main(["generate", f"--model={BASE}/run/model", *asked]) == 0 and video.stat().st_size
    assert cli.main(["export", f"{BASE}/run/model", "--format=pt", f"--output={tmp_path}/pt"]) == 0
    checkpoint = f"{BASE}/run/checkpoints/0000006"
    assert cli.main(["export", checkpoint, "--format=pt", f"--output={tmp_path}/pt2"]) == 0


def test_what_is_wrong_with_a_place_is_said_before_anything_starts(
    server: S3Server, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    furnished(tmp_path)
    asked = ["distill", str(TINY_RECIPE), f"--root={tmp_path}"]
    for setting, says in (
        (f"--distill.teacher={BASE}/nowhere", f"there is no complete model at {BASE}/nowhere"),
        ("--distill.teacher=s3://no-such-bucket/a", "there is no such bucket"),
        ("--data.train=s3://bucket/nothing", "the data set s3://bucket/nothing does not exist"),
        ("--distill.output=gs://bucket/run", "use a path, or s3://BUCKET/PREFIX"),
    ):
        capfd.readouterr()
        assert cli.main([*asked, setting]) == 2, setting
        said = capfd.readouterr().err
        assert says in said and said.count("\n") == 1, said


@pytest.mark.by_hand
def test_a_whole_lineage_goes_through_a_store_that_fails_and_is_down_for_a_while(
    server: S3Server,
    deploy: Callable,  # noqa: F811
    tmp_path: Path,
) -> None:
    config = furnished(tmp_path)
    write_real(tmp_path / "videos", config)
    copy_up(tmp_path / "videos", f"{BASE}/videos")
    places = {
        "data.train": "videos", "pretrain.output": "teacher", "initialize.teacher": "teacher/model",
        "initialize.output": "initial", "distill.teacher": "teacher/model",
        "distill.student": "initial/model", "distill.output": "run",
    }  # fmt: skip
    settings = [str(TINY_RECIPE), f"--root={tmp_path}"]
    outage = threading.Event()

    def goes_down() -> None:
        while not outage.wait(40):
            server.down = True
            outage.wait(30)
            server.down = False

    server.fails = 0.3
    threading.Thread(target=goes_down, daemon=True).start()
    try:
        for command in ("pretrain", "initialize", "distill"):
            own = [
                f"--{name}={BASE}/{lies}"
                for name, lies in places.items()
                if name.startswith((command, "data"))
            ]
            assert cli.main([command, *settings, *own]) == 0, command
    finally:
        outage.set()
        server.fails, server.down = 0.0, False
    from_s3 = deploy("from-s3", replace(CONFIG, model=f"{BASE}/run/model"))
    with from_s3 as url, Client(url).stream("a six drifting left", seed=1, frames=6) as frames:
        assert len(list(frames)) == 6


def test_training_goes_on_where_a_checkpoint_cannot_be_stored_but_does_not_end_well_without_the_last(
    ray_cluster: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    config, write = furnished(tmp_path), Checkpoints._write

    def fails(self: Checkpoints, done: int, position: int) -> float:
        if done == 4:
            return write(self, done, position)
        state = replace(self.state, output=f"{tmp_path}/prompts.txt")
        return write(replace(self, state=state), done, position)

    (tmp_path / "prompts.txt").write_text("a file")
    monkeypatch.setattr(Checkpoints, "_write", fails)
    assert cli.main(["distill", str(TINY_RECIPE), f"--root={tmp_path}"]) == 2
    said, error = (" ".join(text.split()) for text in capfd.readouterr())
    assert said.count("WARNING: no checkpoint after iteration 1, the next will be tried:") == 1
    assert "prompts.txt/checkpoints" in error and "cannot be written" in error
    newest = storage.newest_complete(f"{config.distill.output}/checkpoints")
    assert newest == f"{config.distill.output}/checkpoints/0000004"


def test_pairs_evaluation_exports_and_versions_lie_in_s3(
    server: S3Server, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = furnished(tmp_path)
    write_real(tmp_path / "videos", config)
    copy_up(tmp_path / "videos", f"{BASE}/videos")
    copy_up(Path(config.data.train), f"{BASE}/prompts")
    copy_model(config.distill.teacher, f"{BASE}/teacher")
    settings = [str(TINY_RECIPE), f"--root={tmp_path}"]
    server.fails = 0.2
    places = {
        "data.train": "prompts", "initialize.teacher": "teacher", "initialize.pairs_path": "pairs",
        "initialize.output": "initial",
    }  # fmt: skip
    asked = [f"--{name}={BASE}/{lies}" for name, lies in places.items()]
    assert cli.main(["initialize", *settings, *asked]) == 0
    assert "8 ODE pairs" in " ".join(capfd.readouterr().out.split())
    elsewhere = [f"--initialize.teacher={BASE}/teacher", f"--data.train={BASE}/prompts"]
    assert cli.main(["initialize", *settings, *elsewhere]) == 0  # the same on a file system
    ours, local = ParquetDataset(f"{BASE}/pairs", ["trajectory"]), tmp_path / "outputs/data/ode_pairs"
    theirs = ParquetDataset(local, ["trajectory"])
    for number in range(8):
        assert torch.equal(ours.row(number)["trajectory"], theirs.row(number)["trajectory"])

    s3.put(s3.Place("bucket", "tiny run/words.txt"), b"a six drifting left\na two drifting up\n")
    measured = [
        f"--distill.teacher={BASE}/teacher", f"--distill.student={BASE}/initial/model",
        f"--data.held_out={BASE}/videos", f"--evaluate.prompts={BASE}/words.txt", "--evaluate.suite=video",
        f"--evaluate.output={BASE}/report", "--evaluate.videos=10", f"--export-vbench={BASE}/vbench",
    ]  # fmt: skip
    assert cli.main(["evaluate", *settings, *measured]) == 0
    assert {"report.md", "metrics.json", "contact_sheet.png"} <= s3.keys(place(f"{BASE}/report")).keys()
    assert "initial/a two drifting up-4.mp4" in s3.keys(place(f"{BASE}/vbench"))
    capfd.readouterr()
    assert cli.main(["evaluate", *settings, *measured, "--resume"]) == 0
    assert " ".join(capfd.readouterr().out.split()).count("are there already") == 2

    words = ["export", f"{BASE}/initial/model", "--format=wan", f"--output={BASE}/for others"]
    assert cli.main(words) == 0
    assert {"config.json", "README.md"} <= s3.keys(place(f"{BASE}/for others")).keys()
    assert cli.main(words) == 2 and "is there already" in capfd.readouterr().err
    uri = f"--tracking.uri=sqlite:///{tmp_path}/registry.db"
    metrics = f"--metrics={BASE}/report"
    assert cli.main(["register", f"{BASE}/initial/model", "--name=stored", metrics, uri]) == 0
    video = f"{BASE}/samples/a six.mp4"
    model = ["--model=models:/stored/1", f"--registry=sqlite:///{tmp_path}/registry.db"]
    assert cli.main(["generate", *model, "--prompt=a six drifting left", f"--output={video}"]) == 0
    assert storage.read_bytes(video)
