"""What Wan's real size takes of a GPU: `python -m tests.benchmarks.wan`; `--quick` is small, for a CPU.

A model with random weights is written in the release's layout, imported, distilled with adapters for a few
iterations by the recipe `wan-1.3b-lora` with its three roles on one GPU, and played. What each role took
stands beside what the planner says. Speed and memory do not depend on the weights.
"""

import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from diffusers import AutoencoderKLWan
from jsonargparse import ArgumentParser
from mlflow import MlflowClient
from safetensors.torch import save_file

from infra.provenance import git_commit, versions
from model.codec import Codec
from model.light_vae import LightDecoder
from model.wan_vae import WanVae
from orchestrator.planner import GIB, plan
from pipelines import cli
from pipelines.console import say
from tests.wan import RandomWeights, write_light_decoder, write_umt5
from workers.build import whole
from workers.dataset import dataset_schema, encode_tensor, tensor_fields
from workers.foreign.writer import write
from workers.model_directory import ModelDirectory, save
from workers.streamer import Streamer

LATENTS = {"codec": "none", "vae": None}
SMALL = {"dim": 128, "ffn_dim": 256, "num_heads": 2, "num_layers": 2}
CUDA = torch.cuda.is_available()


@dataclass(frozen=True)
class Settings:
    """What is measured, and how thoroughly."""

    out: str = "docs/results/wan-1.3b"
    """Results are written here, with .json and .md at the end."""
    height: int = 60
    """Latent rows."""
    width: int = 104
    """Latent columns."""
    iterations: int = 3
    """Of the distillation; the first is left out of the times."""
    viewers: tuple[int, ...] = (1, 2, 4)
    """Streams at once."""
    chunks: int = 6
    """Chunks that are timed of each stream, once its window is full."""
    parts: tuple[str, ...] = ("rounding", "decoders", "streams", "training")
    """What is measured."""
    small: bool = False
    """A network of two narrow layers and a small VAE."""


QUICK = Settings(out="outputs/wan-quick", height=8, width=8, viewers=(1, 2), chunks=1, small=True)


def lineage(settings: Settings, scratch: Path) -> dict[str, Any]:
    """The recipe's settings for a run in `scratch`, whose models and data are written there."""
    (recipe, _) = cli.parse("plan", ["wan-1.3b-lora"])
    sizes = replace(recipe.student, **SMALL) if settings.small else recipe.student
    release = scratch / "release"
    release.mkdir()
    write(RandomWeights(sizes), sizes, release, "wan", causal=False, dtype=None, save=save)
    torch.manual_seed(0)
    vae = {"base_dim": 8, "num_res_blocks": 1} if settings.small else {}
    AutoencoderKLWan(**vae).save_pretrained(scratch / "pipeline" / "vae")
    write_umt5(scratch / "pipeline", sizes.text_dim)
    shape = {"height": settings.height, "width": settings.width}
    video = {"frames": 21, "channels": 16, "fps": 16, **shape}
    heads = f"--heads={sizes.num_heads}"
    causal = ["--preset=self-forcing", "--rollout.window=18", "--rollout.positions=relative"]
    seen = json.dumps({**video, "codec": "wan_vae", "vae": f"{scratch}/pipeline/vae"})
    told = json.dumps({"encoder": "umt5", "path": f"{scratch}/pipeline"})
    models = {"teacher": ["--preset=wan-bidirectional"], "student": causal}
    models |= {
        f"player-{dtype}": [*causal, f"--video={seen}", f"--text={told}", f"--dtype={dtype}"]
        for dtype in ("bf16", "fp32")
        if "streams" in settings.parts
    }
    latents = f"--video={json.dumps({**video, 'codec': 'none'})}"
    for name, how in models.items():
        assert cli.main(["import", str(release), f"--output={scratch}/{name}", latents, heads, *how]) == 0
    rows = [encode_tensor("embedding", torch.randn(200, sizes.text_dim).bfloat16()) for _ in range(8)]
    (scratch / "prompts").mkdir()
    schema = dataset_schema(tensor_fields("embedding"), kind="prompts", provenance={})
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), scratch / "prompts" / "0.parquet")
    save_file({"embedding": torch.randn(100, sizes.text_dim).bfloat16()}, scratch / "negative.safetensors")
    one = {"threads": 4, "engine": {"accumulation": 1}}
    roles = {
        "student": dict(one),
        "critic": dict(one),
        "teacher": {"negative_embedding": "negative.safetensors"},
    }
    if not CUDA:
        roles = {name: {**role, "gpus": 0, "cpus": 0.5, "threads": 1} for name, role in roles.items()}
    of = {
        "dim": sizes.dim,
        "ffn_dim": sizes.ffn_dim,
        "num_heads": sizes.num_heads,
        "num_layers": sizes.num_layers,
    }
    return {
        "base": "wan-1.3b-lora", "root": str(scratch), "data": {"train": "prompts"},
        "video": {**shape, **LATENTS}, "text": {"encoder": "embedded", "path": None},
        "teacher": of, "student": of,
        "distill": {
            "teacher": "teacher", "student": "student", "critic": "teacher", "output": "run", "roles": roles,
            "iterations": settings.iterations, "student_every": 1, "batch": 1, "checkpoint_every": 1000,
        },
    }  # fmt: skip


@contextmanager
def timed() -> Iterator[list[float]]:
    """Appends the seconds that the block and what it asked of the device took."""
    seconds: list[float] = []
    synchronize()
    began = time.perf_counter()
    yield seconds
    synchronize()
    seconds.append(time.perf_counter() - began)


def synchronize() -> None:
    if CUDA:
        torch.cuda.synchronize()


def memory() -> float | None:
    """The most that was allocated on the device since the last call, in GiB; none without one."""
    if not CUDA:
        return None
    most = torch.cuda.max_memory_allocated() / GIB
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return most


def training(scratch: Path, recipe: dict[str, Any]) -> list[dict[str, Any]]:
    """The distillation by command: each role's memory and the median seconds of its verbs."""
    path = scratch / "recipe.yaml"
    path.write_text(json.dumps(recipe))
    with timed() as seconds:
        assert cli.main(["distill", str(path)]) == 0
    say(f"distill took {seconds[0]:.0f} s in all")
    (config, _) = cli.parse("distill", [str(path)])
    client = MlflowClient(f"sqlite:///{scratch}/outputs/mlflow.db")
    experiments = [each.experiment_id for each in client.search_experiments()]
    (run,) = client.search_runs(experiments)
    found = []
    for rank in plan(config):
        history = {
            name: [point.value for point in client.get_metric_history(run.info.run_id, name)]
            for name in run.data.metrics
            if name.startswith((f"seconds/{rank.role}_", f"memory/{rank.role}"))
        }
        seconds_of = {
            name.removeprefix(f"seconds/{rank.role}_"): median(values[1:] or values)
            for name, values in history.items()
            if name.startswith("seconds/")
        }
        most = max(history.get(f"memory/{rank.role}", [0.0])) or None
        found.append(
            {"role": rank.role, "planned": rank.total / GIB, "measured": most, "seconds": seconds_of}
        )
    return found


def streams(model: Path, viewers: int, settings: Settings) -> dict[str, Any]:
    """`viewers` streams at once, once their windows are full: seconds a chunk, without decoding."""
    memory()
    streamer = Streamer(str(model), viewers)
    finish(streamer, [streamer.open("warm up", seed=0)], 1)
    with timed() as first:
        finish(streamer, [streamer.open("a red fox in the snow", seed=1)], 1)
    playing = [streamer.open(f"a red fox, {seed}", seed=seed) for seed in range(viewers)]
    window = streamer.config.window
    assert window is not None, "it was imported with one"
    finish(streamer, playing, window // streamer.config.chunk, close=False)
    with timed() as seconds:
        finish(streamer, playing, window // streamer.config.chunk + settings.chunks)
    frames = 4 * streamer.config.chunk
    per_chunk = seconds[0] / settings.chunks
    return {
        "dtype": streamer.card.dtype, "viewers": viewers, "first_chunk_s": first[0], "chunk_s": per_chunk,
        "frames_per_s": viewers * frames / per_chunk, "memory": memory(),
    }  # fmt: skip


def finish(streamer: Streamer, playing: list[Any], chunks: int, *, close: bool = True) -> None:
    """Tick until every stream has made so many chunks."""
    while any(stream.chunks < chunks for stream in playing):
        streamer.tick(paused=[stream.number for stream in playing if stream.chunks >= chunks])
    for stream in playing if close else ():
        streamer.close(stream)


def decoding(codec: Codec, settings: Settings) -> dict[str, Any]:
    """Chunks of three latents, one after the other, and what the decoder remembers between them."""
    memory()
    decoder: Any = codec.stream()
    latents = torch.randn(3, 16, settings.height, settings.width, device="cuda" if CUDA else "cpu")
    for _ in range(2):
        decoder.decode(latents)
    with timed() as seconds:
        for _ in range(settings.chunks):
            frames = decoder.decode(latents)
    held = sum(each.nbytes for each in decoder.memory if isinstance(each, torch.Tensor))
    per_chunk = seconds[0] / settings.chunks
    return {
        "chunk_s": per_chunk, "frames_per_s": len(frames) / per_chunk, "remembered": held / GIB,
        "memory": memory(),
    }  # fmt: skip


def decoders(scratch: Path, settings: Settings) -> dict[str, Any]:
    """The VAE's decoder, and a light one."""
    vae = WanVae(str(scratch / "pipeline" / "vae"))
    light = LightDecoder(vae, str(write_light_decoder(scratch / "light.pth", 16)))
    return {"the VAE": decoding(vae, settings), "light (TAEHV)": decoding(light, settings)}


def rounding(model: Path, settings: Settings) -> float:
    """How far a bidirectional forward of 9 frames in bf16 is from the same in fp32, in norm."""
    source, device = ModelDirectory(model), "cuda" if CUDA else "cpu"
    sizes = source.card.transformer
    generator = torch.Generator(device).manual_seed(0)
    x = torch.randn(1, 9, 16, settings.height, settings.width, device=device, generator=generator)
    context = torch.randn(1, sizes.text_len, sizes.text_dim, device=device, generator=generator)
    answers = []
    for dtype in (torch.float32, torch.bfloat16):
        with torch.inference_mode():
            timestep = torch.tensor([700.0], device=device)
            answers.append(whole(source, device, dtype)(x, timestep, context).velocity.float())
        memory()
    return ((answers[1] - answers[0]).norm() / answers[0].norm()).item()


def measure(settings: Settings, scratch: Path, recipe: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """What was measured so far, after each part."""
    found: dict[str, Any] = {}
    players = [("bf16", viewers) for viewers in settings.viewers] + [("fp32", settings.viewers[0])]
    parts: dict[str, Callable[[], Any]] = {
        "rounding": lambda: rounding(scratch / "teacher", settings),
        "decoders": lambda: decoders(scratch, settings),
        "streams": lambda: [
            streams(scratch / f"player-{dtype}", viewers, settings) for dtype, viewers in players
        ],
        "training": lambda: training(scratch, recipe),
    }
    for name in settings.parts:
        say(f"{time.strftime('%H:%M:%S')}  {name}")
        began = time.perf_counter()
        found[name] = parts[name]()
        found.setdefault("took_s", {})[name] = round(time.perf_counter() - began)
        memory()
        yield found


def tables(found: dict[str, Any]) -> Iterator[str]:
    """The lines of a page."""

    def gib(value: float | None) -> str:
        return "–" if value is None else f"{value:.1f}"

    if "training" in found:
        yield "## `wan-1.3b-lora`, its three roles on the one GPU\n"
        yield "GiB that a role's tensors took at most on the device, beside what `self-forcing plan` says;"
        yield "the median seconds of its verbs in iterations of one student and one critic update."
        yield "\n| role | planned | measured | seconds |\n|---|---|---|---|"
        for each in found["training"]:
            seconds = ", ".join(f"{name} {value:.2f}" for name, value in each["seconds"].items())
            yield f"| {each['role']} | {each['planned']:.1f} | {gib(each['measured'])} | {seconds} |"
    if "streams" in found:
        yield "\n## Streams, with a full window, latents only\n"
        yield "| type | viewers | first chunk, s | a chunk, s | frames a second | GiB |"
        yield "|---|---|---|---|---|---|"
        for each in found["streams"]:
            first, chunk, frames = each["first_chunk_s"], each["chunk_s"], each["frames_per_s"]
            yield (
                f"| {each['dtype']} | {each['viewers']} | {first:.2f} | {chunk:.2f} | {frames:.1f} | "
                f"{gib(each['memory'])} |"
            )
    if "decoders" in found:
        yield "\n## Decoders, a chunk of three latents\n"
        yield "| decoder | a chunk, s | frames a second | remembered of a stream, GiB | GiB |"
        yield "|---|---|---|---|---|"
        for name, each in found["decoders"].items():
            yield (
                f"| {name} | {each['chunk_s']:.3f} | {each['frames_per_s']:.1f} | {each['remembered']:.2f} | "
                f"{gib(each['memory'])} |"
            )
    if "rounding" in found:
        yield "\n## bf16 against fp32\n"
        yield f"One bidirectional forward of nine frames differs by {found['rounding']:.2%} in norm."


def main(arguments: Sequence[str]) -> None:
    parser = ArgumentParser(prog="python -m tests.benchmarks.wan", description=__doc__)
    parser.add_class_arguments(Settings, None)
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that it runs")
    if "--quick" in arguments:
        parser.set_defaults(asdict(QUICK))
    options = parser.parse_args(list(arguments))
    settings = Settings(**{name: options[name] for name in Settings.__dataclass_fields__})
    machine = f"{torch.cuda.get_device_name()}, torch {torch.__version__}" if CUDA else "a CPU"
    command = " ".join(["python -m tests.benchmarks.wan", *arguments])
    head = [
        "# Wan 1.3B on one GPU\n",
        f"Written by `{command}`; {machine}. Weights are random: speed and memory do not depend on them.\n",
    ]
    body = {"settings": asdict(settings), "machine": machine, "made_with": versions() | git_commit()}
    out = Path(settings.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        for found in measure(settings, scratch, lineage(settings, scratch)):
            # What was measured stays, should the next part not end.
            out.with_suffix(".json").write_text(json.dumps(body | found, indent=1))
            out.with_suffix(".md").write_text("\n".join([*head, *tables(found)]) + "\n")
    say(out.with_suffix(".md").read_text())


if __name__ == "__main__":
    main(sys.argv[1:])
