"""Moving digits: data, a suite and an experiment, small enough for a laptop."""

from pipelines.command import ON_RAY, Command, Option

SUITES = {"digits": "pipelines.digits.suite"}
SOURCES = {"digits": "pipelines.digits.data"}
COMMANDS = {
    "experiment": Command(
        "train and measure every cell of an experiment, such as exposure-bias",
        "pipelines.digits.experiment:command",
        options=(Option("name", "experiment file, or the name of one that ships with the package"), *ON_RAY),
        passes_on=True,
    )
}
