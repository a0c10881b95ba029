"""Secrets are taken out by name, by shape and by value; what only resembles one stays."""

import pytest

from infra.redaction import Redactor, looks_secret


@pytest.mark.parametrize(
    "name",
    [
        "HF_TOKEN",
        "apiKey",
        "api_key",
        "aws.secret_access_key",
        "DB_PASSWORD",
        "passwd",
        "client-secret",
        "credentials",
        "GOOGLE_APPLICATION_CREDENTIALS",
        "private_key",
        "authToken",
        "Authorization",
        "hftoken",
        "encryption_keys",
    ],
)
def test_secret_names(name: str) -> None:
    assert looks_secret(name)


@pytest.mark.parametrize(
    "name", ["tokens_per_frame", "tokenizer", "monkey", "keyboard", "keyframes", "learning_rate", "path"]
)
def test_plain_names(name: str) -> None:
    assert not looks_secret(name)


@pytest.mark.parametrize(
    "text",
    [
        "postgresql://me:HIDDEN@host/db",
        "postgresql://me:x/HIDDEN@host/db",
        "http://HIDDEN@host:5000",
        "http://me:p@HIDDEN@host",
        "https://host/path?a=1&token=HIDDEN&b=2",
        "see https://host/p?X-Api-Key=HIDDEN",
        "--api-key HIDDEN --lr 1",
        "HF_TOKEN=HIDDEN python train.py",
        '{"password": "HIDDEN"}',
        "Authorization: Token HIDDEN",
        "curl -H 'Authorization: Bearer HIDDEN'",
        "Bearer HIDDENHIDDENHIDDEN",
        "hf_HIDDENHIDDENHIDDEN",
    ],
)
def test_secrets_inside_text(text: str) -> None:
    redacted = Redactor().text(text)
    assert "HIDDEN" not in redacted and "[redacted]" in redacted


@pytest.mark.parametrize(
    "text",
    [
        "a seven drifting left",
        "a secret garden behind the token booth, a key turning in the lock",
        "sqlite:////runs/mlflow.db",
        "http://127.0.0.1:5000/#/experiments/1/runs/2?compare=3",
        "lr=0.1 tokens=16",
    ],
)
def test_plain_text_stays(text: str) -> None:
    assert Redactor().text(text) == text


def test_values_of_secret_environment_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_SERVICE_TOKEN", "correct horse")
    assert Redactor().text("logged in with correct horse.") == "logged in with [redacted]."


def test_tree() -> None:
    tree = {
        "model": {"width": 96, "tokens_per_frame": 16, "qk_norm": True, "sizes": (1, 2.5), "text": None},
        "env_vars": {"HF_TOKEN": "x", "PIN_PASSWORD": 1234, "secrets": {"a": ["b"]}},
        "uris": ["http://me:x@host"],
    }
    assert Redactor().tree(tree) == {
        "model": {"width": 96, "tokens_per_frame": 16, "qk_norm": True, "sizes": [1, 2.5], "text": None},
        "env_vars": {"HF_TOKEN": "[redacted]", "PIN_PASSWORD": "[redacted]", "secrets": "[redacted]"},
        "uris": ["http://[redacted]@host"],
    }
