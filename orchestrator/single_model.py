"""Training of one model on Ray Train: what pretraining and initialisation share.

The loop is the same on every rank: seeded batches by position, one engine step, a checkpoint now and then.
All that is random is named by (seed, update, sample), so any number of ranks computes the same thing and a
resumed run goes on with the same numbers.
"""

import math
import os
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, suppress
from typing import Any, Protocol

import ray
import ray.train
import ray.train.torch
import torch
import torch.distributed as dist
from ray.train import FailureConfig, ScalingConfig, WorkerGroupError
from ray.train import RunConfig as RayRunConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2._internal.exceptions import WorkerHealthCheckTimeoutError
from ray.util.queue import Queue
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from torch import Tensor

from infra import storage
from infra.tracking import Tracker
from orchestrator.checkpoints import Cadence
from orchestrator.cluster import Draining
from orchestrator.config import RunConfig
from orchestrator.fault import Fault, told
from orchestrator.recovery import Recovery
from orchestrator.run_state import DROPPED_AT_MOST, RunState
from orchestrator.stages import InitializeConfig, PretrainConfig
from workers.engine import TrainEngine, init_process_group
from workers.engine_state import Snapshot
from workers.failure import kind_of

LOOK_EVERY_S = 0.2
"""Seconds between two looks at what the ranks are to do."""
REPORT_EVERY = 10
TIMEOUT_S = 600.0


class Interrupted(Exception):
    """Training ended by request, after a checkpoint of so many updates."""

    def __init__(self, done: int):
        super().__init__(done)
        self.done = done


class Task(Protocol):
    """What one stage trains; it travels to every rank."""

    compile: bool

    def engine(self) -> TrainEngine:
        """This rank of the model in training, with its initial weights."""
        ...

    def open(self, device: torch.device) -> None:
        """Open data sets; called once on every rank."""
        ...

    def loss(
        self, module: Callable[..., Tensor], update: int, samples: range, *, batch: int, position: int
    ) -> Tensor:
        """The mean loss over `samples`, a part of this update's `batch`, which begins at `position`."""
        ...

    def export(self, engine: TrainEngine, path: str) -> None:
        """Publish the finished model; called on every rank."""
        ...


Settings = PretrainConfig | InitializeConfig
Report = Callable[[int, Mapping[str, float]], None]
"""Takes how many updates are done, and what a person follows of them."""


def train(
    config: RunConfig,
    state: RunState,
    task: Task,
    *,
    tracker: Tracker,
    progress: Callable[[int], AbstractContextManager[Report]],
    say: Callable[[str], None],
    asked_to_stop: Callable[[], bool] = lambda: False,
) -> str:
    """Train on the connected cluster until the last update, and return the model directory's path.

    Where ranks are lost, all are started anew and go on from the newest checkpoint, with the same numbers.
    `progress` is told how many updates are done already, and gives what to report the others to; `say` takes
    what a person should know; `asked_to_stop` is looked at now and then.

    Raises FloatingPointError where the loss, or the gradients of many updates in a row, are not finite,
    Interrupted where it ended by request, and GivenUp where a fault cannot be overcome.
    """
    stage = state.stage
    recovery = Recovery(getattr(config, stage).faults, stage=stage, furthest=state.done)
    with progress(state.done) as report:
        while True:
            reader = _Reader(state, report, tracker, say)
            try:
                return _attempt(config, state, task, reader, asked_to_stop)
            except Fault as fault:
                recovery.progressed(reader.done)
                time.sleep(recovery.failed(fault, reader.done))
                state = reader.state
                storage.clean(f"{state.output}/checkpoints")
                recovery.recovered(state.done)
                tracker.metrics(reader.done, {"fault/faults": len(recovery.events)})
                say(
                    f"{stage}: FAULT ({fault.kind}, found after {reader.done} updates: {fault}); going on "
                    f"from {state.done}"
                )


def _attempt(
    config: RunConfig, state: RunState, task: Task, reader: "_Reader", asked_to_stop: Callable[[], bool]
) -> str:
    """Ranks that train from `state` on to the last update; Fault where some are lost."""
    settings: Settings = getattr(config, state.stage)
    orders = queue()
    trainer = TorchTrainer(
        _loop,
        train_loop_config={
            "settings": settings,
            "seed": config.seed,
            "state": state,
            "task": task,
            "reports": reader.reports,
            "orders": orders,
        },
        torch_config=TorchConfig(timeout_s=int(TIMEOUT_S)),
        scaling_config=ScalingConfig(
            num_workers=settings.role.ranks,
            use_gpu=settings.role.gpus > 0,
            resources_per_worker={"CPU": settings.role.cpus, "GPU": settings.role.gpus},
        ),
        run_config=RayRunConfig(
            name=state.stage,
            storage_path=str(storage.scratch(settings.output) / "ray"),
            # `train` makes the ranks anew: it knows what is worth it, and from where they go on.
            failure_config=FailureConfig(max_failures=0),
        ),
    )
    # Beside the main thread, of which Ray Train would take the handler of Ctrl-C.
    fitted: Future[Any] = Future()
    threading.Thread(target=_fit, args=(trainer, fitted), daemon=True).start()
    stopping, draining = False, Draining()
    try:
        while not wait([fitted], LOOK_EVERY_S).done:
            if asked_to_stop() and not stopping:
                tell(orders, "stop")
                stopping = True
            if nodes := draining.begun(reader.nodes):
                reader.say(f"{state.stage}: node {', '.join(nodes)} is being drained: a checkpoint is made")
                tell(orders, "checkpoint")
        fitted.result()
    except WorkerGroupError as error:
        raise _cause(state.stage, error) from error
    finally:
        reader.end()
        orders.shutdown()
    if reader.at is not None:
        raise Interrupted(reader.at)
    return state.model


def queue() -> Queue:
    """A queue between driver and ranks, which ends with the driver's node and with no other."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return Queue(actor_options={"num_cpus": 0, "scheduling_strategy": here})


def _fit(trainer: TorchTrainer, fitted: "Future[Any]") -> None:
    try:
        fitted.set_result(trainer.fit())
    except BaseException as error:
        fitted.set_exception(error)


def tell(to: Queue, what: Any) -> None:
    """Put it into a queue; nothing where that is lost, so that nobody reads it."""
    with suppress(ray.exceptions.RayError):
        to.put(what)


def _cause(stage: str, error: WorkerGroupError) -> Exception:
    """The user's mistake behind a failed worker group, or else a Fault."""
    found = [_failure(stage, failure) for failure in error.worker_failures.values()]
    mistakes = (each for each in found if not isinstance(each, Fault))
    # A rank that is lost leaves the others waiting, whose word therefore counts least.
    faults = sorted((each for each in found if isinstance(each, Fault)), key=lambda each: each.kind == "peer")
    return next(mistakes, None) or next(iter(faults), Fault(stage, "peer", str(error)))


def _failure(stage: str, failure: Exception) -> Exception:
    """What one rank says, or what is said of it."""
    failure = getattr(failure, "health_check_failure", failure)
    if isinstance(failure, ray.exceptions.RayError):
        return told(stage, failure)
    if isinstance(failure, WorkerHealthCheckTimeoutError):
        return Fault(stage, "lost", f"a {stage} rank gives no answer")
    for known in (ValueError, FloatingPointError):
        if isinstance(failure, known):
            return known(str(failure))
    return Fault(stage, kind_of(failure), f"{stage}: {type(failure).__name__}: {failure}")


class _Reader(threading.Thread):
    """Reads what rank 0 of one group of ranks reports."""

    def __init__(self, state: RunState, report: Report, tracker: Tracker, say: Callable[[str], None]):
        super().__init__(daemon=True)
        self.reports, self.report, self.tracker, self.say = queue(), report, tracker, say
        self.at: int | None = None
        """Updates after which the ranks ended by request."""
        self.state = state
        """With the newest checkpoint that is known of."""
        self.done = state.done
        """Updates that are made, as far as is known."""
        self.nodes: set[str] = set()
        """Ids of the nodes that the ranks run on."""
        self.start()

    def run(self) -> None:
        with suppress(ray.exceptions.RayError):  # the queue is lost, on which rank 0 fails when it reports
            while (said := self.reports.get()) is not None:
                self.read(said)

    def read(self, said: Any) -> None:
        match said:
            case str():
                self.say(said)
            case int():
                self.at = said
            case set():
                self.nodes = said
            case {"saved": (done, position)}:
                self.state, self.done = self.state.at(done, position), max(self.done, done)
            case update, values:
                self.done = update
                dropped = values["dropped_updates"]
                losses = {"loss": values["loss"], **({"dropped updates": dropped} if dropped else {})}
                self.report(update, losses)
                self.tracker.metrics(update, values)

    def end(self) -> None:
        """Wait until all is read that was reported."""
        tell(self.reports, None)
        self.join()
        self.reports.shutdown()


def join() -> tuple[int, int]:
    """This rank of Ray Train joins the others, on the device that Ray Train names; its number, and theirs."""
    context = ray.train.get_context()
    rank, ranks = context.get_world_rank(), context.get_world_size()
    init_process_group(
        rank=rank,
        world_size=ranks,
        master_addr=os.environ["MASTER_ADDR"],
        master_port=int(os.environ["MASTER_PORT"]),
        timeout_s=TIMEOUT_S,
        gpu=ray.train.torch.get_device().index or 0,
    )
    return rank, ranks


def _loop(config: Mapping[str, Any]) -> None:
    settings: Settings = config["settings"]
    state: RunState = config["state"]
    task: Task = config["task"]
    torch.set_num_threads(settings.role.threads)
    rank, ranks = join()
    orders = _Orders(config["orders"]) if rank == 0 else None
    nodes: list[str] = [""] * ranks
    dist.all_gather_object(nodes, ray.get_runtime_context().get_node_id())
    if orders:
        config["reports"].put(set(nodes))
    torch.manual_seed(config["seed"])
    engine = task.engine()
    task.open(engine.device)
    if state.checkpoint:
        with storage.reading(state.checkpoint) as directory:
            engine.load(directory)
    module = torch.compile(engine.module) if task.compile else engine.module
    parts = ranks * settings.role.engine.accumulation
    size = settings.batch // parts
    dropped = in_a_row = 0
    checkpoints = _Checkpoints(state, config["reports"])
    cadence = Cadence(settings.checkpoint_every, settings.checkpoint_minutes)
    for update in range(state.done, settings.updates):
        position = state.position + (update - state.done) * settings.batch
        total = torch.zeros((), dtype=torch.float64)
        for part in range(rank, parts, ranks):
            samples = range(part * size, (part + 1) * size)
            loss = task.loss(module, update, samples, batch=settings.batch, position=position)
            engine.backward(loss)
            total += loss.detach().cpu().double() / parts
        done, stop, due = update + 1, False, False
        if orders:  # whether to stop, or to make a checkpoint, is rank 0's to say: clocks and signals differ
            stop, asked = orders.stop, orders.checkpoint
            orders.checkpoint = False
            due = cadence.due(done, asked=stop or asked or done == settings.updates)
        shared = torch.stack([total, total.new_tensor(float(due)), total.new_tensor(float(stop))])
        if ranks > 1:
            dist.all_reduce(shared)
        value, due, stop = shared[0].item(), bool(shared[1]), bool(shared[2])
        if settings.not_finite == "stop" and not math.isfinite(value):
            what = f"the loss of update {update} is not finite"
            raise _stopped(checkpoints, what, update - in_a_row, update)
        result = engine.step()
        dropped += not result.stepped
        in_a_row = 0 if result.stepped else in_a_row + 1
        if in_a_row == (1 if settings.not_finite == "stop" else min(DROPPED_AT_MOST, settings.updates)):
            what = f"the gradients of {in_a_row} updates in a row, up to {update}, are not finite"
            raise _stopped(checkpoints, what, update + 1 - in_a_row, update)
        if rank == 0 and (done % REPORT_EVERY == 0 or done == settings.updates):
            config["reports"].put(
                (
                    done,
                    {
                        "loss": value,
                        "grad_norm": result.grad_norm,
                        "learning_rate": result.learning_rate,
                        "dropped_updates": dropped,
                    },
                )
            )
        checkpoints.warn(checkpoints.look())
        if due:
            checkpoints.warn(checkpoints.look(wait=True))
            try:
                checkpoints.begin(engine, done, position + settings.batch)
            except FloatingPointError as error:
                raise _stopped(checkpoints, f"{error} after update {done - 1}", done, done) from None
        if stop and done < settings.updates:
            checkpoints.warn(checkpoints.look(wait=True))
            if rank == 0:
                config["reports"].put(done)
            return
    if problem := checkpoints.look(wait=True):
        raise storage.StorageError(problem)
    task.export(engine, state.model)


class _Orders(threading.Thread):
    """What the driver asks of the ranks."""

    def __init__(self, orders: Queue):
        super().__init__(daemon=True)
        self.orders, self.stop, self.checkpoint = orders, False, False
        self.start()

    def run(self) -> None:
        with suppress(ray.exceptions.RayError):  # the run is over
            while order := self.orders.get():
                setattr(self, order, True)


class _Checkpoints:
    """Checkpoints that every rank writes its part of beside training; all methods are for all ranks at once.

    A store that fails is said, and training goes on to the next checkpoint.
    """

    def __init__(self, state: RunState, reports: Queue):
        self.state, self.reports = state, reports
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._writing: Future[None] | None = None
        self._publishing = False

    def begin(self, engine: TrainEngine, done: int, position: int) -> None:
        """Begin one, where none is being written; waits for copies, and for the store to answer once.

        FloatingPointError, on every rank and with nothing begun, where what was learned is not finite.
        """
        self.done, self._position, self._publishing = done, position, False
        snapshot, path = engine.snapshot(), self.state.path(done)
        staging = refused = None
        if dist.get_rank() == 0:
            try:
                staging = storage.begin(path)
            except storage.StorageError as error:
                refused = str(error)
        self._staging, refused = share((staging, refused))
        if refused is not None:
            self._writing = Future()
            self._writing.set_exception(storage.StorageError(refused))
        else:
            self._writing = self._thread.submit(_write, self._staging, snapshot)

    def look(self, *, wait: bool = False) -> str | None:
        """Publish what all ranks have written by now; with `wait` it does not return before. Why what was
        begun could not be stored."""
        while self._writing is not None:
            told: list[str | None] = [None] * dist.get_world_size()
            dist.all_gather_object(told, _problem(self._writing, wait=wait))
            if None in told:  # still being written
                return None
            if problem := next(filter(None, told), None):
                self._writing = None
                if dist.get_rank() == 0 and self._staging is not None:
                    with suppress(storage.StorageError):  # then it is left, and later cleaned
                        storage.discard(self._staging)
                return problem
            if self._publishing:
                self._writing = None
                if dist.get_rank() == 0:
                    self.reports.put({"saved": (self.done, self._position)})
            else:
                self._publishing = True
                publish = self.state.publish if dist.get_rank() == 0 else _nothing
                self._writing = self._thread.submit(publish, self._staging, self.done, self._position)
        return None

    def warn(self, problem: str | None) -> None:
        if problem is not None and dist.get_rank() == 0:
            what = f"no checkpoint after update {self.done - 1}, the next will be tried"
            self.reports.put(f"{self.state.stage}: WARNING: {what}: {problem}")


def _write(staging: str, snapshot: Snapshot) -> None:
    with storage.writing(staging) as directory:
        snapshot.write(directory)


def _nothing(*_: Any) -> None:
    pass


def _problem(writing: "Future[None]", *, wait: bool) -> str | None:
    """Why it failed, "" where it did not, None where it still goes on."""
    if not wait and not writing.done():
        return None
    try:
        writing.result()
    except storage.StorageError as error:
        return str(error)
    return ""


def _stopped(checkpoints: _Checkpoints, what: str, since: int, until: int) -> FloatingPointError:
    """The same error on every rank; called on all of them."""
    checkpoints.warn(checkpoints.look(wait=True))  # it may hold what led there, and is then moved aside
    state = checkpoints.state
    rates, error = [f"{state.stage}.role.engine.learning_rate"], None
    if dist.get_rank() == 0:
        error = str(state.stop(f"{state.stage}: {what}", since=since, until=until, rates=rates))
    return FloatingPointError(share(error))


def share(value: Any) -> Any:
    """Rank 0's value, on every rank."""
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]
