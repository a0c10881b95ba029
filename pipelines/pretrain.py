"""`self-forcing pretrain`: the bidirectional teacher, by flow matching with classifier-free dropout.

A byte encoder of prompts, where there is one, is trained with the teacher and frozen afterwards.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn

from infra import storage
from model.backbone import Backbone
from model.families import new_backbone
from model.noise import integer
from model.objectives.flow_matching import flow_matching_loss
from model.schedule import FlowSchedule
from model.score import ScoreConfig, ScorePlan
from model.text import ByteEncoder
from orchestrator.cluster import Cluster
from orchestrator.config import RunConfig
from orchestrator.single_model import Task, share
from orchestrator.stages import whole_stage
from pipelines.console import say, summary
from pipelines.tracked import Ready, on_cluster, opened, tracking
from pipelines.train_model import train_model
from workers.data_check import check
from workers.dataset import ParquetDataset
from workers.engine import TrainEngine
from workers.model_directory import ModelCard, ModelWriter, TextConfig

EVERY_TIMESTEP = (0.0, 1000.0)


class TextToVideo(nn.Module):
    """A transformer and the encoder trained with it, as one module for the engine."""

    def __init__(self, transformer: Backbone, text: ByteEncoder):
        super().__init__()
        self.transformer = transformer
        self.text = text

    def forward(self, x: Tensor, timestep: Tensor, tokens: Tensor) -> Tensor:
        return self.transformer(x, timestep, self.text(tokens)).velocity


def check_data(config: RunConfig) -> None:
    """ValueError, in one sentence, where the data set is not what the teacher reads."""
    if config.video.column != "video":
        raise ValueError("pretrain reads videos of pixels, so it needs video.codec space_to_depth.")
    data, video = config.data, config.video
    skip = data.skip_damaged
    for note in check("data.train", data.train, TextConfig(), config.teacher, video=video, skip_damaged=skip):
        say(f"pretrain: {note}")


@dataclass
class Pretrain(Task):
    """Flow matching on a data set of videos."""

    config: RunConfig
    run_id: str = ""

    @property
    def compile(self) -> bool:  # type: ignore[override]
        return self.config.pretrain.compile

    def engine(self) -> TrainEngine:
        sizes, role = self.config.teacher, self.config.pretrain.role

        def build() -> nn.Module:
            network = new_backbone(sizes, activation_checkpointing=role.activation_checkpointing)
            return TextToVideo(network, ByteEncoder(sizes.text_len, sizes.text_dim))

        return TrainEngine(build, whole_stage(role.engine, self.config.pretrain.updates))

    def open(self, device: torch.device) -> None:
        self.device = device
        data = self.config.data
        self.data = ParquetDataset(data.train, ["prompt", "video"], skip_damaged=data.skip_damaged)
        codec = self.config.video.make_codec()
        assert codec is not None, "check_data asks for one"
        self.codec = codec
        self.tokenizer = ByteEncoder(self.config.teacher.text_len, 1)
        self.schedule = FlowSchedule(self.config.pretrain.shift)

    def loss(
        self, module: Callable[..., Tensor], update: int, samples: range, *, batch: int, position: int
    ) -> Tensor:
        seed = self.config.seed
        rows = self.data.batch(position + samples.start, len(samples), seed)
        x0 = self.codec.encode(torch.stack([row["video"] for row in rows])).to(self.device)
        plan = ScorePlan((seed, update, "pretrain"))
        noise, timestep = plan.draw(
            x0, list(samples), ScoreConfig(self.config.pretrain.shift, *EVERY_TIMESTEP)
        )
        dropped = [
            integer(1000, seed, update, "drop", i) < 1000 * self.config.pretrain.dropout for i in samples
        ]
        prompts = ["" if drop else row["prompt"] for row, drop in zip(rows, dropped, strict=True)]
        tokens = self.tokenizer.tokenize(prompts).to(self.device)
        velocity = module(self.schedule.add_noise(x0, noise, timestep), timestep, tokens)
        return flow_matching_loss(velocity, noise, x0)

    def export(self, engine: TrainEngine, path: str) -> None:
        card = ModelCard(
            False,
            self.config.teacher,
            self.config.video,
            self.config.text,
            shift=self.config.pretrain.shift,
            dtype=self.config.pretrain.role.engine.dtype,
            lineage={"teacher": self.run_id},
            recipe=self.config.portable(),
        )
        text: dict[str, Tensor] = {}

        def write(writer: ModelWriter) -> None:
            def one(name: str, tensor: Tensor) -> None:
                if name.startswith("text."):
                    text[name.removeprefix("text.")] = tensor
                else:
                    writer.write(name.removeprefix("transformer."), tensor)

            engine.export(one, ema=engine.config.ema_decay is not None)

        export_model(path, card, text, write)


def export_model(
    path: str, card: ModelCard, text: dict[str, Tensor], write: Callable[[ModelWriter], None]
) -> None:
    """Publish a model directory whose weights `write` gives; on all ranks. `text` are its prompt encoder's
    weights."""
    staging = share(storage.begin(path) if dist.get_rank() == 0 else None)
    with storage.writing(staging) as directory:
        writer = ModelWriter(directory)
        write(writer)
        if dist.get_rank() == 0:
            writer.finish(card, text)
    if dist.get_rank() == 0:
        storage.publish(staging, path, {"causal": card.causal})
    dist.barrier()


def make_teacher(config: RunConfig, *, resume: bool, allow: Sequence[str] = ()) -> Ready:
    """Check all that the teacher learns from; what is returned trains it, with its own tracking run."""
    check_data(config)
    state = opened(config, "pretrain", resume=resume, allow=allow)

    def make(_: Cluster) -> None:
        with tracking(config, state.stage, state.output, {}, state) as tracker:
            task = Pretrain(config, tracker.run_id)
            path = train_model(config, replace(state, run_id=tracker.run_id), task, tracker)
            summary("Teacher", {"model": path, "tracking": tracker.how_to_open()})

    return make


command = partial(on_cluster, "pretrain", make_teacher)
