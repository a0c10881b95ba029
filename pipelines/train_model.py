"""Training of one model as a person sees it: progress, and an end by request."""

from functools import partial

from infra.tracking import Tracker
from orchestrator.config import RunConfig
from orchestrator.run_state import RunState, total_of
from orchestrator.single_model import Interrupted, Task, train
from pipelines.console import progress, say
from pipelines.stopping import stoppable


def train_model(config: RunConfig, state: RunState, task: Task, tracker: Tracker) -> str:
    """Train one model to its last update, and return its path; Stopped where it was asked to end before."""
    _, total = total_of(config, state.stage)
    with stoppable(state.stage) as stopping:
        try:
            return train(
                config,
                state,
                task,
                tracker=tracker,
                progress=partial(progress, state.stage, total),
                say=say,
                asked_to_stop=lambda: bool(stopping),
            )
        except Interrupted as ended:
            raise stopping.stop(ended.done) from None
