"""ODE trajectories of a guided teacher, made by Ray Data and stored as Parquet: for initial students.

A bidirectional teacher's start from noise alone. A causal teacher's are made under teacher forcing: each
chunk is integrated given the clean frames of a real video before it, all chunks at once, and the real video
is stored beside its trajectory.
"""

import logging
from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
import torch
from torch import Tensor

from infra import storage
from model.backbone import velocity_of
from model.noise import SampleNoise
from model.sampler import guided, integrate, ode_grid
from orchestrator import run_state
from orchestrator.config import RunConfig
from orchestrator.planner import passing
from workers.build import whole
from workers.dataset import ParquetDataset, dataset_schema, encode_tensor, tensor_fields
from workers.model_directory import ModelDirectory
from workers.prompts import LatentDataset, Prompts
from workers.zero import DTYPES

ODE_BATCH = 32


class OdeSampler:
    """A Ray Data actor that turns sample indices into trajectories."""

    def __init__(self, config: RunConfig, threads: int):
        torch.set_num_threads(threads)
        self.config = config
        source = ModelDirectory(config.initialize.teacher, verified=True)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.dtype = DTYPES[config.initialize.role.engine.dtype]
        self.model = whole(source, self.device, self.dtype)
        self.prompts = Prompts(source, self.device)
        self.causal = config.initialize.chosen.real_videos
        if self.causal:
            assert config.data.real is not None, "the config asks for real videos"
            self.data = LatentDataset(
                config.data.real, config.video, self.prompts.column, skip_damaged=config.data.skip_damaged
            )
        else:
            data = config.data
            self.text = ParquetDataset(data.train, [self.prompts.column], skip_damaged=data.skip_damaged)
        guide_role = config.distill.roles.teacher
        self.uncond = self.prompts.negative(guide_role.negative_prompt, guide_role.negative_embedding)
        self.grid = ode_grid(config.rollout.every_step, config.initialize.ode_steps)
        self.kept = [self.grid.index(float(step)) for step in config.rollout.every_step]
        self.kept.append(len(self.grid) - 1)

    def __call__(self, batch: Mapping[str, np.ndarray]) -> dict[str, list[Any]]:
        samples, most = [int(i) for i in batch["id"]], self.together()
        parts = [self.make(samples[first : first + most]) for first in range(0, len(samples), most)]
        return {name: [value for part in parts for value in part[name]] for name in parts[0]}

    def together(self) -> int:
        """Trajectories that are made at once, by the memory that a GPU has left."""
        if self.device.type == "cpu":
            return ODE_BATCH
        video, sizes = self.config.video, self.config.student
        rows, columns = sizes.grid(video.height, video.width)
        free, _ = torch.cuda.mem_get_info(self.device)
        one = passing(sizes, 2 * video.frames * rows * columns, self.dtype.itemsize)
        return max(1, min(ODE_BATCH, int(0.8 * free / one)))

    def make(self, samples: list[int]) -> dict[str, list[Any]]:
        """The rows of these samples, by column."""
        seed, rollout, column = self.config.seed, self.config.rollout, self.prompts.column
        options: dict[str, Any] = {}
        data: list[Tensor] = []
        if self.causal:
            read = [self.data.batch(i, 1, seed) for i in samples]
            data, prompts = [latents[0] for latents, _ in read], [values[0] for _, values in read]
            options = {
                "clean": torch.stack(data).to(self.device),
                "chunk": rollout.chunk,
                "window": rollout.context_window(),
            }
        else:
            prompts = [self.text.batch(i, 1, seed)[0][column] for i in samples]
        velocity = partial(
            guided,
            partial(velocity_of, self.model),
            cond=torch.stack(self.prompts.embed(prompts)).to(self.device),
            uncond=self.uncond.to(self.device),
            guidance=self.config.initialize.guidance,
            **options,
        )
        noise = SampleNoise([(seed, "ode", i) for i in samples], self.device)
        path = integrate(
            velocity,
            noise.draw((len(samples), *self.config.video.shape), 0, 0),
            shift=rollout.shift,
            grid=self.grid,
        )
        # In what the model computes: at Wan's size a trajectory takes 21 MB in bf16.
        trajectories = torch.stack([path[i] for i in self.kept], dim=1).to(self.dtype).cpu()
        rows = []
        for i, (sample, prompt, trajectory) in enumerate(zip(samples, prompts, trajectories, strict=True)):
            row = {"sample": sample, **encode_tensor("trajectory", trajectory)}
            row |= {column: prompt} if column == "prompt" else encode_tensor(column, prompt)
            rows.append(row | (encode_tensor("clean", data[i]) if self.causal else {}))
        return {name: [row[name] for row in rows] for name in rows[0]}


def _write(staging: str, schema: pa.Schema, block: pa.Table) -> dict[str, list[int]]:
    """A Ray Data task: a block as a shard, named by its first sample and written by the node that has it."""
    with storage.writing(staging) as directory:
        name = f"{block['sample'][0].as_py():09d}.parquet"
        pq.write_table(block.select(schema.names).cast(schema), directory / name)
    return {"rows": [len(block)]}


def missing_pairs(config: RunConfig) -> bool:
    """Whether the pairs that this config asks for are still to be made; ValueError where others lie there."""
    path = config.initialize.pairs_path
    unlike = run_state.unlike(path, run_state.identity(config, "pairs"))
    if unlike:
        raise ValueError(
            f"{path} holds ODE pairs that were made otherwise: {unlike}; delete it, or choose another "
            "initialize.pairs_path."
        )
    return unlike is None


def write_pairs(config: RunConfig) -> None:
    """Write the trajectories, whole or not at all."""
    settings, causal = config.initialize, config.initialize.chosen.real_videos
    identity = run_state.identity(config, "pairs")
    staging = storage.begin(settings.pairs_path)
    prompts = (
        tensor_fields("embedding") if config.text.column == "embedding" else [pa.field("prompt", pa.string())]
    )
    fields = [pa.field("sample", pa.int64()), *prompts, *tensor_fields("trajectory")]
    schema = dataset_schema(
        fields + (tensor_fields("clean") if causal else []), kind="ode_pairs", provenance=identity
    )
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    # Rows in order, so that the data set (and the order in which training reads it) is the same every time.
    context.execution_options.preserve_order = True
    role = settings.role
    (
        ray.data.range(settings.pairs, override_num_blocks=max(1, settings.pairs // (4 * ODE_BATCH)))
        .map_batches(
            OdeSampler,
            fn_constructor_args=(config, role.threads),
            batch_size=ODE_BATCH,
            num_cpus=role.cpus,
            num_gpus=role.gpus,
            compute=ray.data.ActorPoolStrategy(size=settings.samplers),
        )
        .map_batches(partial(_write, staging, schema), batch_size=None, batch_format="pyarrow")
        .materialize()
    )
    storage.publish(staging, settings.pairs_path, {"identity": identity})
