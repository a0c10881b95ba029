"""Evaluation with the suite `video`: models that make no digits, in colour, without a codec or without
data; and the gate.
"""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from infra.registry import Registry
from infra.tracking import sqlite_uri
from model.rollout_plan import RolloutConfig
from model.transformer import TransformerConfig
from orchestrator.config import RunConfig
from pipelines import cli, plots, suites, vbench
from pipelines.evaluate import evaluate, open_models
from pipelines.report import Report, write_report
from pipelines.suite import Videos
from pipelines.video_suite import SUITE
from tests.fixtures import write_model
from workers.dataset import dataset_schema, encode_tensor, tensor_fields
from workers.model_directory import VideoConfig

SIZES = TransformerConfig(
    dim=16, ffn_dim=32, num_heads=2, num_layers=1, in_dim=4, out_dim=4, text_len=8, text_dim=16, freq_dim=16
)
VIDEO = VideoConfig(frames=4, height=6, width=10)
"""Frames of 12 × 20, which no digit has."""
ROLLOUT = RolloutConfig(steps=(1000, 500), chunk=2, window=4, positions="relative")
PROMPTS = ["a cat", "a dog: running, fast", "two [red] cars"]


def write_held_out(path: Path, prompts: list[str] | None = None, frames: int = 5) -> None:
    """Random videos that get brighter."""
    generator = torch.Generator().manual_seed(0)
    fade = torch.linspace(0, 100, frames)[:, None, None, None]
    rows = []
    for index in range(16):
        pixels = (torch.randint(0, 120, (frames, 1, 12, 20), generator=generator) + fade).byte()
        rows.append({"prompt": (prompts or PROMPTS)[index % 3], **encode_tensor("video", pixels)})
    schema = dataset_schema(
        [pa.field("prompt", pa.string()), *tensor_fields("video")], kind="video", provenance={}
    )
    path.mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), path / "00000.parquet")


def arguments(root: Path, *extra: str) -> list[str]:
    sizes = "--{0}.dim=16 --{0}.ffn_dim=32 --{0}.num_heads=2 --{0}.num_layers=1"
    sizes += " --{0}.text_len=8 --{0}.text_dim=16"
    return [
        f"--root={root}",
        *sizes.format("teacher").split(),
        *sizes.format("student").split(),
        "--video.frames=4", "--video.height=6", "--video.width=10",
        "--rollout.chunk=2", "--rollout.window=4",
        "--evaluate.videos=15", "--evaluate.frames=6", "--evaluate.batch=15", "--evaluate.teacher_steps=2",
        *extra,
    ]  # fmt: skip


def config_of(root: Path, *extra: str) -> RunConfig:
    return cli.parse("evaluate", arguments(root, *extra))[0]


def features(path: Path) -> Path:
    """A network that gives the mean and the spread of a frame."""

    class Moments(torch.nn.Module):
        def forward(self, frames: torch.Tensor) -> torch.Tensor:
            flat = frames.flatten(1)
            return torch.stack([flat.mean(1), flat.std(1)], dim=1)

    torch.jit.script(Moments()).save(str(path))
    return path


@pytest.mark.slow
def test_a_student_of_another_shape_is_measured_exported_registered_and_gated(
    ray_cluster: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # What a notebook leaves behind for its children ends nothing.
    monkeypatch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")
    write_held_out(tmp_path / "outputs/data/held_out")
    first, second = tmp_path / "outputs/initial/model", tmp_path / "outputs/distilled/model"
    write_model(first, SIZES, seed=1, video=VIDEO, rollout=ROLLOUT)
    write_model(second, SIZES, seed=2, video=VIDEO, rollout=ROLLOUT)
    export = tmp_path / "vbench"
    code = cli.main(["evaluate", *arguments(tmp_path, f"--export-vbench={export}")])
    printed = capsys.readouterr()
    assert code == 0, printed.err
    assert "there is no teacher model at" in printed.out

    output = tmp_path / "outputs/evaluation"
    body = json.loads((output / "metrics.json").read_text())
    assert body["suite"]["name"] == "video" and body["suite"]["basis"]["reference"] == "held_out"
    assert list(body["rows"]) == ["real", "initial", "distilled"]
    overall = body["rows"]["distilled"]["overall"]
    assert overall["saturation_drift"]["value"] is None  # one channel
    for metric in (
        "brightness_drift",
        "brightness_gap",
        "flicker",
        "motion",
        "out_of_range",
        "clamped",
        "kernel_distance",
    ):
        found = overall[metric]
        assert found["low"] <= found["value"] <= found["high"], metric
    real = body["rows"]["real"]
    assert abs(real["overall"]["kernel_distance"]["value"]) < overall["kernel_distance"]["value"]
    assert real["by_frame"]["brightness_drift"]["value"][4] > 0.2  # the held-out videos fade
    text = (output / "report.md").read_text()
    assert "held-out videos of data.held_out" in text and "Not defined for these videos: saturation" in text
    for picture in re.findall(r"\]\((.+?\.png)\)", text):
        assert min(Image.open(output / picture).size) > 200
    names = {f"{prompt}-{index}.mp4" for prompt in PROMPTS for index in range(5)}
    assert {file.name for file in (export / "distilled").iterdir()} == names

    # A promotion is gated by what the suite compares.
    uri = f"--tracking.uri={sqlite_uri(tmp_path / 'registry.db')}"

    def register(model: Path, metrics: Path | None) -> int:
        options = [] if metrics is None else [f"--metrics={metrics}"]
        return cli.main(["register", str(model), "--name=clips", uri, *options])

    def promote(version: int, *options: str) -> tuple[int, str]:
        capsys.readouterr()
        code = cli.main(["promote", "clips", str(version), uri, *options])
        printed = capsys.readouterr()
        return code, printed.out + printed.err

    better = tmp_path / "better.json"
    body["rows"]["initial"]["overall"]["flicker"]["value"] = overall["flicker"]["value"] + 0.1
    for name in suites.compared(body["suite"]):
        metric, _, span = name.rpartition("_")
        if name != "flicker_overall":
            body["rows"]["initial"][span][metric] = body["rows"]["distilled"][span][metric]
    better.write_text(json.dumps(body))
    assert register(second, better) == register(first, better) == register(first, None) == 0
    assert promote(1)[0] == 0
    code, said = promote(2)
    assert code == 1 and "flicker_overall of models:/clips/2 is" in said and "by more than 0.005" in said
    code, said = promote(3)
    assert code == 1 and "registered without metrics" in said and "--ungated" in said
    body["suite"]["version"] = 2
    better.write_text(json.dumps(body))
    assert register(first, better) == 0
    code, said = promote(4)
    assert code == 1 and "there is nothing to compare" in said and "version of the suite 2" in said
    assert promote(3, "--ungated")[0] == 0
    code, said = promote(4)
    assert code == 0 and "there is nothing to compare" in said and "was registered without metrics" in said
    assert Registry(uri.removeprefix("--tracking.uri=")).resolve("models:/clips@serving").version == 4


@pytest.mark.slow
def test_without_held_out_videos_the_teacher_is_the_reference_and_latents_need_no_codec(
    ray_cluster: object, tmp_path: Path
) -> None:
    latents = replace(VIDEO, codec="none")
    write_model(tmp_path / "outputs/teacher/model", SIZES, seed=1, video=latents)
    write_model(tmp_path / "outputs/initial/model", SIZES, seed=2, video=latents, rollout=ROLLOUT)
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    extra = ("--video.codec=none", f"--evaluate.prompts={tmp_path}/prompts.txt")
    report = evaluate(config_of(tmp_path, *extra), tracker=None, resume=False)
    assert list(report.rows) == ["teacher", "initial"] and report.reference == "teacher"
    assert report.rows["initial"].overall["brightness_drift"].value.isnan()
    assert report.rows["initial"].beyond["kernel_distance"].value.isfinite()
    assert list(report.pictures()) == ["latents.png"]
    assert "the teacher's samples" in (tmp_path / "outputs/evaluation/report.md").read_text()

    # And without either the column says so; what is there is not made again.
    stored = tmp_path / "outputs/evaluation/videos/initial/videos.safetensors"
    before = stored.stat().st_mtime_ns
    extra = (*extra, f"--distill.teacher={tmp_path}/none")
    alone = evaluate(config_of(tmp_path, *extra), tracker=None, resume=True)
    assert alone.reference == "none" and stored.stat().st_mtime_ns == before
    assert "There is no reference" in (tmp_path / "outputs/evaluation/report.md").read_text()


def test_what_does_not_fit_is_one_sentence_before_anything_starts(tmp_path: Path) -> None:
    write_model(tmp_path / "outputs/initial/model", SIZES, seed=1, video=VIDEO, rollout=ROLLOUT)
    config = config_of(tmp_path).located()
    with pytest.raises(
        ValueError, match=r"there are no prompts to evaluate with: evaluate.prompts must name"
    ):
        evaluate(config, tracker=None, resume=False)
    held_out = tmp_path / "outputs/data/held_out"
    write_held_out(held_out)
    (tmp_path / "text.pt").write_text("no network")
    (tmp_path / "long.txt").write_text("a cat\n" + "a dog and " * 3)
    for options, sentence in (
        (["--evaluate.suite=digit"], "evaluate.suite is 'digit'; use one of video, digits"),
        (["--evaluate.suite=digits"], "makes no frames of 1×16×16, which moving digits have"),
        (
            [f"--evaluate.features={tmp_path}/text.pt"],
            "text.pt is no TorchScript network that reads frames of",
        ),
        ([f"--evaluate.prompts={tmp_path}/none"], "evaluate.prompts cannot be read as a text file"),
        ([f"--evaluate.prompts={tmp_path}/long.txt"], "has more words than the 8 that the models read"),
        (["--evaluate.frames=3"], "evaluate.frames is 3, less than the 4 frames"),
    ):
        with pytest.raises(ValueError, match=re.escape(sentence)):
            evaluate(config_of(tmp_path, *options), tracker=None, resume=False)
    with pytest.raises(
        ValueError, match=r"needs 5 videos of each of the 3 prompts: evaluate.videos is 14; make it 15"
    ):
        evaluate(
            config_of(tmp_path, "--evaluate.videos=14"), tracker=None, resume=False, export=str(tmp_path)
        )
    with pytest.raises(ValueError, match=r"the prompt 'a/b' cannot be the name of a file"):
        vbench.check(["a/b"], 5)
    with pytest.raises(ValueError, match=r"cannot be the name of a file, .* at most \d+ bytes"):
        vbench.check(["ä" * 125], 5)
    # Hidden files are no shards, and a damaged one is left out only where the recipe says so.
    (held_out / "._0.parquet").write_bytes(b"a Mac's")
    models = {"initial": open_models(config)["initial"]}
    assert SUITE.prompts(config) == PROMPTS
    (held_out / "0.parquet").write_bytes(b"not Parquet")
    for read in (SUITE.prompts, lambda config: SUITE.held_out(config, models)):
        with pytest.raises(ValueError, match=r"0\.parquet is damaged or not a Parquet file"):
            read(config)
    skipping = config_of(tmp_path, "--data.skip_damaged=true").located()
    found = SUITE.held_out(skipping, models)
    assert SUITE.prompts(skipping) == PROMPTS and found is not None and len(found[0].prompts) == 8
    # A model that is there and broken is not taken for one that is not there.
    next((tmp_path / "outputs/initial/model").glob("transformer*")).write_bytes(b"")
    with pytest.raises(ValueError):
        open_models(config)


def test_a_reference_in_colour_and_a_network_given_by_path(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 200, (24, 4, 3, 8, 8), generator=generator).byte()
    latents = torch.randn(24, 4, 4, 4, 4, generator=generator)
    videos = Videos(["a"] * 24, pixels, latents)
    config = RunConfig()
    network = replace(
        config, evaluate=replace(config.evaluate, features=str(features(tmp_path / "moments.pt")))
    )
    for each in (config, network):
        prepared = SUITE.prepare(each, videos[12:])
        same = SUITE.measure(prepared, videos[:12], chunk=2, trained=2, seed=0)
        assert list(same.by_frame) == list(SUITE.metrics)
        assert (
            same.overall["kernel_distance"].low < 0.02 and same.overall["saturation_gap"].value.abs() < 0.02
        )
        brighter = Videos(["a"] * 12, pixels[:12] + 50, latents[:12] * 3)
        spoiled = SUITE.measure(prepared, brighter, chunk=2, trained=2, seed=0)
        assert spoiled.overall["brightness_gap"].low > 0.15
        assert spoiled.overall["kernel_distance"].value > same.overall["kernel_distance"].high
        assert spoiled.overall["out_of_range"].value > 0.2 > same.overall["out_of_range"].value
    assert SUITE.basis(network) != SUITE.basis(config)


def test_a_picture_that_fails_is_said_and_the_numbers_are_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pixels = torch.randint(0, 200, (8, 4, 3, 8, 8), generator=torch.Generator().manual_seed(0)).byte()
    videos = Videos(["a"] * 8, pixels, torch.randn(8, 4, 4, 4, 4))
    config = replace(RunConfig(root=str(tmp_path)).located())
    row = SUITE.measure(SUITE.prepare(config, videos[4:]), videos[:4], chunk=2, trained=2, seed=0)
    report = Report(
        config=config, suite=SUITE, reference="held_out", models={}, rows={"real": row}, trained=2, chunk=2,
        steps=2, first_steps=3, samples={"real": pixels[:1]}, sample_prompts=["a"], seconds=0.0,
    )  # fmt: skip

    def broken(*arguments: object, **options: object) -> None:
        raise OSError("no font")

    monkeypatch.setattr("pipelines.report.plot_curves", broken)
    write_report(report, None)
    output = Path(config.evaluate.output)
    assert "drift.png could not be drawn (no font)" in re.sub(r"\s+", " ", capsys.readouterr().out)
    assert json.loads((output / "metrics.json").read_text())["suite"]["name"] == "video"
    sheet = np.asarray(Image.open(output / "contact_sheet.png").convert("RGB")).astype(int)
    assert (abs(sheet[..., 0] - sheet[..., 1]) > 20).any()  # in colour
    assert plots.LOOKS["real"].label in (output / "report.md").read_text()


def test_pictures_need_no_display_whatever_backend_the_environment_names(tmp_path: Path) -> None:
    program = (
        "import sys, torch; from pathlib import Path; from pipelines.plots import plot_samples; "
        "plot_samples(Path(sys.argv[1]), {'real': torch.zeros(1, 4, 1, 8, 8).byte()}, ['a'], trained=2, "
        "chunk=2)"
    )
    environment = {**os.environ, "MPLBACKEND": "module://matplotlib_inline.backend_inline"}
    subprocess.run([sys.executable, "-c", program, str(tmp_path / "a.png")], env=environment, check=True)
    assert min(Image.open(tmp_path / "a.png").size) > 20
