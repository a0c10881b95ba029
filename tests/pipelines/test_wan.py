"""Models that decode by Wan's VAE and read prompts by UMT5: generated from and measured."""

import json
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from infra import storage
from model.codec import enlarge, to_uint8
from pipelines import cli
from tests.fixtures import PROMPTS, TINY_RECIPE, write_model
from tests.wan import ROLLOUT, SIZES, write_light_decoder, write_pipeline, write_student
from workers.generator import Generator
from workers.model_directory import ModelDirectory, TextConfig, VideoConfig

pytestmark = pytest.mark.slow
FRAMES = 33  # of pixels, of nine latent frames


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pipeline(tmp_path_factory.mktemp("pipeline"))


@pytest.fixture(scope="module")
def student(pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_student(tmp_path_factory.mktemp("wan") / "student", pipeline)


def refused(capfd: pytest.CaptureFixture[str], *arguments: object) -> str:
    capfd.readouterr()
    assert cli.main([str(argument) for argument in arguments]) == 2
    return " ".join(capfd.readouterr().err.split())


@pytest.mark.parametrize(("asked", "frames"), [([], FRAMES), (["--frames=10"], 10), (["--frames=70"], 70)])
def test_a_video_has_the_frames_and_the_rate_that_were_asked_for(
    student: Path, tmp_path: Path, asked: list[str], frames: int
) -> None:
    output = tmp_path / "video.mp4"
    arguments = ["generate", f"--model={student}", f"--prompt={PROMPTS[0]}", f"--output={output}", *asked]
    assert cli.main(arguments) == 0
    with av.open(output) as container:
        stream = container.streams.video[0]
        times = [float(frame.pts * frame.time_base) for frame in container.decode(stream)]
        assert (stream.height, stream.width) == (256, 384)  # 32 × 48, enlarged for people
    assert times == pytest.approx([frame / 16 for frame in range(frames)])


def test_a_light_decoder_takes_the_place_of_the_vae(
    student: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    light, output = write_light_decoder(tmp_path / "light.pth"), tmp_path / "video.mp4"
    asked = [f"--model={student}", f"--prompt={PROMPTS[0]}", f"--output={output}", "--frames=10"]
    assert cli.main(["generate", *asked, f"--light-decoder={light}"]) == 0
    with av.open(output) as container:
        shown = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    generator = Generator(str(student), light_decoder=str(light))
    latents = generator.student([PROMPTS[0]], [(0, "generate", 0)], 9)
    expected = enlarge(to_uint8(generator.shown.decode(latents)[0, :10]))
    assert shown.shape == expected.shape == (10, 256, 384, 3)
    assert np.abs(shown.astype(float) - expected).mean() < 4  # H.264 loses a little
    assert (
        np.abs(
            shown.astype(float) - enlarge(to_uint8(Generator(str(student)).shown.decode(latents)[0, :10]))
        ).mean()
        > 20
    )
    missing = f"{tmp_path}/nowhere.pth"
    for command in (
        ["generate", *asked, f"--light-decoder={missing}"],
        ["serve", f"--model={student}", f"--light_decoder={missing}"],
    ):
        assert f"the light decoder at {missing} cannot be read: No such file" in refused(capfd, *command)


def test_a_model_brings_its_vae_and_names_its_encoder(student: Path, pipeline: Path, tmp_path: Path) -> None:
    card = json.loads((student / "model.json").read_text())
    assert card["video"]["vae"] == "vae" and card["text"]["path"] == str(pipeline)
    moved = tmp_path / "moved"
    student_copy = storage.begin(moved)
    for name in storage.digests(student):
        target = Path(student_copy, name)
        target.parent.mkdir(exist_ok=True)
        target.write_bytes((student / name).read_bytes())
    storage.publish(student_copy, moved, {})
    model = ModelDirectory(moved)
    assert model.card.video.vae == str(moved / "vae")
    assert model.card.video.codec_digest() == ModelDirectory(student).card.video.codec_digest()
    assert model.text_digest() == ModelDirectory(student).text_digest()
    first, second = (
        Generator(str(path)).student([PROMPTS[1]], [(0, "x", 0)], 9) for path in (student, moved)
    )
    assert torch.equal(first, second)


def test_what_is_missing_is_said(
    student: Path, pipeline: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    write_model(
        tmp_path / "lost", SIZES, seed=1, rollout=ROLLOUT, text=TextConfig("umt5", str(tmp_path / "none")),
        video=VideoConfig(9, 4, 4, 6, codec="wan_vae", vae=str(pipeline / "vae")),
    )  # fmt: skip
    where = (f"--output={tmp_path}/video.mp4", "--prompt=a six")
    said = refused(capfd, "generate", f"--model={tmp_path}/lost", *where)
    assert f"there is no UMT5 encoder with its tokenizer at {tmp_path}/none" in said
    said = refused(capfd, "generate", f"--model={student}", where[0], f"--prompt={'six ' * 100}")
    assert "tokens, more than the 32 that this model reads" in said
    for settings, wanted in (
        (["--video.codec=wan_vae"], "video.vae must name the VAE's folder where codec is wan_vae"),
        (["--video.codec=none", "--video.vae=x"], "video.vae must name the VAE's folder where codec is"),
        (["--text.encoder=umt5"], "text.path must name the encoder's folder where encoder is umt5"),
        (
            ["--video.codec=wan_vae", f"--video.vae={tmp_path}/none"],
            "video.vae cannot be used: there is no VAE at",
        ),
        (
            ["--video.codec=wan_vae", f"--video.vae={pipeline}", "--video.channels=16", "--teacher.in_dim=16",
             "--teacher.out_dim=16", "--student.in_dim=16", "--student.out_dim=16"],
            "video.vae makes latents of 4 channels, and channels is 16",
        ),
    ):  # fmt: skip
        assert wanted in refused(capfd, "evaluate", TINY_RECIPE, f"--root={tmp_path}", *settings)


def test_the_pipeline_s_own_folder_is_imported_with_all_it_has(
    student: Path, pipeline: Path, tmp_path: Path
) -> None:
    exported = pipeline / "transformer"
    if not exported.exists():
        assert cli.main(["export", str(student), "--format=diffusers", f"--output={exported}"]) == 0
    small = ["--text_len=32", "--video={frames: 9, channels: 4, height: 4, width: 6}"]
    assert cli.main(["import", str(pipeline), f"--output={tmp_path}/teacher", *small]) == 0
    card, same = ModelDirectory(tmp_path / "teacher").card, ModelDirectory(student).card
    assert not card.causal and card.transformer == SIZES and card.text == same.text
    assert card.video.codec_digest() == same.video.codec_digest() and card.video.fps == 16
    assert Generator(str(tmp_path / "teacher")).codec is not None


@pytest.mark.by_hand
def test_the_suite_measures_frames_of_pixels(
    student: Path, pipeline: Path, ray_cluster: object, tmp_path: Path
) -> None:
    card = ModelDirectory(student).card
    write_model(
        tmp_path / "teacher", SIZES, seed=1, text=card.text, video=replace(card.video, vae=str(pipeline))
    )
    write_student(tmp_path / "outputs" / "distilled" / "model", pipeline, seed=4)
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    sizes = {name: getattr(SIZES, name) for name in ("dim", "ffn_dim", "num_heads", "num_layers", "text_len")}
    arguments = [
        "evaluate", str(TINY_RECIPE), f"--root={tmp_path}", "--evaluate.suite=video", "--evaluate.frames=12",
        "--evaluate.videos=4", "--evaluate.batch=2", f"--evaluate.prompts={tmp_path}/prompts.txt",
        f"--distill.teacher={tmp_path}/teacher", f"--distill.student={student}", "--data.source=null",
        "--video={frames: 9, channels: 4, height: 4, width: 6, codec: wan_vae, vae: " + str(pipeline) + "}",
        "--text={encoder: umt5, path: " + str(pipeline) + "}", f"--student={json.dumps(sizes)}",
        f"--teacher={json.dumps(sizes)}", "--rollout.chunk=3", "--rollout.window=9",
        "--distill.roles.teacher.negative_embedding=unused.safetensors",
    ]  # fmt: skip
    assert cli.main(arguments) == 0
    metrics = json.loads((tmp_path / "outputs" / "evaluation" / "metrics.json").read_text())
    assert metrics["trained_frames"] == FRAMES and metrics["chunk"] == 9
    for name, length in (("teacher", FRAMES), ("initial", 45), ("distilled", 45)):
        row = metrics["rows"][name]
        assert row["frames"] == length
        for metric in ("motion", "out_of_range", "kernel_distance"):
            assert len(row["by_frame"][metric]["value"]) == length
        assert np.isfinite(row["inside"]["out_of_range"]["value"])
    assert metrics["rows"]["distilled"]["beyond"]["out_of_range"]["value"] is not None
