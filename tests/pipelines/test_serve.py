"""`self-forcing serve` as a command: HTTPS, HAProxy, tokens and tickets, and the end by a signal."""

import datetime
import ipaddress
import os
import signal
import socket
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
from pipelines import cli
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


@pytest.fixture(params=["https", pytest.param("haproxy", marks=pytest.mark.by_hand)])
def server(
    request: pytest.FixtureRequest, tmp_path: Path, certificate: tuple[Path, Path]
) -> Iterator[tuple[subprocess.Popen, str, ssl.SSLContext | None]]:
    """The command's process, what its URLs have after `http`, and whom clients trust: over HTTPS, or behind
    HAProxy."""
    (tmp_path / "tokens").write_text(TOKEN)
    model = write_student(tmp_path / "model")
    (port,) = free_ports(1)
    arguments = ["serve", "--model", str(model), "--port", str(port), "--cpus", "0.1", "--drain_s", "1"]
    arguments += ["--access.tokens", str(tmp_path / "tokens")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    if request.param == "https":
        arguments += ["--certificate", str(certificate[0]), "--key", str(certificate[1])]
        address, trusted = f"s://127.0.0.1:{port}", ssl.create_default_context(cafile=str(certificate[0]))
    else:
        environment |= {
            "RAY_SERVE_ENABLE_HA_PROXY": "1",
            "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "1",
        }
        address, trusted = f"://127.0.0.1:{port}", None
    process = subprocess.Popen(
        [sys.executable, "-m", "pipelines.cli", *arguments],
        cwd=tmp_path,
        env=environment,
        start_new_session=True,
    )
    yield process, address, trusted
    if process.poll() is None:
        process.kill()


@pytest.mark.slow
def test_the_command_serves_who_has_a_token(
    server: tuple[subprocess.Popen, str, ssl.SSLContext | None],
) -> None:
    process, address, trusted = server
    verify = trusted or True

    def answers() -> bool:
        assert process.poll() is None
        try:
            return httpx.get(f"http{address}/healthz", verify=verify, timeout=60).is_success
        except httpx.TransportError:
            return False

    eventually(answers)
    with httpx.Client(base_url=f"http{address}", verify=verify, timeout=60) as client:
        refused = client.get("/v1/models")
        assert refused.status_code == 401 and refused.headers["www-authenticate"] == "Bearer"
        mine = {"Authorization": f"Bearer {TOKEN}"}
        assert client.get("/v1/models", headers=mine).is_success
        ticket = client.post("/v1/tickets", headers=mine).json()["ticket"]
        assert (
            client.post("/v1/tickets", headers={**mine, "Origin": "https://evil.example"}).status_code == 403
        )
        url = f"ws{address}/v1/realtime/video?ticket={ticket}"
        for answer in ("session.pong", "invalid_token"):
            with connect(url, ssl=trusted, open_timeout=60) as socket:
                if answer == "session.pong":
                    socket.send('{"type": "session.ping"}')
                assert answer in str(socket.recv(timeout=60))
    # Either way it ends as asked, and leaves nothing behind.
    how, code = (signal.SIGTERM, 143) if trusted else (signal.SIGINT, 130)
    process.send_signal(how)
    assert process.wait(timeout=120) == code
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)


@pytest.mark.slow
@pytest.mark.by_hand
def test_a_port_that_is_taken_is_named_before_anything_starts(tmp_path: Path) -> None:
    model = write_student(tmp_path / "model")
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        command = [sys.executable, "-m", "pipelines.cli", "serve", "--model", str(model), "--port", str(port)]
        ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 2
    assert ended.stderr == (
        f"self-forcing: port {port} of 127.0.0.1 is taken by another server; choose another port.\n"
    )


def test_behind_haproxy_there_are_tokens_and_no_https(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RAY_SERVE_ENABLE_HA_PROXY", "1")
    assert cli.main(["serve"]) == 2
    assert "tokens are needed: name a file at access.tokens" in capfd.readouterr().err
    assert cli.main(["serve", "--certificate", "a.pem", "--key", "b.pem"]) == 2
    assert "there is no HTTPS: leave out certificate and key" in capfd.readouterr().err


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
