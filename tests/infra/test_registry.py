"""Registered models: a version stays as it was, whoever asks finds it, and silence is not mistaken for
absence."""

import json
import shutil
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from infra import storage
from infra.registry import NotRegistered, Reference, Registry, RegistryUnavailable, Version, parse
from infra.tracking import sqlite_uri
from tests.mlflow_server import Server, free_port


def publish(path: Path, content: str) -> Path:
    staging = storage.begin(path)
    with storage.writing(staging) as directory:
        (directory / "model.json").write_text(json.dumps({"content": content}))
        (directory / "transformer-00000.safetensors").write_bytes(content.encode() * 1000)
    storage.publish(staging, path, {})
    return path


def register(registry: Registry, name: str, model: Path, **overrides: Any) -> Version:
    defaults = {"experiment": "registry", "params": {}, "metrics": {}, "lineage": {}}
    return registry.register(name, model, **(defaults | overrides))


def content(directory: Path) -> str:
    storage.verify(directory)
    return json.loads((directory / "model.json").read_text())["content"]


@contextmanager
def web_server(folder: Path, heard: list[str | None] | None = None) -> Iterator[str]:
    """Something that answers HTTP, and is no MLflow: 404 with a page. It notes who says to be asking."""

    class Handler(SimpleHTTPRequestHandler):
        def __init__(self, *arguments: Any):
            super().__init__(*arguments, directory=str(folder))

        def parse_request(self) -> bool:
            parsed = super().parse_request()
            if heard is not None:
                heard.append(self.headers["Authorization"])
            return parsed

        def log_message(self, *arguments: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def test_a_token_goes_with_every_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "abc")
    heard: list[str | None] = []
    with web_server(tmp_path, heard) as url, pytest.raises(RegistryUnavailable):
        Registry(url).resolve("models:/digits/1")
    assert heard and set(heard) == {"Bearer abc"}


@pytest.mark.parametrize(
    ("uri", "reference"),
    [
        ("models:/digits@serving", Reference("digits", alias="serving")),
        ("models:/moving-digits_2.1/12", Reference("moving-digits_2.1", version=12)),
    ],
)
def test_uris_of_registered_models(uri: str, reference: Reference) -> None:
    assert parse(uri) == reference


@pytest.mark.parametrize(
    ("uri", "sentence"),
    [
        ("outputs/distilled/model", "use models:/NAME@ALIAS or models:/NAME/VERSION"),
        ("models:/digits", "use models:/NAME@ALIAS or models:/NAME/VERSION"),
        ("models:/digits/production", "use models:/NAME@ALIAS or models:/NAME/VERSION"),
        ("models:/digits@serving/model.json", "use models:/NAME@ALIAS or models:/NAME/VERSION"),
        ("models:/a' OR 'b@serving", "a registered model cannot be called"),
        ("models:/digits@latest", "an alias cannot be called 'latest'"),
        ("models:/digits@v2", "an alias cannot be called 'v2'"),
    ],
)
def test_what_names_no_registered_model(uri: str, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        parse(uri)


@pytest.mark.slow
def test_a_version_is_fetched_as_it_was_registered_by_any_number_of_processes(
    mlflow_server: Server, tmp_path: Path
) -> None:
    registry, client = Registry(mlflow_server.uri), mlflow_server.client()
    parent = client.create_run(client.create_experiment("parents")).info.run_id
    model = publish(tmp_path / "model", "first")
    report = tmp_path / "metrics.json"
    report.write_text("{}")
    version = register(
        registry,
        "fetched",
        model,
        params={"recipe": {"seed": 1, "hub": {"token": "hf_abcdefghijklmnop"}}},
        metrics={"digit_accuracy_inside": 0.75},
        lineage={"teacher": parent, "distilled": "ab" * 16},
        files=[report],
    )
    assert version == registry.resolve("models:/fetched/1") and version.version == 1

    run = client.get_run(version.run_id)
    assert (run.info.status, run.data.tags["stage"]) == ("FINISHED", "register")
    assert run.data.params == {"recipe.seed": "1", "recipe.hub.token": "[redacted]"}
    assert run.data.tags["lineage.teacher"] == parent
    assert client.get_run(parent).data.tags[f"lineage.child.{version.run_id}"] == "register"
    assert client.get_model_version("fetched", "1").tags == {
        "lineage.teacher": parent,
        "lineage.distilled": "ab" * 16,
    }
    assert registry.recorded(version) == ({"digit_accuracy_inside": 0.75}, run.data.params)
    assert [item.path for item in client.list_artifacts(version.run_id, "evaluation")] == [
        "evaluation/metrics.json"
    ]

    # The directory is trained into again, and registered again.
    second = register(registry, "fetched", publish(model, "second"))
    shutil.rmtree(model)
    cache = tmp_path / "cache"
    with ThreadPoolExecutor(4) as replicas:
        paths = list(replicas.map(lambda _: Registry(mlflow_server.uri).fetch(version, cache), range(4)))
    assert len(set(paths)) == 1 and content(paths[0]) == "first"
    assert content(registry.fetch(second, cache)) == "second"
    assert len(list(cache.iterdir())) == 2, "a download left something behind"

    # What is there is not asked for again; what lost a file is.
    silent = Registry(f"http://127.0.0.1:{free_port()}")
    assert silent.fetch(version, cache) == paths[0]
    (paths[0] / "model.json").unlink()
    with pytest.raises(RegistryUnavailable):
        silent.fetch(version, cache)
    assert content(registry.fetch(version, cache)) == "first"


@pytest.mark.slow
def test_a_version_that_was_damaged_is_not_handed_out(mlflow_server: Server, tmp_path: Path) -> None:
    registry = Registry(mlflow_server.uri)
    version = register(registry, "damaged", publish(tmp_path / "model", "good"))
    stored = mlflow_server.folder / "artifacts" / version.source.removeprefix("mlflow-artifacts:/")
    (stored / "transformer-00000.safetensors").write_bytes(b"evil" * 1000)
    with pytest.raises(
        storage.StorageError, match=r"models:/damaged/1 is damaged .*transformer-00000.safetensors"
    ):
        registry.fetch(version, tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.slow
def test_a_model_that_does_not_arrive_is_no_version(mlflow_server: Server, tmp_path: Path) -> None:
    registry, client = Registry(mlflow_server.uri), mlflow_server.client()
    with pytest.raises(ValueError, match=r"refused a part of the model: the artifact .*/nowhere is gone"):
        register(registry, "absent", tmp_path / "nowhere", experiment="absent")
    with pytest.raises(NotRegistered, match=r"there is no model absent in the registry at .* makes one"):
        registry.resolve("models:/absent/1")
    (run,) = client.search_runs([client.get_experiment_by_name("absent").experiment_id])
    assert run.info.status == "FAILED"


@pytest.mark.slow
def test_absent_is_not_unavailable(
    mlflow_server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = Registry(mlflow_server.uri)
    model = publish(tmp_path / "model", "weights")
    first, second = register(registry, "known", model), register(registry, "known", model)
    assert registry.named("known", "serving") is None
    registry.promote(second, "serving", before=None)
    assert registry.resolve("models:/known@serving") == registry.named("known", "serving") == second != first
    for uri, sentence in (
        ("models:/unknown@serving", "there is no model unknown in the registry at"),
        ("models:/unknown/1", "there is no model unknown in the registry at"),
        ("models:/known@canary", "known has no alias canary in .*; it has serving"),
        ("models:/known/7", "known has no version 7 in .*; it has 1, 2"),
    ):
        with pytest.raises(NotRegistered, match=sentence):
            registry.resolve(uri)

    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    database = tmp_path / "no.db"
    database.write_text("this is no database" * 1000)
    with socket.socket() as silent, web_server(tmp_path) as other:
        silent.bind(("127.0.0.1", 0))
        silent.listen()  # accepts, and never says a word
        for uri, reason in (
            (f"http://me:pa55word@127.0.0.1:{free_port()}", "refused"),
            (f"http://127.0.0.1:{silent.getsockname()[1]}", "timed out"),
            (other, "404"),
            (sqlite_uri(database), "not a database"),
        ):
            for ask in (
                lambda registry: registry.resolve("models:/known@serving"),
                lambda registry: registry.named("known", "serving"),
                lambda registry: register(registry, "known", model),
            ):
                with pytest.raises(RegistryUnavailable, match=rf"does not answer \(.*{reason}") as caught:
                    ask(Registry(uri))
                assert "pa55word" not in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=r"tracking\.uri is 'ftp://host', which is no tracking URI"):
        Registry("ftp://host")


@pytest.mark.slow
def test_roll_back_returns_step_by_step_and_only_from_what_promotion_moved(
    mlflow_server: Server, tmp_path: Path
) -> None:
    registry, client = Registry(mlflow_server.uri), mlflow_server.client()
    model = publish(tmp_path / "model", "weights")
    one, two, three = (register(registry, "moved", model) for _ in range(3))
    with pytest.raises(NotRegistered, match="moved has no alias serving"):
        registry.roll_back("moved", "serving")

    before = None
    for version in (one, two, three):
        registry.promote(version, "serving", before=before)
        before = version
    registry.promote(one, "canary", before=None)
    assert registry.roll_back("moved", "serving") == (three, two)
    assert registry.resolve("models:/moved@serving") == two
    assert registry.roll_back("moved", "serving") == (two, one)
    for alias in ("serving", "canary"):
        with pytest.raises(NotRegistered, match=f"nothing to go back to: {alias} names version 1 of moved"):
            registry.roll_back("moved", alias)
        assert registry.resolve(f"models:/moved@{alias}") == one

    # There and back again is two steps, not a circle.
    registry.promote(two, "serving", before=one)
    registry.promote(one, "serving", before=two)
    assert [registry.roll_back("moved", "serving")[1] for _ in range(2)] == [two, one]
    with pytest.raises(NotRegistered, match="nothing to go back to"):
        registry.roll_back("moved", "serving")

    # Moved by hand, and a version that is gone.
    registry.promote(two, "serving", before=one)
    client.set_registered_model_alias("moved", "serving", "3")
    with pytest.raises(NotRegistered, match="nothing to go back to: serving names version 3"):
        registry.roll_back("moved", "serving")
    registry.promote(two, "serving", before=three)
    client.delete_model_version("moved", "3")
    with pytest.raises(NotRegistered, match=r"moved has no version 3 in .*; it has 1, 2"):
        registry.roll_back("moved", "serving")
    assert registry.resolve("models:/moved@serving") == two


@pytest.mark.slow
def test_without_a_server_the_registry_is_an_sqlite_file(tmp_path: Path) -> None:
    registry = Registry(sqlite_uri(tmp_path / "outputs" / "mlflow.db"))
    with pytest.raises(NotRegistered, match=r"there is no model digits in .*outputs/mlflow.db; .* makes one"):
        registry.resolve("models:/digits@serving")
    assert list(tmp_path.iterdir()) == [], "looking into a registry must not make one"
    version = register(registry, "digits", publish(tmp_path / "model", "first"))
    registry.promote(version, "serving", before=None)
    shutil.rmtree(tmp_path / "model")

    found = Registry(registry.uri)
    directory = found.fetch(found.resolve("models:/digits@serving"), tmp_path / "cache")
    assert content(directory) == "first" and directory.is_relative_to(tmp_path / "outputs")
    assert not (tmp_path / "cache").exists()
    shutil.rmtree(directory)
    with pytest.raises(
        storage.StorageError, match=r"models:/digits/1 should lie at .* no complete model there"
    ):
        found.fetch(version, tmp_path / "cache")
