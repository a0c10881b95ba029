"""`self-forcing run`: every stage whose model is not there yet, then the evaluation."""

from typing import Any

from infra import storage
from orchestrator.cluster import connect
from orchestrator.config import RunConfig
from pipelines import suites
from pipelines.console import say
from pipelines.distill import make_student
from pipelines.evaluate import make_report
from pipelines.initialize import make_initial
from pipelines.prepare import prepare
from pipelines.pretrain import make_teacher
from pipelines.tracked import allowed, located


def command(config: RunConfig, options: Any) -> None:
    config, allow = located("run", config), allowed(options)
    suites.find(config.evaluate.suite)  # a wrong one would end the run when all else is done
    prepare(config)
    with connect(options.address) as cluster:
        for stage, model, make in (
            ("pretrain", config.distill.teacher, make_teacher),
            ("initialize", config.distill.student, make_initial),
            ("distill", f"{config.distill.output}/model", make_student),
        ):
            if storage.is_complete(model):
                say(f"{stage}: {model} is there already")
            else:
                make(config, resume=True, allow=allow)(cluster)
        make_report(config, resume=True)
