"""A real S3 endpoint (moto's) that can fail, be down, and count what it was asked."""

import os
import random
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import boto3
from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import WSGIRequestHandler, make_server

from infra.storage import s3


class _Silent(WSGIRequestHandler):
    def log(self, *_: object) -> None:
        pass


class S3Server:
    """It listens from now on."""

    def __init__(self) -> None:
        self.fails = 0.0
        """Share of requests that are answered with 503."""
        self.cuts = 0
        """Contents of objects from now on that break off in the middle."""
        self.down = False
        self.asked: Counter[str] = Counter()
        """Requests by method and the last part of their path."""
        self._chance = random.Random(0)
        self._app = DomainDispatcherApplication(create_backend_app)
        self._server = make_server("127.0.0.1", 0, self._answer, threaded=True, request_handler=_Silent)
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self.environment = {
            "AWS_ENDPOINT_URL": self.url,
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_DEFAULT_REGION": "us-east-1",
        }

    def _answer(self, environ: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
        self.asked[f"{environ['REQUEST_METHOD']} {environ['PATH_INFO'].rpartition('/')[2]}"] += 1
        if self.down or self._chance.random() < self.fails:
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
            start("503 Slow Down", [("Content-Type", "text/plain"), ("Connection", "close")])
            return [b""]
        answer = self._app(environ, start)
        listing = "list-type" in environ["QUERY_STRING"]
        if not self.cuts or environ["REQUEST_METHOD"] != "GET" or listing:
            return answer
        self.cuts -= 1
        content = b"".join(answer)
        return [content[: len(content) // 2]]

    def create(self, bucket: str) -> None:
        boto3.client(
            "s3",
            "us-east-1",
            endpoint_url=self.url,
            aws_access_key_id="key",
            aws_secret_access_key="secret",
        ).create_bucket(Bucket=bucket)  # fmt: skip

    def stop(self) -> None:
        self._server.shutdown()


@contextmanager
def reached(server: S3Server, **more: str) -> Iterator[None]:
    """This process reaches the server inside the block, as one does whose environment says so."""
    before = dict(os.environ)
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        del os.environ[name]
    os.environ.update(server.environment | more)
    s3._client.cache_clear()
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
        s3._client.cache_clear()
