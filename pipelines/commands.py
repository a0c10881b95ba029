"""The commands: for each name what it does, which settings of a recipe it uses, and its own options.

A command is an entry of `COMMANDS`. Its function lives in a file of its own, is imported when the command is
used (Ray, torch and DeepSpeed take seconds), and is called with the config and the parsed options. To give a
command another option, add an `Option` to its entry and read it from `options`. This module imports no other.
"""

from collections.abc import Mapping

from pipelines.command import ADDRESS, ALLOW_CHANGE, ON_RAY, REGISTER, RUN_CONFIG, Command, Option
from pipelines.tenants import brought

REGISTRY = (
    Option(
        "--tracking.uri",
        "MLflow: sqlite:///path/to/mlflow.db or http://host:port; MLFLOW_TRACKING_URI by default",
    ),
    Option("--root", "directory whose outputs/mlflow.db it is where no URI is given", path=True, default="."),
)
MODELS = ("seed", "root", "video", "text", "teacher", "student", "rollout", "data", "tracking")


def _stage(help: str, function: str, uses: tuple[str, ...] | None, *options: Option) -> Command:
    return Command(help, function, RUN_CONFIG, uses, recipe=True, options=(*ON_RAY, *options))


COMMANDS: Mapping[str, Command] = {
    "prepare": _stage(
        "write the data sets that the recipe's data.source makes",
        "pipelines.prepare:command",
        ("seed", "root", "data", "video"),
    ),
    "pretrain": _stage(
        "train the bidirectional teacher",
        "pipelines.pretrain:command",
        (*MODELS, "pretrain"),
        ALLOW_CHANGE,
    ),
    "initialize": _stage(
        "make the initial student, from the teacher's ODE pairs or from data",
        "pipelines.initialize:command",
        (*MODELS, "initialize", "distill"),
        ALLOW_CHANGE,
    ),
    "distill": _stage(
        "Self Forcing: distil the student from teacher and critic",
        "pipelines.distill:command",
        (*MODELS, "score", "distill", "evaluate", "placement"),
        ALLOW_CHANGE,
        *REGISTER,
    ),
    "plan": Command(
        "say how much memory a rank of each role of a distillation takes",
        "pipelines.plan:command",
        RUN_CONFIG,
        (*MODELS, "score", "distill", "placement"),
        recipe=True,
    ),
    "generate": Command(
        "make a video from a prompt",
        "pipelines.generate:command",
        options=(
            Option(
                "--model",
                "directory of a student, or models:/NAME@ALIAS",
                stored=True,
                registered=True,
                required=True,
            ),
            Option(
                "--registry", "tracking URI of the model registry; MLFLOW_TRACKING_URI where it is not given"
            ),
            Option("--prompt", "what the video shows", required=True),
            Option("--frames", "frames of the video; the trained length by default", type=int | None),
            Option("--seed", "another one makes another video", type=int, default=0),
            Option("--image", "file of the first frame, for image-to-video", stored=True),
            Option("--light-decoder", "weights of a TAEHV that decodes in place of the VAE", path=True),
            Option("--output", "path ending in .mp4 or .gif", stored=True, default="outputs/sample.mp4"),
        ),
    ),
    "evaluate": _stage(
        "measure teacher, initial and distilled student, as far as they are there",
        "pipelines.evaluate:command",
        (*MODELS, "distill", "evaluate", "placement"),
        Option("--export-vbench", "directory for MP4s under the names that VBench expects", stored=True),
    ),
    "run": _stage(
        "all stages that are not done yet, then evaluate",
        "pipelines.run:command",
        None,
        ALLOW_CHANGE,
        *REGISTER,
    ),
    "serve": Command(
        "stream a student to many viewers at once",
        "pipelines.serve:command",
        "orchestrator.serving.config:ServeConfig",
        options=(
            Option(
                "--host", "address to listen on; others than this machine's need tokens", default="127.0.0.1"
            ),
            Option("--port", "port to listen on", type=int, default=8000),
            Option("--certificate", "PEM file, for HTTPS", path=True),
            Option("--key", "PEM file of the certificate's key", path=True),
            ADDRESS,
        ),
    ),
    "embed": Command(
        "embed prompts by UMT5 into a data set for training, and the negative prompt beside it",
        "pipelines.embed:command",
        options=(
            Option("prompts", "file of prompts: .txt with one a line, .jsonl, .csv or .parquet", stored=True),
            Option(
                "--encoder", "folder of UMT5 and its tokenizer, or a pipeline's", path=True, required=True
            ),
            Option("--output", "directory of the data set", stored=True, required=True),
            Option("--column", "column of the prompts, but for .txt", default="prompt"),
            Option("--negative", "negative prompt of classifier-free guidance", default=""),
            Option("--text_len", "most tokens that the model reads", type=int, default=512),
            Option("--actors", "actors that embed, each with an encoder of its own", type=int, default=1),
            Option("--cpus", "logical CPUs of an actor", type=float, default=1.0),
            Option("--gpus", "GPUs of an actor", type=float, default=0.0),
            ADDRESS,
        ),
    ),
    "prepare-videos": Command(
        "turn video files and captions into a data set of the recipe's latents (or pixels) and prompts",
        "pipelines.prepare_videos:command",
        RUN_CONFIG,
        ("root", "video", "text", "student"),
        recipe=True,
        options=(
            Option(
                "--videos",
                "folder of video files or tars of them at any depth, a tar, or a table of places (.parquet, "
                ".csv or .jsonl with the columns video and caption)",
                stored=True,
                required=True,
            ),
            Option(
                "--captions", "table with the columns video and caption; NAME.txt beside each", stored=True
            ),
            Option("--output", "directory of the data set", stored=True, required=True),
            Option("--clips", "most clips of one file", type=int, default=100),
            Option("--scenes", "cut clips so that each lies within one shot", action="store_true"),
            Option("--actors", "actors that decode and encode", type=int, default=1),
            Option("--cpus", "logical CPUs of an actor", type=float, default=1.0),
            Option("--gpus", "GPUs of an actor", type=float, default=0.0),
            ADDRESS,
        ),
    ),
    "import": Command(
        "make a model of another tool's checkpoint: Wan's, diffusers', or Self Forcing's and its kin's",
        "pipelines.import_model:command",
        "pipelines.import_model:ImportConfig",
        options=(
            Option("source", "folder or file of the checkpoint", path=True),
            Option("--output", "directory of the model", stored=True, required=True),
            Option("--preset", "settings that the file does not hold, by the name of a preset", preset=True),
            Option("--part", "of a file that holds several models, such as generator or critic"),
            Option("--adapter", "LoRA file or folder that is added to the weights", path=True),
        ),
    ),
    "export": Command(
        "write a model in the layout of another tool",
        "pipelines.export:command",
        options=(
            Option("model", "directory of a model, or of a checkpoint of a distillation", stored=True),
            Option("--format", "diffusers, wan, pt or peft", required=True),
            Option("--output", "directory that is written", stored=True, required=True),
            Option("--dtype", "fp32 or bf16; what the weights are by default"),
            Option(
                "--weights", "of a checkpoint: average or current; average by default, where there is one"
            ),
            Option(
                "--base", "of a checkpoint of adapters: directory of the model that they are of", stored=True
            ),
        ),
    ),
    "register": Command(
        "make a student the next version of a registered model",
        "pipelines.register:command",
        options=(
            Option("model", "directory of a student", stored=True),
            Option("--name", "registered model, made if there is none", required=True),
            Option("--metrics", "evaluate.output, or its metrics.json, of this student", stored=True),
            Option("--alias", "promote the version to this alias, through the same gate"),
            Option("--tracking.experiment", "MLflow experiment of its run", default="self-forcing"),
            *REGISTRY,
        ),
    ),
    "promote": Command(
        "move an alias to a version that is no worse than the one it names, or roll back",
        "pipelines.promote:command",
        options=(
            Option("name", "registered model"),
            Option("version", "version to promote", type=int | None, nargs="?"),
            Option("--alias", "alias to move", default="serving"),
            Option(
                "--margin",
                "by how much each metric may be worse; null takes the suite's own margins",
                type=float | None,
            ),
            Option("--ungated", "promote without comparing any metric", action="store_true"),
            Option("--rollback", "return to the version before the last promotion", action="store_true"),
            *REGISTRY,
        ),
    ),
    "submit": Command(
        "run a command as a Ray job on a cluster, follow it, or stop it",
        "pipelines.submit:command",
        options=(
            Option("recipe", "recipe file, or the name of one that ships with the package", nargs="?"),
            Option("--command", "what the job runs", default="distill"),
            Option("--address", "job server, http://host:8265; RAY_API_SERVER_ADDRESS by default"),
            Option("--no-wait", "do not follow the job", action="store_true"),
            Option("--retries", "hand a failed job in again, with --resume", type=int, default=0),
            Option(
                "--grace",
                "seconds that the job has for its checkpoint when it is stopped, before it is killed",
                type=int,
                default=600,
            ),
            Option("--follow", "follow the job with this id"),
            Option("--stop", "stop the job with this id, once it has made a checkpoint"),
        ),
        passes_on=True,
    ),
    **brought("COMMANDS"),
}
