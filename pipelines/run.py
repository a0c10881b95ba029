"""`self-forcing run`: every stage that is not done yet, then the evaluation."""

from typing import Any

from orchestrator.cluster import connect
from orchestrator.config import RunConfig
from orchestrator.run_state import Stage
from pipelines import selection, suites
from pipelines.console import say
from pipelines.distill import make_student
from pipelines.evaluate import make_report
from pipelines.initialize import make_initial
from pipelines.prepare import prepare
from pipelines.pretrain import make_teacher
from pipelines.register import check_finish, finish
from pipelines.tracked import allowed, exclusive, is_done, located


def command(config: RunConfig, options: Any) -> None:
    config, allow = located("run", config), allowed(options)
    suites.find(config.evaluate.suite)  # a wrong one would end the run when all else is done
    selection.check_settings(config)
    check_finish(config, options, prompts=False)
    prepare(config)
    stages: tuple[tuple[Stage, str, Any], ...] = (
        ("pretrain", config.distill.teacher, make_teacher),
        ("initialize", config.distill.student, make_initial),
        ("distill", f"{config.distill.output}/model", make_student),
    )
    with connect(options.address) as cluster:
        for stage, model, make in stages:
            if is_done(config, stage, model, allow):
                say(f"{stage}: {model} is there already")
            else:
                with exclusive(config, stage):
                    make(config, resume=True, allow=allow)(cluster)
        make_report(config, resume=True)
        if options.register is not None:
            finish(config, options)
