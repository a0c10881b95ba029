"""The teacher: the frozen scorer, whose guided prediction the student is drawn to."""

from typing import Literal

from torch import Tensor

from model.score import ScoreConfig, guided_x0
from model.sequence import groups_of
from workers import build
from workers.prompts import TrainingData
from workers.scorer import Predictions, Scorer


class TeacherWorker(Scorer):
    """One rank of the frozen teacher, replicated or sharded."""

    makes = ("real",)

    def __init__(
        self,
        *,
        rank: int,
        ranks: int,
        threads: int,
        model: str,
        data: TrainingData,
        score: ScoreConfig,
        zero_stage: int,
        dtype: Literal["fp32", "bf16"],
        guidance: float,
        negative_prompt: str,
        negative_embedding: str | None,
        sequence: int,
    ):
        super().__init__(rank=rank, ranks=ranks, threads=threads, model=model, data=data, score=score)
        self.zero_stage, self.dtype, self.guidance = zero_stage, dtype, guidance
        self.negative_prompt = negative_prompt, negative_embedding
        self.sequence = sequence

    def start(self, address: str, port: int, timeout_s: float) -> None:
        """Join the others only where they share one model or its work; a replicated rank needs none, and
        restarts alone."""
        if self.zero_stage == 0 and self.sequence == 1:
            self.build()
        else:
            super().start(address, port, timeout_s)

    def build(self) -> None:
        self.engine = build.frozen(self.source, zero_stage=self.zero_stage, dtype=self.dtype)
        self.engine.module.sequence = groups_of(self.sequence)
        # What scores are guided away from, [text_len, text_dim].
        self.negative = self.data.prompts.negative(*self.negative_prompt).to(self.engine.device)

    def predict(self, noisy: Tensor, timestep: Tensor, context: Tensor) -> Predictions:
        """`real`: the guided x0."""
        real = guided_x0(
            self.engine.module,
            noisy,
            timestep,
            cond=context,
            uncond=self.negative,
            guidance=self.guidance,
            schedule=self.schedule,
        )
        return {"real": real}
