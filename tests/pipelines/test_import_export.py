"""`import` and `export`: another tool's checkpoint becomes a model, and a model another tool's."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from infra import storage
from model import umt5
from model.adapters import AdapterConfig, peft_layout
from model.rollout_plan import RolloutConfig
from model.schedule import FlowSchedule
from model.transformer import TransformerConfig
from model.wan_names import to_diffusers
from pipelines import cli
from pipelines.import_model import adopt
from pipelines.recipe import PRESETS
from tests.fixtures import TINY_RECIPE, random_weights, write_model
from tests.wan import Weights, write_pipeline, write_release
from workers.foreign.writer import write
from workers.model_directory import ModelDirectory, TextConfig, VideoConfig, save

pytestmark = pytest.mark.slow
SIZES = TransformerConfig(
    dim=24, ffn_dim=48, num_heads=2, num_layers=2, in_dim=4, out_dim=4, text_len=8, text_dim=16, freq_dim=32
)
SMALL = ["--heads=2", "--text_len=8", "--video={channels: 4, height: 8, width: 8}"]
"""What a Wan model need not be told."""
ROLLOUT = RolloutConfig(steps=(1000, 500), chunk=3, window=9, sink=3, positions="relative")


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    return random_weights(SIZES, 4)


@pytest.fixture
def published(tmp_path: Path, weights: dict[str, Tensor]) -> Path:
    """A student as Self Forcing's are published."""
    average = {f"model.{name}": tensor for name, tensor in weights.items()}
    plain = {name: torch.zeros_like(tensor) for name, tensor in average.items()}
    torch.save({"generator": plain, "generator_ema": average, "critic": plain}, tmp_path / "student.pt")
    return tmp_path / "student.pt"


@pytest.fixture
def student(tmp_path: Path, weights: dict[str, Tensor]) -> Path:
    """A student of ours."""
    video = VideoConfig(frames=9, codec="none")
    write_model(
        tmp_path / "student", SIZES, seed=4, rollout=ROLLOUT, video=video, text=TextConfig("embedded"),
        weights=weights, recipe={"distill": {"iterations": 7}},
    )  # fmt: skip
    return tmp_path / "student"


def run(*arguments: object) -> None:
    assert cli.main([str(argument) for argument in arguments]) == 0


def refused(capfd: pytest.CaptureFixture[str], *arguments: object) -> str:
    capfd.readouterr()
    assert cli.main([str(argument) for argument in arguments]) == 2
    said = capfd.readouterr().err
    assert said.count("\n") == 1 and "Traceback" not in said
    return said


def same(source: Any, weights: dict[str, Tensor]) -> bool:
    return set(source.keys()) == set(weights) and all(
        torch.equal(source.get(name), tensor) for name, tensor in weights.items()
    )


@pytest.mark.parametrize("preset", sorted(file.stem for file in PRESETS.glob("*.yaml")))
def test_each_preset_makes_a_model(
    preset: str, published: Path, weights: dict[str, Tensor], tmp_path: Path
) -> None:
    run("import", published, f"--preset={preset}", f"--output={tmp_path}/model", *SMALL)
    model = ModelDirectory(tmp_path / "model")
    assert same(model, weights) and model.card.transformer == SIZES
    assert model.card.video == VideoConfig(21, 4, 8, 8, codec="none", fps=16)
    assert model.card.text.encoder == "embedded"
    assert model.card.origin["preset"] == preset and "arXiv" in model.card.origin["cite"]
    assert model.card.origin["path"] == str(published)
    rollout = model.card.rollout
    assert model.card.causal == (rollout is not None) == (preset != "wan-bidirectional")
    if rollout is not None:
        assert rollout.chunk == (1 if "framewise" in preset else 3)
        assert (rollout.window, rollout.sink) == ((12, 3) if preset == "longlive" else (None, 0))
        assert len(rollout.steps) == (3 if preset == "causvid" else 4)


def test_a_folder_of_the_release_brings_its_vae_and_its_encoder(
    weights: dict[str, Tensor], tmp_path: Path
) -> None:
    release = tmp_path / "release"
    release.mkdir()
    sizes = replace(SIZES, in_dim=16, out_dim=16)
    write(Weights(random_weights(sizes, 4)), sizes, release, "wan", causal=False, dtype=None, save=save)
    write_release(release, write_pipeline(tmp_path / "pipeline"))
    size = "--video={height: 8, width: 8}"
    run("import", release, "--preset=wan-bidirectional", f"--output={tmp_path}/model", "--heads=2", size)
    model = ModelDirectory(tmp_path / "model")
    assert model.card.video.codec == "wan_vae" and model.card.text == TextConfig("umt5", str(release))
    assert model.card.video.codec_digest() == replace(model.card.video, vae=str(release)).codec_digest()
    assert model.text_digest() == model.card.text_digest == umt5.digest(str(release))
    assert model.text_encoder().encode(["a six"]).any()


def test_settings_go_on_top_of_a_preset(
    published: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    own = ("--rollout.window=9", "--preset=self-forcing", "--rollout.positions=relative")
    run("import", published, *own, f"--output={tmp_path}/model", *SMALL)
    card = ModelDirectory(tmp_path / "model").card
    assert card.rollout == RolloutConfig(window=9, positions="relative") and card.causal
    assert card.origin["untrained"] == {"window": None, "positions": "absolute"}
    said = " ".join(capfd.readouterr().out.split())
    assert "rollout.window is 9, and the model was trained with None; its videos may be worse" in said
    # It is said again where it is served; this one cannot be, for want of a codec.
    assert cli.main(["serve", f"--model={tmp_path}/model"]) == 2
    shown, refused = (" ".join(text.split()) for text in capfd.readouterr())
    assert "serve: rollout.positions is relative, and the model was trained with absolute" in shown
    assert "video.codec none; its latents cannot be shown" in refused
    assert card.dtype == "bf16"  # in which Wan runs, whatever its files are in
    run("import", published, *own, "--dtype=fp32", f"--output={tmp_path}/wide", *SMALL)
    assert ModelDirectory(tmp_path / "wide").card.dtype == "fp32"


def test_causvid_s_steps_are_those_that_it_publishes(published: Path, tmp_path: Path) -> None:
    run("import", published, "--preset=causvid", f"--output={tmp_path}/model", *SMALL)
    rollout = ModelDirectory(tmp_path / "model").card.rollout
    assert rollout is not None and rollout.shift == 8
    assert FlowSchedule(rollout.shift).few_steps(rollout.steps) == pytest.approx([1000, 757, 522])


def test_a_student_that_says_nothing_is_asked(
    published: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    said = refused(capfd, "import", published, f"--output={tmp_path}/model", "--heads=2")
    assert "does not say whether it is causal; name a --preset (causal-forcing, " in said
    folder = tmp_path / "folder"
    folder.mkdir()
    write(ModelDirectory(_student(tmp_path)), SIZES, folder, "wan", causal=True, dtype=None, save=save)
    assert "does not say how it generates; name a --preset" in refused(
        capfd, "import", folder, f"--output={tmp_path}/model"
    )
    assert not (tmp_path / "model").exists()


def _student(tmp_path: Path) -> Path:
    write_model(tmp_path / "own", SIZES, seed=4, rollout=ROLLOUT, text=TextConfig("embedded"))
    return tmp_path / "own"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--preset=self-forging"], "there is no preset 'self-forging'; name a YAML file or one of causal-f"),
        (["--preset=self-forcing", "--rollout.chunk=4"], "chunk of 4 does not divide 21 frames"),
        (["--preset=self-forcing", "--video.channels=16"], "video.channels is 16, and the model at"),
        (["--preset=self-forcing", "--video.height=9"], "does not divide latent frames of 9x8"),
        (["--preset=self-forcing", "--text.encoder=bytes"], "brings no such encoder; use umt5, or embedded"),
        (["--preset=self-forcing", "--part=teacher"], "has no part teacher; it has generator_ema"),
        (["--preset=self-forcing", "--heads=5"], "24 does not give 5 heads of an even size"),
        (["--preset=self-forcing", "--adapter=none.safetensors"], "there is no adapter at"),
    ],
)
def test_mistakes_are_one_sentence(
    arguments: list[str], said: str, published: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    where = f"--output={tmp_path}/model"
    assert said in refused(capfd, "import", published, where, *SMALL, *arguments)
    assert not (tmp_path / "model").exists()


def test_a_model_of_ours_needs_no_import(
    student: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    said = refused(capfd, "import", student, f"--output={tmp_path}/model", "--preset=self-forcing")
    assert f"{student} is a model of this project already" in said


@pytest.mark.parametrize("format", ["diffusers", "wan", "pt"])
def test_what_goes_out_comes_in_the_same(
    format: str, student: Path, weights: dict[str, Tensor], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    run("export", student, f"--format={format}", f"--output={out}")
    readme = (out / "README.md").read_text()
    assert "**It is causal.**" in readme and "sink: 3" in readme and "iterations: 7" in readme
    if format == "diffusers":
        loaded = WanTransformer3DModel.from_pretrained(out).state_dict()
        assert same(ModelDirectory(student), weights) and set(loaded) == set(map(to_diffusers, weights))
    source = out / "model.pt" if format == "pt" else out
    own = {"steps": ROLLOUT.steps, "window": 9, "sink": 3, "positions": "relative"}
    rollout = f"--rollout={json.dumps(own)}"
    small = [*SMALL[:2], "--video={frames: 9, channels: 4, height: 8, width: 8, fps: 8}"]
    run("import", source, "--causal=true", rollout, f"--output={tmp_path}/again", *small)
    again, card = ModelDirectory(tmp_path / "again"), ModelDirectory(student).card
    assert same(again, weights)
    assert (again.card.rollout, again.card.transformer, again.card.video) == (ROLLOUT, SIZES, card.video)


def test_adapters_go_out_and_come_in_on_top_of_a_base(
    student: Path, weights: dict[str, Tensor], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert "has no adapter" in refused(capfd, "export", student, "--format=peft", f"--output={tmp_path}/a")
    config = AdapterConfig(rank=2, alpha=3)
    generator = torch.Generator().manual_seed(1)
    low = {
        "blocks.0.ffn.0.lora_A": torch.randn(2, 24, generator=generator),
        "blocks.0.ffn.0.lora_B": torch.randn(48, 2, generator=generator),
    }
    tensors, settings = peft_layout(low, config, "base")
    with_adapter = tmp_path / "adapted"
    staging = storage.begin(with_adapter)
    for file in student.iterdir():
        if file.name != "manifest.json":
            Path(staging, file.name).write_bytes(file.read_bytes())
    Path(staging, "adapter").mkdir()
    save_file(tensors, Path(staging, "adapter", "adapter_model.safetensors"))
    Path(staging, "adapter", "adapter_config.json").write_text(json.dumps(settings))
    storage.publish(staging, with_adapter, {})
    run("export", with_adapter, "--format=peft", f"--output={tmp_path}/lora")
    names = load_file(tmp_path / "lora" / "pytorch_lora_weights.safetensors").keys()
    assert set(names) == {f"transformer.blocks.0.ffn.net.0.proj.lora_{side}.weight" for side in "AB"}
    run("export", student, "--format=pt", f"--output={tmp_path}/base")
    run(
        "import", tmp_path / "base" / "model.pt", f"--adapter={tmp_path}/lora", "--preset=self-forcing",
        f"--output={tmp_path}/merged", *SMALL,
    )  # fmt: skip
    merged = ModelDirectory(tmp_path / "merged")
    name = "blocks.0.ffn.0.weight"
    wanted = weights[name] + 1.5 * low["blocks.0.ffn.0.lora_B"] @ low["blocks.0.ffn.0.lora_A"]
    assert torch.allclose(merged.get(name), wanted, atol=1e-6)
    assert same(merged, weights | {name: merged.get(name)})


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--format=onnx"], "--format is onnx; use diffusers, wan, pt, peft."),
        (["--format=pt", "--dtype=fp8"], "--dtype is fp8; use fp32, bf16."),
        (["--format=pt", "--weights=best"], "--weights is best; use average, current."),
        (["--format=pt", "--weights=average"], "--weights is for checkpoints"),
    ],
)
def test_mistakes_of_export_are_one_sentence(
    arguments: list[str], said: str, student: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert said in refused(capfd, "export", student, f"--output={tmp_path}/out", *arguments)
    assert not (tmp_path / "out").exists()


def test_an_export_replaces_only_an_export(
    student: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    run("export", student, "--format=wan", f"--output={out}")
    run("export", student, "--format=pt", f"--output={out}")
    assert (out / "model.pt").exists() and not (out / "config.json").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("words")
    said = refused(capfd, "export", student, "--format=pt", f"--output={tmp_path}/mine")
    assert "is there already; name a place where nothing is" in said
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "words"


@pytest.fixture
def folder(tmp_path: Path, weights: dict[str, Tensor]) -> Path:
    """A diffusers folder of a bidirectional model."""
    write_model(tmp_path / "base", SIZES, seed=4, weights=weights, text=TextConfig("embedded"))
    (tmp_path / "wan").mkdir()
    base = ModelDirectory(tmp_path / "base")
    write(base, SIZES, tmp_path / "wan", "diffusers", causal=False, dtype=None, save=save)
    return tmp_path / "wan"


def config_of(tmp_path: Path, teacher: Path) -> Any:
    arguments = [
        str(TINY_RECIPE), f"--root={tmp_path}", f"--distill.teacher={teacher}", "--video.codec=none",
        "--text.encoder=embedded", "--distill.roles.teacher.negative_embedding=negative.safetensors",
        "--data.source=null", f"--initialize.teacher={tmp_path}/none",
    ]  # fmt: skip
    return cli.parse("run", arguments)[0].located()


def test_a_recipe_names_a_folder_of_diffusers(
    folder: Path, weights: dict[str, Tensor], tmp_path: Path
) -> None:
    config = config_of(tmp_path, folder)
    adopted = adopt(config)
    assert adopted.initialize == config.initialize  # nothing is there
    model = ModelDirectory(adopted.distill.teacher)
    assert same(model, weights) and not model.card.causal and model.card.video == config.video
    assert not list(Path(model.path).glob("*.safetensors"))
    assert adopt(config) == adopted == adopt(adopted)

    shard = next(folder.glob("*.safetensors"))
    save_file({name: tensor + 1 for name, tensor in load_file(shard).items()}, shard)
    with pytest.raises(ValueError, match=re.escape(f"whose {shard.name} is gone or was changed since")):
        ModelDirectory(adopted.distill.teacher)


def test_a_recipe_cannot_name_what_must_be_imported(published: Path, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^distill\.teacher: .*does not say how many attention heads"):
        adopt(config_of(tmp_path, published))
    next(folder.glob("*.safetensors")).write_bytes(b"short")
    with pytest.raises(ValueError, match=r"^distill\.teacher: .* is damaged"):
        adopt(config_of(tmp_path, folder))
