"""`self-forcing serve` as a command: HTTPS, tokens and tickets, and the end by a signal."""

import datetime
import ipaddress
import os
import signal
import ssl
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import yaml
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from ray.serve.schema import ServeDeploySchema
from websockets.sync.client import connect

from orchestrator.serving.app import build
from tests.cluster import free_ports
from tests.orchestrator.serving.conftest import eventually, write_student

TOKEN = "0123456789abcdef-for-a-test"
ROOT = Path(__file__).parents[2]


@pytest.fixture
def certificate(tmp_path: Path) -> tuple[Path, Path]:
    """A certificate of its own for this machine, and its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "127.0.0.1")])
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(
            x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), False
        )
        .sign(key, hashes.SHA256())
    )
    (tmp_path / "certificate.pem").write_bytes(made.public_bytes(serialization.Encoding.PEM))
    (tmp_path / "key.pem").write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
    )
    return tmp_path / "certificate.pem", tmp_path / "key.pem"


@pytest.fixture
def server(tmp_path: Path, certificate: tuple[Path, Path]) -> Iterator[tuple[subprocess.Popen, int]]:
    (tmp_path / "tokens").write_text(TOKEN)
    model = write_student(tmp_path / "model")
    (port,) = free_ports(1)
    arguments = ["serve", "--model", str(model), "--port", str(port), "--cpus", "0.1", "--drain_s", "1"]
    arguments += ["--certificate", str(certificate[0]), "--key", str(certificate[1])]
    arguments += ["--access.tokens", str(tmp_path / "tokens")]
    process = subprocess.Popen(
        [sys.executable, "-m", "pipelines.cli", *arguments],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        start_new_session=True,
    )
    yield process, port
    if process.poll() is None:
        process.kill()


@pytest.mark.slow
def test_the_command_serves_over_https_to_who_has_a_token(
    server: tuple[subprocess.Popen, int], certificate: tuple[Path, Path]
) -> None:
    process, port = server
    trusted = ssl.create_default_context(cafile=str(certificate[0]))

    def answers() -> bool:
        assert process.poll() is None
        try:
            return httpx.get(f"https://127.0.0.1:{port}/healthz", verify=trusted, timeout=60).is_success
        except httpx.TransportError:
            return False

    eventually(answers)
    with httpx.Client(base_url=f"https://127.0.0.1:{port}", verify=trusted, timeout=60) as client:
        refused = client.get("/v1/models")
        assert refused.status_code == 401 and refused.headers["www-authenticate"] == "Bearer"
        mine = {"Authorization": f"Bearer {TOKEN}"}
        assert client.get("/v1/models", headers=mine).is_success
        ticket = client.post("/v1/tickets", headers=mine).json()["ticket"]
        assert (
            client.post("/v1/tickets", headers={**mine, "Origin": "https://evil.example"}).status_code == 403
        )
        url = f"wss://127.0.0.1:{port}/v1/realtime/video?ticket={ticket}"
        for answer in ("session.pong", "invalid_token"):
            with connect(url, ssl=trusted, open_timeout=60) as socket:
                if answer == "session.pong":
                    socket.send('{"type": "session.ping"}')
                assert answer in str(socket.recv(timeout=60))
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=120) == 130


def test_what_platforms_deploy_is_well_formed_and_names_what_there_is() -> None:
    config = ServeDeploySchema.model_validate(yaml.safe_load((ROOT / "infra/serve/config.yaml").read_text()))
    (application,) = config.applications
    assert application.import_path == f"{build.__module__}:{build.__name__}"
    build(application.args)
    service = yaml.safe_load((ROOT / "infra/kuberay/rayservice.yaml").read_text())
    assert service["kind"] == "RayService"
    inner = ServeDeploySchema.model_validate(yaml.safe_load(service["spec"]["serveConfigV2"]))
    build(inner.applications[0].args)
    with pytest.raises(ValueError, match="slots is 0; it must be at least 1"):
        build({"slots": 0})
    with pytest.raises(ValueError, match="slotz"):
        build({"slotz": 1})
