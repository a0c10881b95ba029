"""Compare the product's own code with golden numbers: `python -m tests.golden FILE…`.

A file is recognised by its tensors and metadata (see `tests/golden_data/README.md`). One line a quantity:
file, quantity, relative error `‖ours − golden‖ / ‖golden‖`. Exit code 1 if an error exceeds 1e-4 or a form
is unknown, 0 if everything matches.
"""

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from model.discriminator import BranchConfig, Discriminator
from model.initialization.regression import regression_terms, trajectory_inputs
from model.kv_cache import BlockCache
from model.objectives.dmd import dmd_loss
from model.objectives.flow_matching import flow_matching_loss, timestep_weight
from model.objectives.gan import (
    discriminator_loss,
    generator_loss,
    gradient_penalty,
    relativistic_discriminator_loss,
    relativistic_generator_loss,
)
from model.objectives.sid import sid_loss
from model.replay import replay
from model.rollout import Rollout, generate
from model.rollout_plan import RolloutConfig, RolloutPlan
from model.sampler import guide
from model.schedule import FlowSchedule
from model.score import predict_x0
from model.transformer import TransformerConfig, WanTransformer
from workers.foreign.checkpoint import ForeignCheckpoint

TOLERANCE = 1e-4
VARIANTS = (("constant", "grad_detached."), ("replayed", "grad_detached."), ("released", "grad."))
"""Ways of a rollout's gradient, and the golden tensors that it is to equal."""
Tensors = dict[str, Tensor]
Result = tuple[str, float]
"""A quantity and its relative error."""


def error(ours: Tensor, golden: Tensor) -> float:
    """Relative error in float64; where the golden tensor vanishes, the norm of ours."""
    if ours.shape != golden.shape:
        return float("inf")
    difference = torch.linalg.vector_norm(ours.double() - golden.double())
    norm = torch.linalg.vector_norm(golden.double())
    value = (difference / norm if norm > 0 else difference).item()
    return value if value == value else float("inf")


def sizes_of(meta: dict[str, str]) -> TransformerConfig:
    sizes = json.loads(meta["cfg"])
    known = {field.name for field in fields(TransformerConfig)}
    config = {name: value for name, value in sizes.items() if name in known} | {
        "patch_size": tuple(sizes["patch_size"])
    }
    return TransformerConfig(**config)


def build(tensors: Tensors, meta: dict[str, str], prefix: str) -> WanTransformer:
    """The product's transformer with the file's sizes and the weights under `prefix`."""
    model = WanTransformer(sizes_of(meta))
    model.load_state_dict(select(tensors, prefix))
    return model


def select(tensors: Tensors, prefix: str) -> Tensors:
    return {name[len(prefix) :]: tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def compare_gradients(model: nn.Module, tensors: Tensors, prefix: str) -> Iterator[Result]:
    ours = {name: parameter.grad for name, parameter in model.named_parameters()}
    for name, golden in sorted(select(tensors, prefix).items()):
        gradient = ours[name]
        yield prefix + name, float("inf") if gradient is None else error(gradient, golden)


class Replay:
    """Noise read from a golden file: the first noise of each frame, then the later draws in order."""

    def __init__(self, noise: Tensor, later: Sequence[Tensor]):
        self.noise = noise
        self.later = iter(later)
        self.start = 0

    def draw(self, shape: Sequence[int], chunk: int, step: int) -> Tensor:
        if step > 0:
            return next(self.later).reshape(tuple(shape))
        first, self.start = self.start, self.start + shape[1]
        return self.noise[:, first : self.start]


def rollout_of(
    tensors: Tensors, meta: dict[str, str], variant: str
) -> tuple[WanTransformer, RolloutConfig, Rollout]:
    """The file's model, how it generates, and its rollout, whose gradient is `constant`, `released` or
    `replayed`."""
    output, initial = tensors["output"], tensors.get("initial")
    frames, window, shift = int(meta["frames"]), int(meta["local"]), float(meta.get("shift", 5.0))
    config = RolloutConfig(
        shift=shift,
        steps=tuple(unwarp(tensors["steps"], shift)),
        chunk=int(meta["chunk"]),
        window=None if window < 0 else window,
        sink=int(meta["sink"]),
    )
    model = build(tensors, meta, "sd.")
    wanted = any(name.startswith(("grad.", "grad_detached.")) for name in tensors)
    plan = RolloutPlan(
        frames,
        int(meta["exit_step"]),
        grad_frames=int(meta.get("grad_frames", frames)) if wanted else 0,
        cache_gradient="released" if variant == "released" else "constant",
        replayed=variant == "replayed",
    )
    rollout = Rollout(
        config,
        plan,
        noise=Replay(tensors["noise"], [tensors[name] for name in sorted(tensors) if "renoise." in name]),
        cache=BlockCache(
            config.context_window(), model.config.grid(*output.shape[3:]), model.config.head_dim
        ),
        shape=(output.shape[0], *output.shape[2:]),
        initial=initial,
    )
    return model, config, rollout


def check_rollout(tensors: Tensors, meta: dict[str, str]) -> Iterator[Result]:
    """A rollout, and its gradient with constant and with released cache gradients."""
    for variant, prefix in VARIANTS:
        wanted = bool(select(tensors, prefix))
        if not wanted and variant != "constant":
            continue
        model, config, rollout = rollout_of(tensors, meta, variant)
        if variant == "constant":
            steps = FlowSchedule(config.shift).few_steps(config.steps)
            yield "steps", error(torch.tensor(steps), tensors["steps"])
        chunks = list(generate(model, rollout, tensors["context"]))
        video = torch.cat([tensors["initial"], *chunks] if "initial" in tensors else chunks, dim=1)
        yield f"output ({variant})", error(video.detach(), tensors["output"])
        if wanted:
            cotangent = tensors["cotangent"]
            if variant == "replayed":
                video = replay(model, rollout.tape, tensors["context"], config.context_window())
                cotangent = cotangent[:, -rollout.tape.frames :]
            (video * cotangent).sum().backward()
            yield from compare_gradients(model, tensors, prefix)


def unwarp(timesteps: Tensor, shift: float) -> list[float]:
    """The unwarped few-step list, so that our own warp is put to the test."""
    sigma = timesteps.double() / 1000
    return [round(value, 3) for value in (1000 * sigma / (shift - (shift - 1) * sigma)).tolist()]


def check_regression(tensors: Tensors, meta: dict[str, str]) -> Iterator[Result]:
    """ODE regression under the block-causal mask."""
    model = build(tensors, meta, "sd.")
    schedule = FlowSchedule(float(meta["shift"]))
    noisy, timestep = trajectory_inputs(tensors["trajectory"], tensors["steps"], tensors["index"].long())
    yield "noisy", error(noisy, tensors["noisy"])
    yield "timestep", error(timestep, tensors["timestep"])
    velocity = model(noisy, timestep, tensors["context"], chunk=int(meta["chunk"])).velocity
    x0 = schedule.x0(velocity, noisy, timestep)
    total, count = regression_terms(x0, tensors["trajectory"][:, -1], timestep)
    loss = total / count
    yield "velocity", error(velocity, tensors["velocity"])
    yield "x0", error(x0, tensors["x0"])
    yield "loss", error(loss.reshape(1), tensors["loss"])
    loss.backward()
    yield from compare_gradients(model, tensors, "grad.")


def check_teacher_forcing(tensors: Tensors, meta: dict[str, str]) -> Iterator[Result]:
    """Weighted flow matching under teacher forcing."""
    model = build(tensors, meta, "sd.")
    schedule = FlowSchedule(float(meta["shift"]))
    x0, noise, timestep = tensors["clean"], tensors["noise"], tensors["timestep"]
    noisy = schedule.add_noise(x0, noise, timestep)
    velocity = model(noisy, timestep, tensors["context"], chunk=int(meta["chunk"]), clean=x0).velocity
    weight = timestep_weight(timestep, schedule)
    loss = flow_matching_loss(velocity, noise, x0, weight)
    yield "noisy", error(noisy, tensors["noisy"])
    yield "velocity", error(velocity, tensors["velocity"])
    yield "x0", error(schedule.x0(velocity, noisy, timestep), tensors["x0"])
    yield "weight", error(weight, tensors["weight"])
    yield "loss", error(loss.reshape(1), tensors["loss"])
    loss.backward()
    yield from compare_gradients(model, tensors, "grad.")


def check_objectives(tensors: Tensors, meta: dict[str, str]) -> Iterator[Result]:
    """Scores, DMD, SiD and the critic's loss."""
    teacher, critic = build(tensors, meta, "real."), build(tensors, meta, "fake.")
    schedule = FlowSchedule(float(meta["shift"]))
    video = tensors["video"].requires_grad_()
    timestep = tensors["timestep"][:, 0]
    noisy = schedule.add_noise(video, tensors["noise"], timestep)
    yield "noisy", error(noisy, tensors["noisy"])
    cond = predict_x0(teacher, noisy, timestep, tensors["cond"], schedule)
    uncond = predict_x0(teacher, noisy, timestep, tensors["uncond"], schedule)
    fake = predict_x0(critic, noisy, timestep, tensors["cond"], schedule)
    yield "real_x0_cond", error(cond, tensors["real_x0_cond"])
    yield "real_x0_uncond", error(uncond, tensors["real_x0_uncond"])
    yield "fake_x0", error(fake, tensors["fake_x0"])
    real = guide(cond, uncond, float(meta["guidance"]))
    for name, loss in (
        ("dmd", dmd_loss(video, real, fake)),
        ("sid", sid_loss(video, real, fake, float(meta["sid_alpha"]))),
    ):
        yield f"{name}.loss", error(loss.reshape(1), tensors[f"{name}.loss"])
        (gradient,) = torch.autograd.grad(loss, video, retain_graph=True)
        yield f"{name}.grad", error(gradient, tensors[f"{name}.grad"])
    velocity = critic(noisy.detach(), timestep, tensors["cond"]).velocity
    critic_loss = flow_matching_loss(velocity, tensors["noise"], video.detach())
    critic_loss.backward()
    yield "critic.loss", error(critic_loss.reshape(1), tensors["critic.loss"])
    yield from compare_gradients(critic, tensors, "critic.grad.")


def check_gan(tensors: Tensors, meta: dict[str, str]) -> Iterator[Result]:
    """The adversarial losses of both sides and their gradients."""
    branch = BranchConfig(
        tuple(json.loads(meta["taps"])), int(meta["num_class"]), json.loads(meta["concat_time"])
    )
    model = Discriminator(WanTransformer(sizes_of(meta)), branch)
    model.transformer.load_state_dict(select(tensors, "sd."))
    model.branch.load_state_dict(select(tensors, "branch."))
    schedule, timestep = FlowSchedule(float(meta["shift"])), tensors["timestep"][:, 0]
    video, data = tensors["video"].requires_grad_(), tensors["real"]

    def noised(x0: Tensor, noise: str) -> Tensor:
        return schedule.add_noise(x0, tensors[noise], timestep)

    def logit(x_t: Tensor) -> Tensor:
        return model(x_t, timestep, tensors["context"])[1]

    fake, real = logit(noised(video, "g.noise_fake")), logit(noised(data, "g.noise_real"))
    yield "g.logit_fake", error(fake, tensors["g.logit_fake"])
    yield "g.logit_real", error(real, tensors["g.logit_real"])
    for name, mean in (("g", generator_loss(fake)), ("g_rel", relativistic_generator_loss(fake, real))):
        loss = float(meta["g_weight"]) * mean
        yield f"{name}.loss", error(loss.reshape(1), tensors[f"{name}.loss"])
        (gradient,) = torch.autograd.grad(loss, video, retain_graph=True)
        yield f"{name}.grad", error(gradient, tensors[f"{name}.grad"])

    noisy_fake, noisy_real = noised(video.detach(), "d.noise"), noised(data, "d.noise")
    fake, real = logit(noisy_fake), logit(noisy_real)
    yield "d.logit_fake", error(fake, tensors["d.logit_fake"])
    yield "d.logit_real", error(real, tensors["d.logit_real"])
    plain = float(meta["d_weight"]) * discriminator_loss(fake, real)
    total = relativistic = float(meta["d_weight"]) * relativistic_discriminator_loss(fake, real)
    yield "d.loss", error(plain.reshape(1), tensors["d.loss"])
    yield "d_rel.loss", error(relativistic.reshape(1), tensors["d_rel.loss"])
    for name, x_t, before in (("r1", noisy_real, real), ("r2", noisy_fake, fake)):
        sigma = float(meta[f"{name}_sigma"])
        perturbed = logit(x_t + sigma * tensors[f"{name}.noise"])
        penalty = float(meta[f"{name}_weight"]) * gradient_penalty(perturbed, before, sigma)
        yield f"{name}.logit", error(perturbed, tensors[f"{name}.logit"])
        yield f"{name}.loss", error(penalty.reshape(1), tensors[f"{name}.loss"])
        total = total + 0.5 * penalty
    for prefix, loss in (("d.grad.", plain), ("total.grad.", total)):
        model.zero_grad()
        loss.backward(retain_graph=True)
        yield from compare_gradients(model.transformer, tensors, prefix + "sd.")
        yield from compare_gradients(model.branch, tensors, prefix + "branch.")


def check_diffusers(tensors: Tensors, meta: dict[str, str]) -> Iterator[Result]:
    """A bidirectional model whose weights have diffusers' names."""
    weights = {name.removeprefix("sd."): tensor for name, tensor in tensors.items() if name.startswith("sd.")}
    with TemporaryDirectory() as folder:
        save_file(weights, f"{folder}/diffusion_pytorch_model.safetensors")
        config = json.loads(meta["cfg"]) | {"_class_name": "WanTransformer3DModel"}
        Path(folder, "config.json").write_text(json.dumps(config))
        context = tensors["encoder_hidden_states"]
        source = ForeignCheckpoint(folder, text_len=context.shape[1])
        model = WanTransformer(source.sizes)
        model.load_state_dict({name: source.get(name) for name in source.keys()})  # noqa: SIM118
    with torch.no_grad():
        x = tensors["hidden_states"].transpose(1, 2)
        velocity = model(x, tensors["timestep"], context).velocity.transpose(1, 2)
    yield "output", error(velocity, tensors["output"])


Check = Callable[[Tensors, dict[str, str]], Iterator[Result]]


def form(tensors: Tensors, meta: dict[str, str]) -> Check | None:
    """The check for a file, by the tensors it holds."""
    forms: list[tuple[set[str], set[str], Check]] = [
        ({"noise", "context", "steps", "output"}, {"chunk", "exit_step", "local", "sink"}, check_rollout),
        ({"trajectory", "steps", "index", "loss"}, {"chunk", "shift"}, check_regression),
        (
            {"video", "noise", "timestep", "cond", "uncond", "dmd.loss"},
            {"guidance", "shift"},
            check_objectives,
        ),
        ({"clean", "noise", "timestep", "weight", "loss"}, {"chunk", "shift"}, check_teacher_forcing),
        ({"video", "real", "d.loss", "g.loss"}, {"taps", "shift"}, check_gan),
        ({"hidden_states", "encoder_hidden_states", "output"}, {"cfg"}, check_diffusers),
    ]
    for names, keys, check in forms:
        if names <= tensors.keys() and keys <= meta.keys() and "cfg" in meta:
            return check
    return None


def read(path: Path) -> tuple[Tensors, dict[str, str]]:
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118


def check_file(path: Path) -> Iterator[Result]:
    """Every quantity of one file; ValueError where its form is unknown."""
    tensors, meta = read(path)
    check = form(tensors, meta)
    if check is None:
        raise ValueError("unknown form")
    yield from check(tensors, meta)


def main(paths: Sequence[str]) -> int:
    if not paths:
        print("usage: python -m tests.golden FILE…", file=sys.stderr)
        return 2
    failed = False
    for path in map(Path, paths):
        try:
            for quantity, value in check_file(path):
                verdict = "" if value <= TOLERANCE else "  FAILED"
                print(f"{path.name} {quantity} {value:.2e}{verdict}")
                failed |= bool(verdict)
        except Exception as problem:
            print(f"{path.name} {type(problem).__name__}: {problem}  FAILED")
            failed = True
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
