"""Objects of an object store, under s3://BUCKET/KEY, through boto3.

Credentials, region and endpoint come from boto3's usual chain: the AWS_ variables, its files, or a role.
Requests that fail are sent again with backoff and jitter, for a minute at least and two and a half at most.
"""

import logging
import os
import random
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import boto3
from boto3.s3.transfer import TransferConfig
from botocore.config import Config
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    ConnectionError,
    HTTPClientError,
    IncompleteReadError,
)

from infra.storage.local import Location, StorageError
from infra.storage.manifest import file_digest

ATTEMPTS = 16
"""Times that a request is sent, which takes 73 to 145 seconds where none is answered."""
LONGEST_WAIT_S = 20.0
PART_BYTES = 2**26
"""Of a multipart upload: at most 10,000 parts make 640 GB a file."""
PAGE = 1000
"""Objects that are listed or deleted at once, the most that a store takes."""
THREADS = 8
_log = logging.getLogger(__name__)
T = TypeVar("T")

_ADVICE = {
    "NoSuchBucket": "there is no such bucket",
    "AccessDenied": "access is denied; these credentials may not do this",
    "403": "access is denied; these credentials may not do this",
    "InvalidAccessKeyId": "the store does not know this access key",
    "SignatureDoesNotMatch": "the secret key is wrong",
    "ExpiredToken": "the credentials have expired; renew them",
    "InvalidToken": "the session token is wrong",
    "RequestTimeTooSkewed": "this machine's clock is too far from the store's; set it",
    "PermanentRedirect": "the bucket lies in another region; set AWS_DEFAULT_REGION",
    "301": "the bucket lies in another region; set AWS_DEFAULT_REGION",
    "AuthorizationHeaderMalformed": "the bucket lies in another region; set AWS_DEFAULT_REGION",
    "404": "there is no such bucket or object",
    "NoSuchKey": "there is no such object",
}
_ABSENT = ("404", "NoSuchKey")
_TRANSIENT = (ConnectionError, HTTPClientError, IncompleteReadError)
_TRANSIENT_STATUS = (408, 429, 500, 502, 503, 504)
_TRANSIENT_CODES = ("InternalError", "RequestTimeout", "SlowDown", "ServiceUnavailable", "Throttling")


@dataclass(frozen=True)
class Place:
    """A key of a bucket; what lies there may be a file or, with a manifest, a directory."""

    bucket: str
    key: str  # without a slash at the end

    def __str__(self) -> str:
        return f"s3://{self.bucket}/{self.key}"

    def __truediv__(self, name: str) -> "Place":
        return Place(self.bucket, f"{self.key}/{name}" if self.key else name)

    @property
    def parent(self) -> "Place":
        return Place(self.bucket, self.key.rpartition("/")[0])


def at(location: Location) -> Place | None:
    """The place of an s3:// address, None for a path; StorageError for one without a key."""
    text = os.fspath(location)
    if not text.startswith("s3://"):
        return None
    bucket, _, key = text.removeprefix("s3://").partition("/")
    key = "/".join(part for part in key.split("/") if part)
    if not bucket or not key:
        raise StorageError(f"{text} names no place in a bucket; use s3://BUCKET/PREFIX.")
    return Place(bucket, key)


@contextmanager
def asking(place: Place) -> Iterator[Any]:
    """The store's client; what the store or the way to it says inside the block is a StorageError."""
    try:
        yield _client(os.getpid())
    except ClientError as error:
        code = error.response.get("Error", {}).get("Code", "")
        says = error.response.get("Error", {}).get("Message", "").strip().rstrip(".")
        raise StorageError(f"{place}: {_ADVICE.get(code) or f'the store says {code} ({says})'}.") from error
    except BotoCoreError as error:
        says = str(error).strip().rstrip(".")
        if type(error).__name__ in ("NoCredentialsError", "PartialCredentialsError"):
            says = "there are no credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or use a role"
        elif type(error).__name__ == "NoRegionError":
            says = "there is no region; set AWS_DEFAULT_REGION"
        raise StorageError(f"{place}: {says}.") from error


@cache
def _client(pid: int) -> Any:
    """One a process: clients may be shared by threads, but not by forks."""
    own = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    client = boto3.Session().client(
        "s3",
        config=Config(
            # `_wait` alone decides: botocore's modes give a client a quota of retries, which a store that
            # fails for long uses up, and then a single failure ends the run.
            retries={"mode": "standard", "total_max_attempts": 1},
            # MinIO and its kind answer at one name for all buckets.
            s3={"addressing_style": "path" if own else "auto"},
            connect_timeout=10,
            read_timeout=60,
            max_pool_connections=4 * THREADS,
        ),
    )
    client.meta.events.register("needs-retry.s3", _retried)
    return client


def _retried(attempts: int, response: Any, caught_exception: BaseException | None, **_: Any) -> float | None:
    """botocore's question after each request: seconds until it is sent again, None where it is not."""
    if response is None:
        transient = isinstance(caught_exception, _TRANSIENT)
    else:
        http, parsed = response
        code = parsed.get("Error", {}).get("Code")
        transient = http.status_code in _TRANSIENT_STATUS or code in _TRANSIENT_CODES
    return _wait(attempts) if transient and attempts < ATTEMPTS else None


def _wait(attempts: int) -> float:
    """Seconds before a request is sent again: exponential backoff, of which half is jitter."""
    return min(LONGEST_WAIT_S, 0.025 * 2**attempts) * random.uniform(0.5, 1)


def _content(client: Any, asked: Mapping[str, str]) -> tuple[bytes, str]:
    """An object's content and entity tag; what breaks off while it comes is asked for again, like a request
    that fails."""
    for attempt in range(1, ATTEMPTS + 1):
        answer = client.get_object(**asked)
        try:
            return answer["Body"].read(), answer["ETag"]
        except _TRANSIENT:
            if attempt == ATTEMPTS:
                raise
            time.sleep(_wait(attempt))
    raise AssertionError


def _unless_absent(ask: Callable[[], T]) -> T | None:
    """What is asked of an object; None where there is none."""
    try:
        return ask()
    except ClientError as error:
        if error.response.get("Error", {}).get("Code") in _ABSENT:
            return None
        raise


_transfer = TransferConfig(
    multipart_threshold=PART_BYTES, multipart_chunksize=PART_BYTES, max_concurrency=THREADS
)


def keys(place: Place) -> dict[str, int]:
    """Objects below a place, by their name from there, and their sizes."""
    found, prefix = {}, f"{place.key}/"
    with asking(place) as client:
        pages = client.get_paginator("list_objects_v2").paginate(
            Bucket=place.bucket, Prefix=prefix, PaginationConfig={"PageSize": PAGE}
        )
        for page in pages:
            for item in page.get("Contents", ()):
                found[item["Key"].removeprefix(prefix)] = item["Size"]
    return found


def children(place: Place) -> list[str]:
    """Names of the folders directly below a place."""
    prefix = f"{place.key}/" if place.key else ""
    found: list[str] = []
    with asking(place) as client:
        pages = client.get_paginator("list_objects_v2").paginate(
            Bucket=place.bucket, Prefix=prefix, Delimiter="/", PaginationConfig={"PageSize": PAGE}
        )
        for page in pages:
            found += [
                item["Prefix"].removeprefix(prefix).rstrip("/") for item in page.get("CommonPrefixes", ())
            ]
    return found


def get(place: Place) -> bytes | None:
    """An object's content; None where there is none."""
    found = get_marked(place)
    return None if found is None else found[0]


def get_marked(place: Place) -> tuple[bytes, str] | None:
    """An object's content and its entity tag; None where there is none."""
    with asking(place) as client:
        return _unless_absent(lambda: _content(client, {"Bucket": place.bucket, "Key": place.key}))


def size(place: Place) -> int | None:
    """Bytes of an object; None where there is none."""
    with asking(place) as client:
        return _unless_absent(lambda: client.head_object(Bucket=place.bucket, Key=place.key)["ContentLength"])


def get_range(place: Place, start: int, stop: int) -> bytes:
    """Bytes `start … stop − 1` of an object; OSError where they are not there any more."""
    try:
        with asking(place) as client:
            asked = {"Bucket": place.bucket, "Key": place.key, "Range": f"bytes={start}-{stop - 1}"}
            content, _ = _content(client, asked)
    except StorageError as error:
        raise OSError(str(error)) from error
    if len(content) != stop - start:
        raise OSError(f"{place} was replaced by a shorter one while it was read")
    return content


def put(place: Place, content: bytes) -> None:
    with asking(place) as client:
        client.put_object(Bucket=place.bucket, Key=place.key, Body=content)


def put_if(place: Place, content: bytes, tag: str | None) -> bool:
    """Put an object where there is none, or in place of the one with this entity tag; whether it was so."""
    condition = {"IfNoneMatch": "*"} if tag is None else {"IfMatch": tag}
    with asking(place) as client:
        try:
            client.put_object(Bucket=place.bucket, Key=place.key, Body=content, **condition)
            return True
        except ClientError as error:
            if error.response.get("Error", {}).get("Code") in ("PreconditionFailed", "412", *_ABSENT):
                return False
            raise


def upload(file: Path, place: Place) -> None:
    """A file, in parts where it is large, with its SHA-256 beside it."""
    with asking(place) as client:
        extra = {"Metadata": {"sha256": file_digest(file)}}
        try:
            client.upload_file(str(file), place.bucket, place.key, ExtraArgs=extra, Config=_transfer)
        except boto3.exceptions.S3UploadFailedError as error:
            raise error.__cause__ or error.__context__ or StorageError(f"{place}: {error}.") from error


def download(place: Place, file: Path) -> None:
    with asking(place) as client:
        client.download_file(place.bucket, place.key, str(file), Config=_transfer)


def copy(source: Place, target: Place, sha256: str | None = None) -> None:
    """Copy an object within the store, in parts where it is large, with its SHA-256 beside it."""
    sha256 = sha256 or digest(source)
    with asking(source) as client:
        client.copy(
            {"Bucket": source.bucket, "Key": source.key},
            target.bucket,
            target.key,
            ExtraArgs={"Metadata": {"sha256": sha256}, "MetadataDirective": "REPLACE"},
            Config=_transfer,
        )


def digest(place: Place) -> str:
    """The SHA-256 that `upload` put beside an object."""
    with asking(place) as client:
        return client.head_object(Bucket=place.bucket, Key=place.key)["Metadata"]["sha256"]


def delete(place: Place, names: list[str]) -> None:
    """Objects below a place, a page at a time; one that is gone is as good."""
    for first in range(0, len(names), PAGE):
        batch = [{"Key": f"{place.key}/{name}"} for name in names[first : first + PAGE]]
        with asking(place) as client:
            answer = client.delete_objects(Bucket=place.bucket, Delete={"Objects": batch, "Quiet": True})
        for problem in answer.get("Errors", ()):
            _log.warning("s3://%s/%s cannot be removed (%s).", place.bucket, problem["Key"], problem["Code"])
