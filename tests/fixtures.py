"""Tiny models and data for tests, written by the product's own writers.

Weights are random everywhere: the head, which starts at zero in training, would otherwise hide most
gradients.
"""

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from mlflow import MlflowClient
from safetensors.torch import save_file
from torch import Tensor

from infra import storage
from model.rollout_plan import RolloutConfig
from model.text import ByteEncoder
from model.transformer import TransformerConfig, WanTransformer
from orchestrator.config import RunConfig
from pipelines.cli import parse
from workers.dataset import dataset_schema, encode_tensor, tensor_fields
from workers.model_directory import ModelCard, ModelWriter, TextConfig, VideoConfig

TINY_RECIPE = Path(__file__).parent / "recipes" / "tiny.yaml"
PROMPTS = [f"a {digit} drifting {way}" for digit in ("one", "six", "two") for way in ("left", "up", "down")]


def random_weights(sizes: TransformerConfig, seed: int) -> dict[str, Tensor]:
    """Weights of a transformer of which none is zero, sized so that activations stay near one."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, tensor in WanTransformer(sizes).state_dict().items():
        matrix = tensor.ndim > 1 and not name.endswith("modulation")
        draw = torch.randn(tensor.shape, generator=generator)
        weights[name] = draw * (tensor[0].numel() ** -0.5 if matrix else 0.1)
        if name.endswith(("norm_q.weight", "norm_k.weight", "norm3.weight")):
            weights[name] += 1
    return weights


def write_model(
    path: str | Path,
    sizes: TransformerConfig,
    *,
    seed: int,
    rollout: RolloutConfig | None = None,
    video: VideoConfig | None = None,
    text: TextConfig | None = None,
    weights: dict[str, Tensor] | None = None,
    recipe: dict[str, Any] | None = None,
    dtype: Literal["fp32", "bf16"] = "fp32",
) -> None:
    """Publish a model of random weights, a student if it has a `rollout`. All share one prompt encoder."""
    card = ModelCard(
        rollout is not None,
        sizes,
        video or VideoConfig(),
        text or TextConfig(),
        rollout,
        dtype=dtype,
        lineage={},
        recipe=recipe or {},
    )
    torch.manual_seed(0)
    encoder = ByteEncoder(sizes.text_len, sizes.text_dim).state_dict() if card.text.encoder == "bytes" else {}
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    staging = storage.begin(path)
    with storage.writing(staging) as directory:
        writer = ModelWriter(directory)
        for name, tensor in (weights or random_weights(sizes, seed)).items():
            writer.write(name, tensor)
        writer.finish(card, encoder)
    storage.publish(staging, path, {"causal": card.causal})


def write_prompts(path: Path, embedded: tuple[int, int] | None = None) -> None:
    """A data set of prompts: text, or random embeddings of the shape `embedded` (text_len, text_dim)."""
    if embedded is None:
        fields, rows = [pa.field("prompt", pa.string())], [{"prompt": prompt} for prompt in PROMPTS]
    else:
        generator = torch.Generator().manual_seed(5)
        fields = tensor_fields("embedding")
        rows = [encode_tensor("embedding", torch.randn(embedded, generator=generator)) for _ in PROMPTS]
    schema = dataset_schema(fields, kind="prompts", provenance={})
    path.mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), path / "00000.parquet")


def write_real(path: Path, config: RunConfig) -> None:
    """A data set of random videos, pixels where there is a codec and latents where there is none."""
    generator = torch.Generator().manual_seed(7)
    sizes, (frames, channels, height, width) = config.student, config.video.shape
    name, rows = ("latent" if config.video.codec == "none" else "video"), []
    embedded = config.text.encoder == "embedded"
    for prompt in PROMPTS:
        latent = torch.randn(frames, channels, height, width, generator=generator)
        pixels = torch.randint(256, (frames, 1, 2 * height, 2 * width), generator=generator)
        row = encode_tensor(name, latent if name == "latent" else pixels.to(torch.uint8))
        embedding = torch.randn(sizes.text_len, sizes.text_dim, generator=generator)
        rows.append(row | (encode_tensor("embedding", embedding) if embedded else {"prompt": prompt}))
    text = tensor_fields("embedding") if embedded else [pa.field("prompt", pa.string())]
    schema = dataset_schema([*text, *tensor_fields(name)], kind="video", provenance={})
    path.mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), path / "00000.parquet")


def furnished(root: Path, recipe: str | Path = TINY_RECIPE, overrides: Sequence[str] = ()) -> RunConfig:
    """The recipe's config below `root`, with the models, prompts and negative prompt that it names written
    there."""
    config, _ = parse("run", [str(recipe), f"--root={root}", *overrides])
    sizes, text = config.student, config.text
    teacher = config.distill.teacher
    models = {teacher: config.teacher, config.distill.critic or teacher: sizes, config.distill.student: sizes}
    for seed, (path, size) in enumerate(models.items(), start=1):
        rollout = config.rollout if path == config.distill.student else None
        write_model(root / path, size, seed=seed, rollout=rollout, video=config.video, text=text)
    embedded = (sizes.text_len, sizes.text_dim) if text.encoder == "embedded" else None
    if config.data.train != config.data.real:
        write_prompts(root / config.data.train, embedded)
    if config.data.real is not None:
        write_real(root / config.data.real, config)
    negative = config.distill.roles.teacher.negative_embedding
    if negative:
        embedding = torch.randn(sizes.text_len, sizes.text_dim, generator=torch.Generator().manual_seed(6))
        save_file({"embedding": embedding}, root / negative)
    located = config.located()
    if (uri := located.tracking.uri or "").startswith("sqlite:///"):
        store = Path(uri.removeprefix("sqlite:///"))
        store.parent.mkdir(parents=True, exist_ok=True)
        if not store.exists():
            store.write_bytes(_empty_store())
    return located


@cache
def _empty_store() -> bytes:
    """MLflow's database before the first run; to make one takes seconds."""
    with TemporaryDirectory() as directory:
        file = Path(directory) / "mlflow.db"
        MlflowClient(f"sqlite:///{file}").search_experiments()
        return file.read_bytes()
