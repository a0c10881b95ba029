"""Self Forcing across actors (arXiv 2506.08009, algorithm 1): who does what when. It moves references only.

In every iteration: if it is a fifth, the student rolls out, is scored by the teacher and the current critic,
pulls the gradient back and steps. Then, every iteration, the critic trains on a fresh rollout of the student
as it now is.

Asking returns at once, and a group works through what it was asked in order. A verb is asked for when all
that it needs is there: else, where a rank is lost, some ranks of another group would get what it made and
wait in a collective for those that did not. The only places that wait are the calls of `wait`. Between two
student updates the student's weights stand still, so the rollouts that come next are requested before the
critic is waited for; and the teacher's weights always do, so it scores the next student update's first
videos while the critic still trains. What is computed is the same to the bit; only when it is computed
changes.
"""

import math
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from model.replay import COLUMNS
from model.rollout_plan import RolloutPlan
from model.watch import for_a_band, pooled
from orchestrator.config import RunConfig
from orchestrator.fault import Fault
from orchestrator.run_state import DROPPED_AT_MOST
from orchestrator.update_plan import Purpose, UpdatePlan
from orchestrator.worker_group import Request, WorkerGroup
from workers.batch import Batch, Read

Metrics = dict[str, float]
Asked = tuple[Batch, list[Request]]
"""References to what will be there, and the requests that make it, in the order in which they were made;
those that were waited for are left out."""
AHEAD = 4
"""Iterations at most whose rollouts are made before their turn, each of which holds its videos in the object
store."""


class NotFinite(FloatingPointError):
    """A number of a role is not finite."""

    def __init__(self, what: str, *, iteration: int, since: int):
        """It was found in `iteration`; the weights that gave it had stood still `since` so many were done."""
        super().__init__(what)
        self.iteration, self.since = iteration, since


def _raise(fault: Fault) -> None:
    raise fault


@dataclass
class Coordinator:
    """The groups of one run, and what is asked of them."""

    config: RunConfig
    groups: Mapping[str, WorkerGroup]
    """`student`, `critic`, `teacher` where the objective reads what it makes, and `rollout` where replicas
    make the student's videos."""
    since: tuple[int, int] = (0, 0)  # an iteration, and the position in the data at which it begins
    ahead: dict[tuple[int, Purpose, int], Asked] = field(default_factory=dict)
    """Rollouts that were asked before their turn, by iteration, purpose and micro-batch."""
    scored: dict[tuple[int, str, int], Asked] = field(default_factory=dict)
    """Scores that were, by iteration, scorer and micro-batch."""
    steps: dict[str, int] = field(default_factory=dict)
    """Optimizer steps that each role has made, once it has told."""
    dropped: Counter[str] = field(default_factory=Counter)
    """Updates of each role in a row that were dropped."""
    version: int = 0
    """Times that replicas were given the student's weights."""
    mend: Callable[[Fault], None] = _raise
    """Makes a scorer that was lost in the middle of an update anew, or raises what cannot be mended there."""

    @property
    def plan(self) -> UpdatePlan:
        return UpdatePlan(self.config, *self.since)

    @property
    def student(self) -> WorkerGroup:
        return self.groups["student"]

    @property
    def critic(self) -> WorkerGroup:
        return self.groups["critic"]

    @property
    def scorers(self) -> list[WorkerGroup]:
        """In this order their gradients are added up."""
        return [self.groups[role] for role in ("teacher", "critic") if role in self.groups]

    def run(self, start: int) -> Iterator[tuple[int, Metrics]]:
        """Iterations from `start` on, yielding how many are done and what was measured.

        Raises NotFinite, naming role, iteration and batch, where a number is not finite.
        """
        self.share_weights()
        for iteration in range(start, self.config.distill.iterations):
            began = time.perf_counter()
            timer = Timer(self.groups)
            if self.plan.updates_student(iteration):
                self.update_student(iteration, timer)
            self.update_critic(iteration, timer)
            yield iteration + 1, timer.metrics(time.perf_counter() - began)

    def update_student(self, iteration: int, timer: "Timer") -> None:
        def wait(*requests: Request) -> None:
            self.wait(requests, timer, iteration=iteration, purpose="student")

        if self.config.distill.overlap and self.config.distill.replay:
            self.roll_out_ahead(iteration)
            self.score_ahead(iteration, wait, self.scorers)
        for part in range(self.plan.parts):
            made, rolled_out = self.rollout(iteration, "student", part)
            wait(*rolled_out)
            if "rollout" in self.groups:
                _, plan = self.plan.videos(iteration, "student", part)
                adopted, _ = self.student.scatter("adopt", plan, made)
                wait(adopted)
            gradients = self.judged(made, iteration, part, wait)
            pulled, _ = self.student.scatter("pullback", None, gradients)
            wait(pulled)
        stepped, _ = self.student.scatter("step", None, Batch())
        wait(stepped)
        self.share_weights()

    def share_weights(self) -> None:
        """Give replicas the student's weights of now; what they roll out next is made with those."""
        if replicas := self.groups.get("rollout"):
            weights, *_ = self.student.wait(self.student.broadcast("shared_weights"))
            self.version += 1
            replicas.wait(replicas.broadcast("take_weights", weights, self.version))

    def judged(self, made: Batch, iteration: int, part: int, wait: Callable[..., None]) -> Batch:
        """Gradients with respect to videos, from each scorer that the objective flows through; the student
        keeps its own.

        The student's graph stands until they are pulled back, so this is done again where a scorer that
        learns nothing was lost and made anew.
        """
        flows, scores = self.config.distill.objective.flows, self.plan.score(iteration, "score")
        while True:
            try:
                predictions, scored = self.score(made, iteration, part)
                wait(*scored)
                judged, cotangents = self.student.scatter("judge", scores, predictions, makes=flows)
                wait(judged)
                gradients, returned = self.pull_back(cotangents)
                wait(*returned)
                return gradients
            except Fault as fault:
                self.mend(fault)
                self.scored.clear()

    def score(self, made: Batch, iteration: int, part: int) -> Asked:
        """The predictions that the objective reads. A scorer keeps its graph where gradient will flow
        back."""
        predictions, requests = Batch(made.samples), []
        for scorer in self.scorers:
            asked = self.scored.pop((iteration, scorer.role, part), None)
            answer, own = asked or self.score_by(scorer, made, iteration, part)
            predictions |= answer
            requests += own
        return predictions, requests

    def score_by(self, scorer: WorkerGroup, made: Batch, iteration: int, part: int) -> Asked:
        objective = self.config.distill.objective
        predictions, requests, made = Batch(made.samples), [], made.select("video", "context")
        if names := [name for name in scorer.makes if name in objective.reads]:
            gradient = any(name in objective.flows for name in names)
            plan = self.plan.score(iteration, "score", gradient=gradient)
            request, answer = scorer.scatter("score", plan, made, makes=names)
            predictions |= answer
            requests.append(request)
        if names := [name for name in scorer.makes if f"data_{name}" in objective.reads]:
            data = self.data(self.plan.position(iteration, "student", part), made.samples)
            # At the same timesteps: else what tells data from videos would be how noisy they are.
            plan = self.plan.score(iteration, "score-data", like="score")
            request, answer = scorer.scatter("score", plan, data, makes=names)
            predictions |= answer.prefixed("data_")
            requests.append(request)
        return predictions, requests

    def pull_back(self, cotangents: Batch) -> Asked:
        """What gradients with respect to predictions are with respect to the videos, from each scorer that
        made any."""
        gradients, requests = Batch(cotangents.samples), []
        for scorer in self.scorers:
            if names := [name for name in scorer.makes if name in cotangents.columns]:
                own = cotangents.select(*names)
                request, gradient = scorer.scatter("pullback", None, own, makes=("gradient",))
                gradients |= gradient.prefixed(f"{scorer.role}_")
                requests.append(request)
        return gradients, requests

    def update_critic(self, iteration: int, timer: "Timer") -> None:
        def wait(*requests: Request) -> None:
            self.wait(requests, timer, iteration=iteration, purpose="critic")

        parts, rolled_out = [], []
        for part in range(self.plan.parts):
            made, requests = self.rollout(iteration, "critic", part)
            if self.config.distill.discriminator.taps:
                data = self.data(self.plan.position(iteration, "critic", part), made.samples)
                made |= data.prefixed("data_")
            parts.append(made)
            rolled_out.append(requests)
        batch, plan = Batch.joined(parts), self.plan.score(iteration, "critic-score")
        size = len(batch) // self.config.distill.roles.critic.engine.accumulation
        updates, there = [], 0
        for start in range(0, len(batch), size):
            while there < start + size:
                wait(*rolled_out.pop(0))
                there += self.plan.size
            updated, _ = self.critic.scatter("update", plan, batch.rows(start, start + size))
            updates.append(updated)
        if self.config.distill.overlap:
            self.roll_out_ahead(iteration + 1)
            self.score_ahead(iteration + 1, wait, self.scorers[:-1])
        wait(*updates)

    def roll_out_ahead(self, iteration: int) -> None:
        """Request coming rollouts, as far as the student's weights are those of now: all those for the
        critic, and for the next student update those that the student can hold, of graphs one."""
        for coming in range(iteration, min(iteration + AHEAD, self.config.distill.iterations)):
            purpose: Purpose = "student" if self.plan.updates_student(coming) else "critic"
            one = purpose == "student" and not self.config.distill.replay
            for part in range(1 if one else self.plan.parts):
                if (coming, purpose, part) not in self.ahead:
                    self.ahead[coming, purpose, part] = self.rollout(coming, purpose, part)
            if purpose == "student":
                return

    def score_ahead(self, iteration: int, wait: Callable[..., None], scorers: Sequence[WorkerGroup]) -> None:
        """Request scores of what was rolled out ahead for a student update, once it is there, from scorers
        whose weights are those of then. A scorer holds one graph, so those through which gradient flows back
        are asked for the first alone."""
        for part in range(self.plan.parts):
            if (iteration, "student", part) not in self.ahead:
                return
            made, requests = self.ahead[iteration, "student", part]
            wait(*requests)
            self.ahead[iteration, "student", part] = made, []
            for scorer in scorers:
                key = iteration, scorer.role, part
                flows = any(name in self.config.distill.objective.flows for name in scorer.makes)
                if key not in self.scored and not (flows and part):
                    self.scored[key] = self.score_by(scorer, made, iteration, part)

    def rollout(self, iteration: int, purpose: Purpose, part: int) -> Asked:
        """`video` and `context` of one micro-batch, unless they were requested already."""
        if (iteration, purpose, part) in self.ahead:
            return self.ahead.pop((iteration, purpose, part))
        samples = list(range(part * self.plan.size, (part + 1) * self.plan.size))
        inputs = self.inputs(self.plan.position(iteration, purpose, part), samples)
        verb, plan = self.plan.videos(iteration, purpose, part)
        if replicas := self.groups.get("rollout"):
            assert isinstance(plan, RolloutPlan)
            makes = ("video", *(COLUMNS if plan.replayed else ()))
            request, made = replicas.scatter(verb, replace(plan, version=self.version), inputs, makes=makes)
        else:
            request, made = self.student.scatter(verb, plan, inputs, makes=("video",))
        return made | inputs.select("context"), [request]

    def inputs(self, position: int, samples: list[int]) -> Batch:
        """What the student makes videos from: `context`, and `data_video` where it starts from those."""
        if self.config.distill.starts_from_data:
            data = self.data(position, samples)
            return data.select("context") | data.select("video").prefixed("data_")
        places = range(position, position + len(samples))
        return Batch(samples, {"context": [Read("train", "context", place) for place in places]})

    def data(self, position: int, samples: list[int]) -> Batch:
        """`video` and `context` of the data, which whoever needs them reads."""
        places = range(position, position + len(samples))
        videos, contexts = (
            [Read("real", column, place) for place in places] for column in ("video", "context")
        )
        return Batch(samples, {"video": videos, "context": contexts})

    def wait(self, requests: Iterable[Request], timer: "Timer", *, iteration: int, purpose: Purpose) -> None:
        """Wait for requests in the order in which they were made, so that the first failure is told."""
        for request in requests:
            stats, role = request.wait(), request.group.role
            steps = stats.pop("steps", None)
            # What is only watched of a scorer shows in the loss, if it matters.
            bad = [name for name in stats if not math.isfinite(stats[name]) and not for_a_band(name)]
            if bad and self.dropped[role] + 1 >= self._dropped_at_most(role):
                batch = self.plan.batch_index(iteration, purpose)
                stepped = purpose == "critic" and self.plan.updates_student(iteration)
                raise NotFinite(
                    f"{role} {bad[0]} is {stats[bad[0]]} in iteration {iteration} (prompt batch {batch})",
                    iteration=iteration,
                    since=iteration + stepped - self.dropped[role],
                )
            for name in bad:
                del stats[name]
            if steps is not None:
                dropped = "grad_norm" in bad
                self._stepped(role, int(steps), dropped=dropped)
                if dropped:
                    stats["dropped"] = 1.0
            timer.add(request.verb, role, stats)

    def _dropped_at_most(self, role: str) -> int:
        """Updates of a role in a row whose drop ends the run: all that there are, where those are few."""
        settings = self.config.distill
        if settings.not_finite == "stop":
            return 1
        every = 1 if role == "critic" else settings.student_every
        return min(DROPPED_AT_MOST, math.ceil(settings.iterations / every))

    def _stepped(self, role: str, steps: int, *, dropped: bool) -> None:
        """Take down the one step that an update makes, or none where it was dropped; Fault where it was not
        so."""
        expected = self.steps.get(role, steps - (not dropped)) + (not dropped)
        if steps != expected:
            raise Fault(role, "code", f"{role} has made {steps} steps, where there should be {expected}")
        self.steps[role] = steps
        self.dropped[role] = self.dropped[role] + 1 if dropped else 0


class Timer:
    """Adds up what the groups report within one iteration."""

    def __init__(self, roles: Iterable[str]) -> None:
        """`roles` are those that are to be kept busy."""
        self.values: dict[str, list[float]] = defaultdict(list)
        self.seconds: dict[str, float] = defaultdict(float)
        self.busy = dict.fromkeys(roles, 0.0)
        self.memory: dict[str, float] = {}

    def add(self, verb: str, role: str, stats: Metrics) -> None:
        self.seconds[f"seconds/{role}_{verb}"] += stats["seconds"]
        if role in self.busy:
            self.busy[role] += stats["seconds"]
        if "memory" in stats:
            self.memory[f"memory/{role}"] = max(stats["memory"], self.memory.get(f"memory/{role}", 0.0))
        for name, value in stats.items():
            if name not in ("seconds", "memory"):
                self.values[f"{role}/{name}"].append(value)

    def metrics(self, wall: float) -> Metrics:
        """Means of values, sums of seconds, the most memory in GiB, and the share of the iteration in which a
        role had nothing to do.

        A rollout requested ahead counts in the iteration that uses it, so a single iteration's idle share may
        be off; their mean is not.
        """
        means = {name: sum(values) / len(values) for name, values in self.values.items()}
        idle = {f"idle/{role}": max(0.0, 1 - busy / wall) for role, busy in self.busy.items()}
        return {**pooled(means), **self.seconds, "seconds/iteration": wall, **self.memory, **idle}
