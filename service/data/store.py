"""Objects at an address: a folder, `s3://bucket/prefix`, or whatever else obstore reads. Every write goes through here.

Retries, backoff with jitter, and resuming a body that broke off are obstore's own; this layer gives them one
deadline, turns failures into errors that name the address, and leaves no way to write that could be seen half done.
"""

from __future__ import annotations

import os
import re
import shutil
import time
import uuid
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import urlsplit
from urllib.request import url2pathname

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError, PermissionDeniedError, UnauthenticatedError
from obstore.store import LocalStore, from_url

from datasets_prep.errors import UserError

if TYPE_CHECKING:
    from obstore.auth.boto3 import Boto3CredentialProvider
    from obstore.store import ClientConfig, ObjectStore, RetryConfig

_PART_BYTES = 16 << 20  # S3 allows 10,000 parts: objects up to 156 GiB
_CHUNK_BYTES = 4 << 20
_SILENCE_SECONDS = 30.0
_PAUSE_SECONDS = 0.5  # before what obstore does not repeat is repeated
_STAGED = re.compile(r"#\d+$")  # of a file that is being written: obstore does not list such names


class StoreError(UserError):
    """An object store refused or failed; the message names the address."""


class NotFound(StoreError):
    """No such object, bucket or folder."""


class AccessDenied(StoreError):
    """Credentials missing, wrong, or without the right to do this."""


class StoreUnavailable(StoreError):
    """No proper answer before the deadline."""


class Unfinished(NamedTuple):
    """Something half-written: its name, when it was begun (seconds since 1970), bytes if known, S3's upload id."""

    name: str
    since: float
    size: int
    upload: str = ""


class Store:
    """Objects below one address; names are relative to it and '/'-separated.

    It can be pickled. A forked child cannot use its parent's store: start processes by spawn.
    """

    def __init__(self, uri: str | Path, deadline: float = 60.0):
        """Name the store without touching it.

        Args:
            uri: folder, `file://` or object-store address such as `s3://bucket/prefix`. S3 takes endpoint and keys
                from the usual `AWS_…` variables, keys else from boto3's chain of profiles and roles.
            deadline: seconds after which a failing request is no longer repeated.
        """
        self.uri = _canonical(str(uri))
        self.deadline = deadline

    def __reduce__(self) -> tuple[type[Store], tuple[str, float]]:
        return Store, (self.uri, self.deadline)

    @property
    def local_path(self) -> Path | None:
        """The folder of a store on disk, else None."""
        return None if "://" in self.uri else Path(self.uri)

    def sub(self, prefix: str) -> Store:
        """Return the store below `prefix`."""
        return Store(f"{self.uri}/{prefix}", self.deadline)

    def get(self, name: str) -> bytes:
        """Return a whole object, or raise `NotFound`."""
        with self._faults(name):
            return obstore.get(self._reading, name).bytes().to_bytes()

    def stream(self, name: str) -> Iterator[bytes]:
        """Yield an object's bytes in order, some MB at a time."""
        with self._faults(name):
            for chunk in obstore.get(self._reading, name).stream(_CHUNK_BYTES):
                yield bytes(chunk)

    def ranges(self, name: str, offsets: Sequence[int], sizes: Sequence[int]) -> list[bytes]:
        """Return pieces of an object, by offset and size in bytes; near ones are fetched as one."""
        with self._faults(name):
            pieces = obstore.get_ranges(self._reading, name, starts=offsets, lengths=sizes)
            return [bytes(piece) for piece in pieces]

    def exists(self, name: str) -> bool:
        """Say whether there is an object of this name."""
        try:
            with self._faults(name):
                obstore.head(self._reading, name)
        except NotFound:
            return False
        return True

    def put(self, name: str, data: bytes | memoryview | Path) -> None:
        """Write an object, whole or not at all: the bytes, or the contents of a finished local file."""
        with self._faults(name):
            if self.local_path is not None:
                _put_file(self.local_path, name, data)
            else:
                obstore.put(self._backend, name, data, chunk_size=_PART_BYTES)

    def create(self, name: str, data: bytes) -> bool:
        """Write an object if there is none, else return False; of many that try at once, one succeeds.

        After `StoreUnavailable` it may have been written: a caller that must know puts something unique into `data`.
        """
        try:
            with self._faults(name):
                obstore.put(self._backend, name, bytes(data), mode="create")
        except FileExistsError:
            return False
        return True

    def list(self, prefix: str = "") -> list[str]:
        """Return the sorted names of all objects in the folder `prefix` and below."""
        return sorted(self.sizes(prefix))

    def sizes(self, prefix: str = "") -> dict[str, int]:
        """Return the bytes of all objects in the folder `prefix` and below, by name."""
        return {name: size for name, (size, _) in self.entries(prefix).items()}

    def entries(self, prefix: str = "") -> dict[str, tuple[int, float]]:
        """Return bytes and time of writing, in seconds since 1970, of all objects in the folder `prefix` and below."""
        if self._is_absent:
            return {}
        end = time.monotonic() + self.deadline
        while True:
            try:
                with self._faults(prefix):
                    listed = [meta for batch in obstore.list(self._backend, prefix or None) for meta in batch]
                return {meta["path"]: (meta["size"], meta["last_modified"].timestamp()) for meta in listed}
            except StoreUnavailable:  # of a list whose body breaks off obstore makes a failure
                if self.local_path is not None or time.monotonic() + _PAUSE_SECONDS > end:
                    raise
                time.sleep(_PAUSE_SECONDS)

    def delete(self, name: str) -> None:
        """Remove an object; it is no error when there is none."""
        with suppress(NotFound), self._faults(name):
            obstore.delete(self._reading, name)

    def sweep(self) -> None:
        """Remove what killed writers left half-written in a folder or on S3; call it where nobody else writes."""
        for each in self.unfinished():
            self.abort(each)

    def unfinished(self) -> list[Unfinished]:
        """What writers in a folder or on S3 are writing, or left half-written; nothing lists it otherwise."""
        if self.local_path is not None:
            with self._faults(""):
                return list(_staged(self.local_path))
        return list(_uploads(self.uri)) if urlsplit(self.uri).scheme in ("s3", "s3a") else []

    def abort(self, each: Unfinished) -> None:
        """Remove something unfinished; it is no error when it is gone."""
        with self._faults(each.name):
            if self.local_path is not None:
                (self.local_path / each.name).unlink(missing_ok=True)
            else:
                _abort_upload(self.uri, each)

    @property
    def _is_absent(self) -> bool:
        return self.local_path is not None and not self.local_path.is_dir()

    @property
    def _reading(self) -> ObjectStore:
        if self._is_absent:  # opening the backend would make the folder
            raise FileNotFoundError(f"there is no folder {self.uri}")
        return self._backend

    @cached_property
    def _backend(self) -> ObjectStore:
        if self.local_path is not None:
            return LocalStore(self.local_path, mkdir=True, automatic_cleanup=True)
        deadline = timedelta(seconds=self.deadline)
        retry: RetryConfig = {"max_retries": 10_000, "retry_timeout": deadline}  # the count never ends them
        scheme = urlsplit(self.uri).scheme
        endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or ""
        plain = scheme == "http" or endpoint.startswith("http://")
        timeout = timedelta(seconds=min(self.deadline / 2, _SILENCE_SECONDS))
        http: ClientConfig = {"timeout": timeout, "allow_http": plain}  # of one request: a silent one is repeated
        if scheme not in ("s3", "s3a"):
            return from_url(self.uri, retry_config=retry, client_options=http)
        return from_url(self.uri, retry_config=retry, client_options=http, credential_provider=self._profile())

    def _profile(self) -> Boto3CredentialProvider | None:
        """Credentials of boto3's chain where the environment holds none; they are fetched anew before they expire."""
        if "AWS_ACCESS_KEY_ID" in os.environ or "AWS_SKIP_SIGNATURE" in os.environ:
            return None
        from botocore.exceptions import BotoCoreError
        from obstore.auth.boto3 import Boto3CredentialProvider

        try:
            return Boto3CredentialProvider()
        except (BotoCoreError, ValueError) as error:
            fix = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
            raise AccessDenied(f"{self.uri}: no credentials found ({error}): {fix}") from error

    @contextmanager
    def _faults(self, name: str) -> Generator[None]:
        """Turn obstore's failures into ours; FileExistsError says that a conditional write came second."""
        uri = f"{self.uri}/{name}".rstrip("/")
        try:
            yield
        except AlreadyExistsError as error:
            raise FileExistsError(uri) from error
        except (BaseError, OSError) as error:
            raise self._translated(uri, error) from error

    def _translated(self, uri: str, error: Exception) -> StoreError:
        # Listing and deleting report refusals as generic errors, so the text has to tell.
        text = str(error)
        code = re.search(r"<Code>(\w+)</Code>", text)
        reason = code[1] if code else text.split("\n")[0][:300]
        if isinstance(error, FileNotFoundError) or re.search(r"status code: 404|NoSuchBucket", text):
            return NotFound(f"{uri} does not exist ({reason}): check the address")
        denied = isinstance(error, PermissionDeniedError | UnauthenticatedError)
        if denied or re.search(r"status code: 40[13]|AccessDenied|(os error |Errno )(13|30)\b", text):
            return AccessDenied(f"{uri}: access denied ({reason}): check the credentials and what they may do here")
        if self.local_path is not None and isinstance(error, OSError):
            return StoreUnavailable(f"{uri}: {error.strerror or reason}: free space there or choose another folder")
        return StoreUnavailable(
            f"{uri}: the store failed for {self.deadline:g} s or for good ({reason}): "
            "check that it runs, and its address (AWS_ENDPOINT_URL for S3)"
        )


def _put_file(folder: Path, name: str, data: bytes | memoryview | Path) -> None:
    """Write beside, then rename: obstore takes several times as long for the same."""
    if not all(part.strip(".") for part in name.split("/")):
        raise ValueError(f"{name!r} is no name of an object")
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    staged = path.with_name(f"{path.name}#{uuid.uuid4().int}")
    try:
        if isinstance(data, Path):
            shutil.copyfile(data, staged)
        else:
            staged.write_bytes(data)
        staged.replace(path)
    except BaseException:
        staged.unlink(missing_ok=True)
        raise


def _staged(folder: Path) -> Iterator[Unfinished]:
    for path in folder.rglob("*#*"):
        if _STAGED.search(path.name):
            with suppress(FileNotFoundError):  # finished by now
                stat = path.stat()
                yield Unfinished(path.relative_to(folder).as_posix(), stat.st_mtime, stat.st_size)


def _uploads(uri: str) -> Iterator[Unfinished]:
    """Multipart uploads that were never finished: nobody sees them, but their parts are kept and paid for."""
    from botocore.exceptions import BotoCoreError, ClientError

    bucket, path = urlsplit(f"{uri}/")[1:3]
    prefix = path.lstrip("/")
    with suppress(BotoCoreError, ClientError):  # a writer may lack the right to list them
        for page in _s3().get_paginator("list_multipart_uploads").paginate(Bucket=bucket, Prefix=prefix):
            for each in page.get("Uploads", []):
                yield Unfinished(each["Key"].removeprefix(prefix), each["Initiated"].timestamp(), 0, each["UploadId"])


def _abort_upload(uri: str, each: Unfinished) -> None:
    from botocore.exceptions import BotoCoreError, ClientError

    bucket, path = urlsplit(f"{uri}/")[1:3]
    with suppress(BotoCoreError, ClientError):  # as of others, its end is not worth an error
        _s3().abort_multipart_upload(Bucket=bucket, Key=f"{path.lstrip('/')}{each.name}", UploadId=each.upload)


def _s3() -> Any:
    import boto3

    return boto3.Session().client("s3")  # a default session would keep the first keys that it saw


def _canonical(uri: str) -> str:
    """Absolute folder without `file://`, or address without a trailing slash."""
    if "://" not in uri:
        return os.path.abspath(Path(uri).expanduser())
    parts = urlsplit(uri)
    if parts.scheme == "file":
        if parts.netloc not in ("", "localhost"):
            raise UserError(f"{uri}: a file address has three slashes: file:///{parts.netloc}{parts.path}")
        return os.path.abspath(url2pathname(parts.path))
    try:
        obstore.parse_scheme(uri)
    except BaseError as error:
        raise UserError(f"{uri}: unknown kind of address: use a folder, file://, s3:// or gs://") from error
    if not parts.netloc:
        raise UserError(f"{uri} names no bucket: write {parts.scheme}://bucket/prefix")
    return uri.rstrip("/")
