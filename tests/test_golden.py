"""The golden numbers, and that the comparison can fail."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from model.noise import SampleNoise
from model.rollout_plan import RolloutConfig, RolloutPlan
from model.schedule import FlowSchedule
from tests import golden
from tests.model import reference

DATA = Path(__file__).parent / "golden_data"
COVERED = {
    "causal_forward_ode",
    "causal_forward_teacher",
    "diffusers_wan",
    "gan",
    "objectives",
    "rollout_chunk",
    "rollout_image",
    "rollout_long",
    "rollout_window_sink",
}
INPUT = re.compile(
    r"(sd|branch|real|fake|renoise)\..*|.*\bnoise(_fake|_real)?|initial|cotangent|trajectory|index|clean|video|real"
    r"|context|cond|uncond|timestep|steps|hidden_states|encoder_hidden_states"
)
"""What an algorithm is given; everything else in a file is a result."""


def load(name: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    with safe_open(DATA / f"{name}.safetensors", "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118


def compare(path: Path, tensors: dict[str, Tensor], meta: dict[str, str]) -> int:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, meta)
    return golden.main([str(path)])


def test_every_file_is_known_to_these_tests() -> None:
    assert {path.stem for path in DATA.glob("*.safetensors")} == COVERED


@pytest.mark.parametrize("name", sorted(COVERED))
def test_numbers_match(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert golden.main([str(DATA / f"{name}.safetensors")]) == 0
    lines = capsys.readouterr().out.splitlines()
    number = r"\d\.\d\de[-+]\d\d"
    assert all(re.fullmatch(rf"{name}\.safetensors \S.* {number}", line) for line in lines)
    # No result in the file is passed over.
    compared = {line.split(" ")[1] for line in lines}
    assert compared >= {key for key in load(name)[0] if not INPUT.fullmatch(key)}


def test_no_file_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert golden.main([]) == 2
    assert "usage" in capsys.readouterr().err


def test_a_file_is_known_by_what_it_holds(tmp_path: Path) -> None:
    assert compare(tmp_path / "gan.safetensors", *load("rollout_image")) == 0
    assert compare(tmp_path / "rollout_chunk.safetensors", *load("diffusers_wan")) == 0


def spoil(tensor: Tensor) -> Tensor:
    """Off by three parts in ten thousand, in norm."""
    wrong = tensor.clone().flatten()
    wrong[wrong.abs().argmax()] += 3e-4 * tensor.norm()
    return wrong.reshape(tensor.shape)


@pytest.mark.parametrize(
    ("name", "quantity"),
    [
        ("rollout_image", "output"),
        ("rollout_image", "grad.blocks.1.self_attn.k.bias"),
        ("rollout_image", "grad_detached.text_embedding.0.weight"),
        ("causal_forward_ode", "grad.head.modulation"),
        ("causal_forward_ode", "loss"),
        ("objectives", "dmd.grad"),
        ("objectives", "critic.loss"),
        ("objectives", "sid.grad"),
        ("causal_forward_teacher", "weight"),
        ("causal_forward_teacher", "velocity"),
        ("causal_forward_teacher", "grad.blocks.2.self_attn.v.weight"),
        ("diffusers_wan", "output"),
        ("gan", "g_rel.grad"),
        ("gan", "r2.loss"),
        ("gan", "d.grad.sd.blocks.0.ffn.0.weight"),
        ("gan", "total.grad.branch.register_tokens.register_tokens"),
    ],
)
def test_a_number_that_is_off_is_found(
    name: str, quantity: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors, meta = load(name)
    tensors[quantity] = spoil(tensors[quantity])
    assert compare(tmp_path / "spoiled.safetensors", tensors, meta) == 1
    failed = [line for line in capsys.readouterr().out.splitlines() if line.endswith("FAILED")]
    # The output of a rollout is compared once for each kind of gradient.
    assert failed and all(line.split(" ")[1] == quantity for line in failed)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_none_are_found(value: float, tmp_path: Path) -> None:
    tensors, meta = load("rollout_image")
    tensors["output"][0, 1, 0, 0, 0] = value
    assert compare(tmp_path / "file.safetensors", tensors, meta) == 1


def without_output(tensors: dict[str, Tensor], meta: dict[str, str]) -> None:
    del tensors["output"]


def without_sizes(tensors: dict[str, Tensor], meta: dict[str, str]) -> None:
    del meta["cfg"]


@pytest.mark.parametrize("damage", [without_output, without_sizes])
def test_an_unknown_form_fails(
    damage: Callable[[dict[str, Tensor], dict[str, str]], None],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    tensors, meta = load("rollout_image")
    damage(tensors, meta)
    assert compare(tmp_path / "rollout_image.safetensors", tensors, meta) == 1
    assert "unknown form" in capsys.readouterr().out


def test_what_is_no_golden_file_fails_but_stops_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.safetensors"
    text.write_text("no tensors here")
    later = DATA / "diffusers_wan.safetensors"
    assert golden.main([str(text), str(tmp_path / "absent.safetensors"), str(later)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.endswith("FAILED") for line in lines[:3]] == [True, True, False]


@pytest.mark.parametrize(
    ("config", "frames", "exit_step", "batch", "given"),
    [
        (RolloutConfig(chunk=1, window=3, sink=1), 6, 0, 2, 0),
        (RolloutConfig(chunk=2, window=5, sink=1), 8, 3, 1, 0),
        (RolloutConfig(chunk=4), 8, 1, 3, 0),
        (RolloutConfig(chunk=2), 8, 1, 2, 2),
    ],
)
def test_other_sizes_seeds_and_windows_match_too(
    config: RolloutConfig, frames: int, exit_step: int, batch: int, given: int, tmp_path: Path
) -> None:
    """Golden files that a naive rollout writes, in the published form but with other numbers."""
    model, context = reference.tiny_model(seed=5), reference.prompt(batch)
    noise = SampleNoise([(9, "golden", sample) for sample in range(batch)])
    size = (reference.CONFIG.in_dim, reference.HEIGHT, reference.WIDTH)
    initial = reference.normal(batch, given, *size, seed=8) if given else None
    tensors = {f"sd.{name}": weight for name, weight in model.state_dict().items()}
    for kind, prefix in (("constant", "grad_detached."), ("released", "grad.")):
        plan = RolloutPlan(frames, exit_step, grad_frames=frames, cache_gradient=kind)
        made = reference.rollout(model, config, plan, context=context, noise=noise, initial=initial)
        cotangent = reference.normal(*made.video.shape, seed=4)
        model.zero_grad()
        (made.video * cotangent).sum().backward()
        tensors |= {prefix + name: weight.grad.clone() for name, weight in model.named_parameters()}
    chunks = range(given // config.chunk, frames // config.chunk)
    tensors |= {
        "noise": torch.cat([noise.draw((batch, config.chunk, *size), chunk, 0) for chunk in chunks], 1),
        "context": context,
        "steps": torch.tensor(FlowSchedule(5.0).few_steps(config.steps)),
        "output": made.video.detach(),
        "cotangent": cotangent,
    }
    tensors |= {f"renoise.{index:03d}": draw.flatten(0, 1) for index, draw in enumerate(made.draws)}
    if initial is not None:
        tensors["initial"] = initial
    meta = {
        "cfg": json.dumps(vars(reference.CONFIG)),
        "frames": str(frames),
        "chunk": str(config.chunk),
        "exit_step": str(exit_step),
        "local": str(config.window or -1),
        "sink": str(config.sink),
    }
    path = tmp_path / "file.safetensors"
    assert compare(path, {name: tensor.detach() for name, tensor in tensors.items()}, meta) == 0
    meta["exit_step"] = str((exit_step + 1) % 4)
    assert compare(path, {name: tensor.detach() for name, tensor in tensors.items()}, meta) == 1
