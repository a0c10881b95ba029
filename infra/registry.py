"""Models under names and versions, in MLflow's model registry.

A version is a copy of a model directory among the artifacts of a run of its own. So whoever trains into that
directory again changes no version, an earlier one can be served again, and every machine that reaches the
tracking server can fetch it. An alias names one version; a server can follow `models:/NAME@ALIAS`.

`promote` moves an alias and notes the version before as a tag of the new one, so that `roll_back` can return
to it. Whether a version is good enough is not decided here. mlflow is imported at the first question.
"""

import hashlib
import json
import re
import shutil
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

from infra import storage
from infra.mlflow_run import MlflowRun, load_mlflow, sqlite_file
from infra.provenance import git_commit, versions
from infra.redaction import Redactor
from infra.spool import record
from infra.tracking import checked_uri, flatten, root_cause

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion, RegisteredModel

CACHE = Path("~/.cache/self-forcing/models").expanduser()
_FOLDER = "model"  # of the run's artifacts
_BEFORE = "self_forcing.before."  # and the alias: the version that promotion replaced
_ABSENT = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")
"""What MLflow answers where there is no such model, version or alias; the last also for forbidden names."""


class NotRegistered(ValueError):
    """The registry answers, and has no such model, version or alias."""


class RegistryUnavailable(ValueError):
    """The registry does not answer, or not as one should: nothing is known about what it holds."""


@dataclass(frozen=True)
class Reference:
    """What a `models:/…` URI names: a version, or whichever version an alias names."""

    name: str
    version: int | None = None
    alias: str | None = None

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[\w.\-]+", self.name):
            raise ValueError(
                f"a registered model cannot be called {self.name!r}; use letters, digits, and any of '_', "
                "'.' and '-'."
            )
        allowed, reserved = r"[\w\-]+", r"(?i)latest|v\d+"
        if self.alias and (not re.fullmatch(allowed, self.alias) or re.fullmatch(reserved, self.alias)):
            raise ValueError(
                f"an alias cannot be called {self.alias!r}; use letters, digits, '_' and '-', but neither "
                "latest nor v1."
            )


@dataclass(frozen=True)
class Version:
    """One registered version."""

    name: str
    version: int
    source: str  # URI of the model directory among the run's artifacts
    run_id: str  # MLflow's, of the run that holds the version's metrics, params and artifacts

    def __str__(self) -> str:
        return f"models:/{self.name}/{self.version}"


@dataclass(frozen=True)
class Flavor:
    """How `mlflow.pyfunc.load_model` plays a model directory, and what `MLmodel` says of it."""

    loader: str
    """Module whose `_load_pyfunc` takes the directory."""
    inputs: Mapping[str, tuple[str, bool]]
    """Column → its MLflow type, and whether it must be given."""
    outputs: Mapping[str, str]
    example: Mapping[str, Any]
    """A row of inputs."""
    requirements: Sequence[str]

    def write(self, folder: Path, run_id: str) -> None:
        """`MLmodel` and what it names: an example of the input, and requirements."""
        from mlflow.models import Model, ModelSignature
        from mlflow.pyfunc import add_to_model
        from mlflow.types import ColSpec, Schema
        from mlflow.utils.environment import _PythonEnv

        columns: list[Any] = [ColSpec(kind, name, required) for name, (kind, required) in self.inputs.items()]
        signature = ModelSignature(
            Schema(columns), Schema([ColSpec(kind, name) for name, kind in self.outputs.items()])
        )
        example = {"columns": list(self.example), "data": [list(self.example.values())]}
        (folder / "input_example.json").write_text(json.dumps(example))
        (folder / "requirements.txt").write_text("\n".join(self.requirements) + "\n")
        _PythonEnv.current().to_yaml(str(folder / "python_env.yaml"))
        described = Model(
            _FOLDER,
            run_id,
            signature=signature,
            saved_input_example_info={
                "artifact_path": "input_example.json", "type": "dataframe", "pandas_orient": "split"
            },
        )  # fmt: skip
        add_to_model(described, self.loader, python_env="python_env.yaml")
        described.save(str(folder / "MLmodel"))


def parse(uri: str) -> Reference:
    """`models:/NAME@ALIAS` or `models:/NAME/VERSION`; ValueError for anything else."""
    match = re.fullmatch(r"models:/([^/@]+)(?:/(\d+)|@([^/@]+))", uri)
    if match is None:
        raise ValueError(
            f"{uri!r} names no registered model; use models:/NAME@ALIAS or models:/NAME/VERSION."
        )
    return Reference(match[1], int(match[2]) if match[2] else None, match[3])


class Registry:
    """The model registry of one tracking server. Every method may raise RegistryUnavailable."""

    def __init__(self, uri: str | None):
        """`uri`: tracking URI; ValueError where it is of no known kind. Nothing is asked yet."""
        self._redactor = Redactor()
        self.uri = checked_uri(uri, self._redactor)
        self.where = self._redactor.text(self.uri)  # without secrets, for messages

    def register(
        self,
        name: str,
        model: Path,
        *,
        experiment: str,
        params: Mapping[str, Any],
        metrics: Mapping[str, float],
        lineage: Mapping[str, str],
        files: Sequence[Path] = (),
        flavor: Flavor | None = None,
    ) -> Version:
        """Copies a model directory into a run of its own, and makes that the next version of `name`.

        `model` is complete and on this machine; `name` and `experiment` are created if absent. `params` are
        nested and become the run's params under dotted names, `metrics` are what was measured. `lineage` maps
        roles to tracking run ids of the model and its ancestors, which are linked where found; `files` are
        kept under `evaluation`. With a `flavor` MLflow can load the model itself. ValueError where MLflow
        allows no such name.
        """
        Reference(name)
        tags = {"stage": "register", **versions(), **git_commit()}
        opening = record("open", params=flatten(self._redactor.tree(params)), tags=tags, parents=lineage)
        records = [opening, record("artifact", path=str(model), folder=_FOLDER)]
        records += [record("artifact", path=str(file), folder="evaluation") for file in files]
        if metrics:
            records.append(record("metrics", step=0, values=metrics))
        with self._asking(), ExitStack() as held:
            run = MlflowRun.open(
                self.uri,
                experiment=experiment,
                run_id=uuid.uuid4().hex,
                name=f"register {name}",
                start_ms=opening["time"],
            )
            status = "FAILED"
            try:
                if flavor is not None:
                    described = held.enter_context(TemporaryDirectory(prefix="self-forcing-"))
                    flavor.write(Path(described), run.run_id)
                    records.append(record("artifact", path=described, folder=_FOLDER))
                for each in records:
                    if refused := run.deliver([each]):
                        where = f"the registry at {self.where}"
                        raise ValueError(f"{where} refused a part of the model: {refused[0]}.")
                made = self._create_version(name, run.run_id, lineage)
                status = "FINISHED"
            finally:
                with suppress(Exception):  # what went wrong before it matters more
                    run.deliver([record("close", status=status)])
        return made

    def resolve(self, uri: str) -> Version:
        """The version that a `models:/…` URI names now, by one request: it may be asked every few seconds.

        ValueError for another URI; NotRegistered where there is no such model, version or alias.
        """
        wanted = parse(uri)
        try:
            with self._asking():
                if wanted.alias is not None:
                    return _version(self._client.get_model_version_by_alias(wanted.name, wanted.alias))
                return _version(self._client.get_model_version(wanted.name, str(wanted.version)))
        except NotRegistered:
            what, known = f"alias {wanted.alias}", sorted(self._model(wanted.name).aliases)
        if wanted.alias is None:
            with self._asking():
                found = self._client.search_model_versions(f"name = '{wanted.name}'")
            what, known = f"version {wanted.version}", [str(n) for n in sorted(int(v.version) for v in found)]
        raise NotRegistered(
            f"{wanted.name} has no {what} in the registry at {self.where}; it has "
            f"{', '.join(known) or 'none'}."
        )

    def named(self, name: str, alias: str) -> Version | None:
        """The version that an alias of `name` names, if there is one; NotRegistered without such a model."""
        version = self._model(name).aliases.get(alias)
        return None if version is None else self.resolve(f"models:/{name}/{version}")

    def recorded(self, version: Version) -> tuple[dict[str, float], dict[str, str]]:
        """Metrics and params that a version was registered with."""
        with self._asking():
            data = self._client.get_run(version.run_id).data
        return data.metrics, data.params

    def fetch(self, version: Version, cache: Path) -> Path:
        """A local directory with the version's model, whole.

        That of the registry itself where this machine has it; otherwise it is downloaded into `cache`, once,
        by whichever of several processes is first. StorageError where what the registry holds is unfinished
        or damaged, or lies on another machine's disk; RegistryUnavailable also where it has lost the files.
        """
        split = urlsplit(version.source)
        if split.scheme in ("", "file"):
            here = Path(url2pathname(split.path))
            try:
                with storage.reading(here):
                    return here
            except storage.StorageError as error:
                raise storage.StorageError(
                    f"{version} should lie at {here}, and this machine has no complete model there: {error}"
                ) from None
        digest = hashlib.sha256(version.source.encode()).hexdigest()[:16]
        target = cache.absolute() / f"{version.name}-{version.version}-{digest}"
        if storage.is_complete(target):
            return target
        shutil.rmtree(target, ignore_errors=True)  # what tidies caches may have taken a part of it
        staging = Path(storage.begin(target))
        try:
            with self._asking():
                from mlflow.artifacts import download_artifacts

                download_artifacts(version.source, dst_path=str(staging), tracking_uri=self.uri)
            (downloaded,) = staging.iterdir()
            storage.place(downloaded, target)
        except storage.StorageError as error:
            where = f"{version} is damaged in the registry at {self.where}"
            raise storage.StorageError(f"{where}: {error}") from None
        finally:
            shutil.rmtree(staging)
        return target

    def promote(self, version: Version, alias: str, *, before: Version | None) -> None:
        """Has `alias` name `version` from now on, and notes that it named `before` until now."""
        number, tag = str(version.version), _BEFORE + alias
        with self._asking():
            # The note comes first: it means nothing until the alias is here.
            if before is None:
                self._client.delete_model_version_tag(version.name, number, tag)
            else:
                self._client.set_model_version_tag(version.name, number, tag, str(before.version))
            self._client.set_registered_model_alias(version.name, alias, number)

    def roll_back(self, name: str, alias: str) -> tuple[Version, Version]:
        """Has `alias` name the version again that the last `promote` replaced.

        Returns the version that it named, and the one that it names now. NotRegistered where there is no such
        model or alias, or nothing to go back to.
        """
        left = self.resolve(f"models:/{name}@{alias}")
        number, tag = str(left.version), _BEFORE + alias
        with self._asking():
            before = self._client.get_model_version(name, number).tags.get(tag)
        if before is None:
            raise NotRegistered(
                f"there is nothing to go back to: {alias} names version {number} of {name}, and no "
                "promotion put it in the place of another."
            )
        restored = self.resolve(f"models:/{name}/{before}")
        with self._asking():
            self._client.set_registered_model_alias(name, alias, before)
            self._client.delete_model_version_tag(name, number, tag)
        return left, restored

    @cached_property
    def _client(self) -> "MlflowClient":
        database = sqlite_file(self.uri)
        if database and not database.exists():  # MLflow would make an empty one
            what = f"there is no registry yet at {self.where}"
            raise NotRegistered(f"{what}; `self-forcing register` makes one.")
        from mlflow.tracking import MlflowClient

        return MlflowClient(self.uri, registry_uri=self.uri)

    def _model(self, name: str) -> "RegisteredModel":
        try:
            with self._asking():
                return self._client.get_registered_model(name)
        except NotRegistered:
            what = f"there is no model {name} in the registry at {self.where}"
            raise NotRegistered(f"{what}; `self-forcing register` makes one.") from None

    def _create_version(self, name: str, run_id: str, lineage: Mapping[str, str]) -> Version:
        from mlflow.exceptions import MlflowException

        try:
            self._client.create_registered_model(name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        source = f"{self._client.get_run(run_id).info.artifact_uri}/{_FOLDER}"
        tags = {f"lineage.{role}": ancestor for role, ancestor in lineage.items()}
        return _version(self._client.create_model_version(name, source, run_id, tags, await_creation_for=0))

    @contextmanager
    def _asking(self) -> Iterator[None]:
        """What MLflow raises, as NotRegistered or RegistryUnavailable."""
        load_mlflow()
        from mlflow.exceptions import MlflowException

        try:
            yield
        except ValueError:  # ours
            raise
        except Exception as error:  # databases and object stores raise what their clients raise
            if isinstance(error, MlflowException) and error.error_code in _ABSENT:
                raise NotRegistered(self._redactor.line(str(error))) from None
            reason = self._redactor.line(root_cause(error)).rstrip(".")
            raise RegistryUnavailable(f"the registry at {self.where} does not answer ({reason}).") from error


def find(model: str, uri: str | None) -> tuple[str, str]:
    """Version and place of a model: of the registry at `uri` for a `models:/…` URI, else "1" and `model`.

    ValueError where the registry has no such model, or does not answer.
    """
    if not model.startswith("models:/"):
        return "1", model
    registry = Registry(uri)
    version = registry.resolve(model)
    return str(version.version), str(registry.fetch(version, CACHE))


def _version(version: "ModelVersion") -> Version:
    return Version(version.name, int(version.version), version.source or "", version.run_id or "")
