"""Directories and files in an object store, under s3://BUCKET/PREFIX, through boto3.

A directory is one object, `manifest.json`, which names the folder beside it that holds the files. Writers
upload into a folder of their own; publishing puts the manifest, in place of the one before and at once. A
reader has a copy on its node, found by the manifest's digest, whose files were hashed as they came.

Credentials, region and endpoint come from boto3's usual chain: the AWS_ variables, its files, or a role.
Requests that fail are sent again with backoff and jitter, for a minute at least and two and a half at most.
"""

import json
import logging
import os
import random
import re
import secrets
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
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

from infra.storage.local import FOREIGN_LEFTOVER_S, Location, StorageError, explained
from infra.storage.manifest import MANIFEST, check_manifest, file_digest, new_manifest

ATTEMPTS = 16
"""Times that a request is sent, which takes 73 to 145 seconds where none is answered."""
LONGEST_WAIT_S = 20.0
PART_BYTES = 2**26
"""Of a multipart upload: at most 10,000 parts make 640 GB a file."""
PAGE = 1000
"""Objects that are listed or deleted at once, the most that a store takes."""
THREADS = 8
_PARTS = re.compile(r"\.files-(\d+)-[0-9a-f]{8}")
"""The folder of a directory's files, with the second in which it was begun."""
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


def _body(client: Any, asked: Mapping[str, str]) -> bytes:
    """An object's content; what breaks off while it comes is asked for again, like a request that fails."""
    for attempt in range(1, ATTEMPTS + 1):
        body = client.get_object(**asked)["Body"]
        try:
            return body.read()
        except _TRANSIENT:
            if attempt == ATTEMPTS:
                raise
            time.sleep(_wait(attempt))
    raise AssertionError


_transfer = TransferConfig(
    multipart_threshold=PART_BYTES, multipart_chunksize=PART_BYTES, max_concurrency=THREADS
)


def each(work: Callable[[Any], T], items: Any) -> list[T]:
    """`work` on every item, several at a time."""
    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(work, items))


# Objects.


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
    with asking(place) as client:
        try:
            return _body(client, {"Bucket": place.bucket, "Key": place.key})
        except ClientError as error:
            if error.response.get("Error", {}).get("Code") in _ABSENT:
                return None
            raise


def size(place: Place) -> int | None:
    """Bytes of an object; None where there is none."""
    with asking(place) as client:
        try:
            return client.head_object(Bucket=place.bucket, Key=place.key)["ContentLength"]
        except ClientError as error:
            if error.response.get("Error", {}).get("Code") in _ABSENT:
                return None
            raise


def get_range(place: Place, start: int, stop: int) -> bytes:
    """Bytes `start … stop − 1` of an object; OSError where they are not there any more."""
    try:
        with asking(place) as client:
            asked = {"Bucket": place.bucket, "Key": place.key, "Range": f"bytes={start}-{stop - 1}"}
            content = _body(client, asked)
    except StorageError as error:
        raise OSError(str(error)) from error
    if len(content) != stop - start:
        raise OSError(f"{place} was replaced by a shorter one while it was read")
    return content


def put(place: Place, content: bytes) -> None:
    with asking(place) as client:
        client.put_object(Bucket=place.bucket, Key=place.key, Body=content)


def get_marked(place: Place) -> tuple[bytes, str] | None:
    """A small object's content and its entity tag; None where there is none."""
    with asking(place) as client:
        try:
            answer = client.get_object(Bucket=place.bucket, Key=place.key)
            return answer["Body"].read(), answer["ETag"]
        except ClientError as error:
            if error.response.get("Error", {}).get("Code") in _ABSENT:
                return None
            raise


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
    with asking(source) as client:
        if sha256 is None:
            sha256 = _digest(client, source)
        client.copy(
            {"Bucket": source.bucket, "Key": source.key},
            target.bucket,
            target.key,
            ExtraArgs={"Metadata": {"sha256": sha256}, "MetadataDirective": "REPLACE"},
            Config=_transfer,
        )


def _digest(client: Any, place: Place) -> str:
    return client.head_object(Bucket=place.bucket, Key=place.key)["Metadata"]["sha256"]


def delete(place: Place, names: list[str]) -> None:
    """Objects below a place, a page at a time; one that is gone is as good."""
    for first in range(0, len(names), PAGE):
        batch = [{"Key": f"{place.key}/{name}"} for name in names[first : first + PAGE]]
        with asking(place) as client:
            answer = client.delete_objects(Bucket=place.bucket, Delete={"Objects": batch, "Quiet": True})
        for problem in answer.get("Errors", ()):
            _log.warning("s3://%s/%s cannot be removed (%s).", place.bucket, problem["Key"], problem["Code"])


# Directories.


def files(place: Place) -> tuple[Place, dict[str, int]]:
    """Where the files of a place lie, and their sizes by name from there.

    That is the folder that its manifest names, or the place itself where it has none.
    """
    found = keys(place)
    if MANIFEST not in found:
        return place, found
    folder = read_manifest(place)["folder"]
    return place / folder, keys(place / folder)


def within(place: Place) -> Place:
    """Where a file of a published directory lies; `place` itself where its parent is none."""
    content = get(place.parent / MANIFEST)
    if content is None:
        return place
    folder = check_manifest(content, str(place.parent))["folder"]
    return place.parent / folder / place.key.rpartition("/")[2]


def read_manifest(place: Place) -> dict[str, Any]:
    """The manifest of a published directory; StorageError where there is none, or it is damaged."""
    content = get(place / MANIFEST)
    if content is None:
        if not keys(place):
            raise StorageError(f"{place} does not exist.")
        raise StorageError(f"{place} was never finished: it has no {MANIFEST}.")
    return check_manifest(content, str(place))


def check_complete(place: Place) -> dict[str, Any]:
    """The manifest of a directory all of whose files are there with their sizes."""
    manifest = read_manifest(place)
    there = keys(place / manifest["folder"])
    for name, expected in manifest["files"].items():
        if name not in there:
            raise StorageError(f"{place} is damaged: {name} is missing.")
        if there[name] != expected["size"]:
            raise StorageError(
                f"{place} is damaged: {name} has {there[name]} bytes instead of {expected['size']}."
            )
    return manifest


def begin(place: Place) -> str:
    """A new folder for the files of `place`; what was begun a day ago and never published is removed."""
    clean(place)
    return str(place / f".files-{int(time.time())}-{secrets.token_hex(4)}")


@contextmanager
def writing(staging: Place, last: str | None = None) -> Iterator[Path]:
    """A local directory, whose files are in `staging` once the block is left, the `last` one after others."""
    with tempfile.TemporaryDirectory(prefix="self-forcing-") as folder:
        directory = Path(folder)
        with explained(directory):
            yield directory
        names = [file.relative_to(directory).as_posix() for file in directory.rglob("*") if file.is_file()]
        for batch in ([name for name in names if name != last], [name for name in names if name == last]):
            each(lambda name: upload(directory / name, staging / name), batch)


def publish(staging: Place, place: Place, metadata: Mapping[str, Any]) -> None:
    """Put the manifest of what was uploaded into `staging`, and remove what was published before."""
    try:
        sizes = keys(staging)

        def digest(name: str) -> str:
            with asking(staging / name) as client:
                return _digest(client, staging / name)

        hashes = dict(zip(sizes, each(digest, sizes), strict=True))
        files = {name: {"sha256": hashes[name], "size": size} for name, size in sorted(sizes.items())}
        sequence = 1 + max((number for number, _ in complete_children(place.parent)), default=0)
        folder = staging.key.rpartition("/")[2]
        before = get(place / MANIFEST)
        body = new_manifest(files, sequence, metadata, folder=folder)
        put(place / MANIFEST, json.dumps(body, indent=1, allow_nan=False).encode())
    except BaseException:
        with suppress(StorageError):
            delete(staging, list(keys(staging)))
        raise
    if before is not None:
        old = json.loads(before).get("folder")
        if old and old != folder:
            delete(place / old, list(keys(place / old)))


def complete_children(place: Place) -> list[tuple[int, Place]]:
    """(sequence, child) of what is complete directly below a place, in the order of publishing."""

    def look(name: str) -> tuple[int, Place] | None:
        with suppress(StorageError):
            return check_complete(place / name)["sequence"], place / name
        return None

    names = [name for name in children(place) if not _PARTS.fullmatch(name)]
    return sorted(filter(None, each(look, names)), key=lambda found: found[0])


def remove(place: Place) -> bool:
    """Remove a directory, its manifest first, so that nobody sees it half deleted; whether there was one."""
    there = keys(place)
    if MANIFEST in there:
        delete(place, [MANIFEST])
    delete(place, [name for name in there if name != MANIFEST])
    return bool(there)


def clean(place: Place) -> list[str]:
    """Remove folders of files of `place` that were begun a day ago and more and never published."""
    manifest = get(place / MANIFEST)
    named = None if manifest is None else json.loads(manifest).get("folder")
    left = []
    for name in children(place):
        match = _PARTS.fullmatch(name)
        if match and name != named and time.time() - int(match[1]) > FOREIGN_LEFTOVER_S:
            delete(place / name, list(keys(place / name)))
            left.append(str(place / name))
    return left


def move(source: Place, place: Place) -> None:
    """Copy a complete directory within the store, and remove it where it was."""
    manifest = check_complete(source)
    staging = at(begin(place))
    assert staging is not None

    files, folder = manifest["files"], source / manifest["folder"]
    each(lambda name: copy(folder / name, staging / name, files[name]["sha256"]), files)
    publish(staging, place, manifest["metadata"])
    remove(source)


def fetch(place: Place, manifest: Mapping[str, Any], directory: Path) -> None:
    """Download a directory's files; StorageError where one is not what the manifest says."""

    def one(name: str) -> None:
        file = directory / name
        file.parent.mkdir(parents=True, exist_ok=True)
        download(place / manifest["folder"] / name, file)
        if file_digest(file) != manifest["files"][name]["sha256"]:
            raise StorageError(f"{place} is damaged: the content of {name} is not what was written.")

    free, needed = shutil.disk_usage(directory).free, sum(file["size"] for file in manifest["files"].values())
    if needed > free:
        raise StorageError(
            f"{place} takes {needed / 2**30:.1f} GiB, and {directory.parent} has {free / 2**30:.1f} left; "
            "free some, or name another place in SELF_FORCING_CACHE."
        )
    each(one, manifest["files"])
