"""A lineage whose data sets, models and checkpoints lie in S3, while the store fails now and then."""

import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import av
import pytest
import torch

from infra import storage
from infra.storage import cache, s3
from orchestrator.checkpoints import Checkpoints
from orchestrator.serving.client import Client
from pipelines import cli
from tests.fixtures import PROMPTS, TINY_RECIPE, furnished, write_model, write_real
from tests.orchestrator.serving.conftest import CONFIG, deploy, serve_url, student  # noqa: F401 (fixtures)
from tests.s3_server import S3Server
from tests.wan import write_pipeline
from tests.workers.test_video_files import write
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
    server: S3Server, reused_actors: None, tmp_path: Path, capfd: pytest.CaptureFixture[str]
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
@pytest.mark.timeout(1800)
def test_a_whole_lineage_goes_through_a_store_that_fails_and_is_down_for_a_minute(
    server: S3Server,
    deploy: Callable,  # noqa: F811
    tmp_path: Path,
) -> None:
    """Videos, latents and embeddings, pairs, checkpoints, resume, export, evaluation, version, stream.

    Run with `-s` it tells what each stage took, and how often the store was asked and failed.
    """
    pipeline = write_pipeline(tmp_path / "pipeline")
    (tmp_path / "raw").mkdir()
    for number, prompt in enumerate(PROMPTS[:3]):
        clip = write(tmp_path / f"raw/{number}.mp4", [i / 8 for i in range(30)], size=(48, 64))
        clip.with_suffix(".txt").write_text(prompt)
    copy_up(tmp_path / "raw", f"{BASE}/raw videos")
    s3.put(place(f"{BASE}/prompts.txt"), "\n".join(PROMPTS[:4]).encode())
    recipe = {
        "base": str(TINY_RECIPE), "teacher": {"text_len": 32}, "student": {"text_len": 32},
        "rollout": {"chunk": 1, "window": 3},
        "video": {
            "frames": 3, "height": 4, "width": 6, "codec": "wan_vae", "vae": str(pipeline), "fps": 8,
            "pixel_mean": 0, "pixel_std": 1,
        },
        "text": {"encoder": "umt5", "path": str(pipeline)},
        "data": {"train": f"{BASE}/data", "held_out": f"{BASE}/data"},
        "initialize": {
            "teacher": f"{BASE}/teacher", "pairs_path": f"{BASE}/pairs", "output": f"{BASE}/initial",
        },
        "distill": {
            "teacher": f"{BASE}/teacher", "student": f"{BASE}/initial/model", "output": f"{BASE}/run",
            "roles": {"teacher": {"negative_embedding": f"{BASE}/prompts/negative.safetensors"}},
        },
        "evaluate": {
            "suite": "video", "videos": 8, "frames": 6, "output": f"{BASE}/report",
            "prompts": f"{BASE}/prompts.txt",
        },
        "tracking": {"uri": f"sqlite:///{tmp_path}/mlflow.db"},
    }  # fmt: skip
    (tmp_path / "my.yaml").write_text(json.dumps(recipe))
    mine, outages = [f"{tmp_path}/my.yaml", f"--root={tmp_path}"], 0
    config, _ = cli.parse("run", mine)
    write_model(tmp_path / "teacher", config.teacher, seed=1, video=config.video, text=config.text)
    copy_model(f"{tmp_path}/teacher", f"{BASE}/teacher")

    def emptied() -> None:
        for entry in cache.root().iterdir():
            if entry.is_dir():
                storage.discard(entry)

    def goes_down() -> None:
        nonlocal outages
        time.sleep(3)
        server.down, outages = True, outages + 1
        time.sleep(60)
        server.down = False

    def run(*words: str, outage: bool = False) -> None:
        began, asked = time.perf_counter(), server.asked.total()
        if outage:
            threading.Thread(target=goes_down, daemon=True).start()
        assert cli.main(list(words)) == 0, words
        seconds = time.perf_counter() - began
        print(f"{words[0]}: {seconds:.0f} s, {server.asked.total() - asked} requests, {outages} outages")

    server.fails = 0.3
    run("embed", f"{BASE}/prompts.txt", f"--encoder={pipeline}", f"--output={BASE}/prompts", "--text_len=32",
        "--negative=blurred", "--cpus=0.5")  # fmt: skip
    run("prepare-videos", *mine, f"--videos={BASE}/raw videos", f"--output={BASE}/data", "--cpus=0.5")
    run("initialize", *mine, outage=True)
    emptied()
    run("distill", *mine, "--distill.iterations=4")
    emptied()
    run("distill", *mine, "--resume", outage=True)
    emptied()
    run("export", f"{BASE}/run/model", "--format=diffusers", f"--output={BASE}/for others")
    run("evaluate", *mine)
    emptied()
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    words = (f"--metrics={BASE}/report", "--name=lineage", "--alias=serving", f"--tracking.uri={uri}")
    run("register", f"{BASE}/run/model", *words)
    print(f"asked {server.asked.total()} times; down for a minute {outages} times; 30 % of all failed")
    server.fails = 0.0

    video = tmp_path / "played.mp4"
    words = ("--model=models:/lineage@serving", f"--registry={uri}", f"--prompt={PROMPTS[0]}")
    run("generate", *words, "--frames=9", f"--output={video}")
    with av.open(str(video)) as container:
        assert sum(1 for _ in container.decode(video=0)) == 9
        assert container.streams.video[0].average_rate == 8
    served = replace(CONFIG, model="models:/lineage@serving", registry=uri)
    with deploy("lineage", served) as url, Client(url).stream(PROMPTS[0], seed=1, frames=5) as frames:
        assert len(list(frames)) == 5


@pytest.mark.by_hand
def test_training_goes_on_where_a_checkpoint_cannot_be_stored_but_does_not_end_well_without_the_last(
    reused_actors: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
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


@pytest.mark.by_hand
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
