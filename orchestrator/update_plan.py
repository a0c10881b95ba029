"""What happens in which iteration, as a pure function of the config: updates, data, and every random choice.

Nothing here is drawn by a rank or saved in a checkpoint, so ranks agree and a resumed run goes on as if it
had not stopped.
"""

import math
from dataclasses import dataclass
from typing import Literal

from model.forcing import ForcedPlan
from model.noise import integer
from model.rollout_plan import RolloutPlan
from model.score import ScorePlan
from orchestrator.config import RunConfig

Purpose = Literal["student", "critic"]


@dataclass(frozen=True)
class UpdatePlan:
    """The schedule of one run."""

    config: RunConfig
    start: int = 0
    """An iteration whose place in the data is known, and"""
    origin: int = 0
    """the position in the data at which it begins; later ones go on from there, whatever the batch was
    before."""

    @property
    def parts(self) -> int:
        """Micro-batches in which the student makes a batch."""
        return self.config.distill.roles.student.engine.accumulation

    @property
    def size(self) -> int:
        """Samples of one of them, over all ranks."""
        return self.config.distill.batch // self.parts

    def updates_student(self, iteration: int) -> bool:
        return iteration % self.config.distill.student_every == 0

    def batch_index(self, iteration: int, purpose: Purpose) -> int:
        """Which batch of the data a rollout uses: every rollout takes the next one."""
        before = iteration + math.ceil(iteration / self.config.distill.student_every)
        return before + (1 if purpose == "critic" and self.updates_student(iteration) else 0)

    def position(self, iteration: int, purpose: Purpose, part: int) -> int:
        """Where a micro-batch starts in the seeded order of the data."""
        batches = self.batch_index(iteration, purpose) - self.batch_index(self.start, "student")
        return self.origin + batches * self.config.distill.batch + part * self.size

    def score(
        self, iteration: int, purpose: str, *, gradient: bool = False, like: str | None = None
    ) -> ScorePlan:
        """How noisy videos are when they are scored, or when the critic learns from them.

        The timesteps are those of the purpose `like`, where it is given.
        """
        seed, batch = self.config.seed, self.config.distill.batch
        levels = None if like is None else (seed, iteration, like)
        return ScorePlan((seed, iteration, purpose), gradient, levels, batch)

    def videos(self, iteration: int, purpose: Purpose, part: int) -> tuple[str, RolloutPlan | ForcedPlan]:
        """How the student makes the videos of a micro-batch: the verb, and all that is random about it.

        A micro-batch lies within one group of samples that share their exit steps, so all ranks make the same
        calls, and however many micro-batches there are, a sample's exit step is the same.
        """
        config, distill = self.config, self.config.distill
        key, gradient = (config.seed, iteration, purpose), purpose == "student"
        if distill.inputs != "rollout":
            return "predict", ForcedPlan(distill.inputs, key, gradient)
        video, chunk = config.video.frames, config.rollout.chunk
        spare = ((distill.rollout_frames or video) - video) // chunk
        frames = video + chunk * integer(spare + 1, *key, "frames")
        # The first chunk of a later window has a first frame that is made anew, so it carries no gradient.
        carried = video if frames == video else video - chunk
        return "rollout", RolloutPlan.draw(
            config.rollout,
            frames,
            seed=config.seed,
            update=iteration,
            purpose=purpose,
            grad_frames=carried if gradient else 0,
            cache_gradient=distill.cache_gradient,
            given_frames=distill.given_frames,
            replayed=distill.replay and gradient,
            group=part * distill.exit_groups // self.parts if distill.exit_groups > 1 else None,
        )
