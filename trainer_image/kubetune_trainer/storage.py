"""Folders that outlive a pod, behind one small interface: s3://bucket/path, pvc://claim/path, file://path.

    store = open_store("s3://team/runs", s3=config.storage.s3)
    store.upload(Path("model.safetensors"), "outputs/model.safetensors")

Paths are relative to the URI and use slashes. What is written appears whole or not at all. Every call has a timeout and
a limit of retries, and says by its error whose turn it is:

    ConfigError      the bucket does not exist, or the credentials do not open it
    DataError        an object is missing, or is not the one that was recorded
    DoesNotFitError  the disk is full
    StorageError     the service did not answer, or temporary credentials have expired; a later attempt may succeed
"""

import contextlib
import errno
import os
import secrets
import shutil
import tempfile
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Final, Protocol

from kubetune_trainer.errors import ConfigError, DataError, DoesNotFitError, StorageError, TrainerError
from kubetune_trainer.names import (
    DEFAULT_CONFIGMAPS_DIR,
    DEFAULT_PVC_DIR,
    DEFAULT_SECRETS_DIR,
    ENV_CONFIGMAPS_DIR,
    ENV_PVC_DIR,
    ENV_SCRATCH,
    ENV_SECRETS_DIR,
)

if TYPE_CHECKING:
    from botocore.credentials import Credentials

    from kubetune_trainer.config import ConfigMapKey, S3Storage, SecretKey, SecretName

CONNECT_TIMEOUT_SECONDS: Final = 5
READ_TIMEOUT_SECONDS: Final = 60
REQUEST_ATTEMPTS: Final = 5
"""Tries per request, with pauses that grow to 20 s: at the worst about a minute when nobody listens."""
READ_ATTEMPTS: Final = 3
"""How often an object is read whose connection breaks in the middle."""
LIST_ATTEMPTS: Final = 5
"""How often a local folder is listed while files go from under it."""
_DENIED: Final = frozenset({"403", "AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch", "401"})
_EXPIRED: Final = frozenset(
    {"ExpiredToken", "ExpiredTokenException", "InvalidToken", "InvalidTokenId", "RequestExpired"}
)
"""What services say of temporary credentials whose time is over; AWS says ExpiredToken, MinIO InvalidTokenId."""
_MISSING: Final = frozenset({"404", "NoSuchKey", "NotFound"})
_FULL: Final = frozenset({"507", "InsufficientStorage", "QuotaExceeded", "XMinioStorageFull"})


@dataclass(frozen=True)
class ObjectInfo:
    """One file of a store.

    Attributes:
        path: Relative to the store's URI.
        size: In bytes.
        etag: Changes when the content does: S3's ETag, or size and time of change of a local file.
    """

    path: str
    size: int
    etag: str


class Store(Protocol):
    """A folder. `S3Store` and `LocalStore` are the two there are."""

    def uri(self, path: str = "") -> str:
        """The URI of `path`, for messages and for the status."""

    def local_path(self, path: str = "") -> Path | None:
        """Where `path` lies on this machine, or None if it has to be downloaded."""

    def exists(self, path: str) -> bool:
        """Whether there is a file `path`."""

    def read_bytes(self, path: str, *, length: int | None = None) -> bytes:
        """The content of `path`, or only its first `length` bytes."""

    def write_bytes(self, path: str, data: bytes) -> None:
        """Write `path`, whole or not at all."""

    def list(self, prefix: str = "") -> list[ObjectInfo]:
        """The files below the folder `prefix`, or the file `prefix` itself, sorted by path."""

    def download(self, path: str, local: Path, *, etag: str | None = None) -> None:
        """Copy `path` to `local`; with `etag`, only if that is still its ETag."""

    def upload(self, local: Path, path: str, *, replace: bool = True) -> None:
        """Copy `local` to `path`; large files in parts, each with a checksum. Without `replace` what is there stays."""

    def delete(self, path: str) -> None:
        """Remove the file `path`, and no folder; nothing there is no error."""

    def delete_tree(self, prefix: str) -> None:
        """Remove the folder or file `prefix`; nothing there is no error."""

    def delete_partial(self) -> None:
        """Remove what writes have left that broke off; for whoever alone writes to this folder."""


def open_store(uri: str, *, s3: "S3Storage | None" = None) -> Store:
    """The folder at `uri`; nothing is asked of it yet.

    Args:
        uri: s3://bucket/path, pvc://claim/path, or file://path; the last from the working directory unless it begins
            with a slash.
        s3: How to reach the S3 service; None leaves all of it to the environment.
    """
    scheme, _, rest = uri.partition("://")
    if scheme == "s3":
        bucket, _, prefix = rest.partition("/")
        return S3Store(bucket, prefix.strip("/"), s3)
    if scheme == "pvc":
        claim, _, path = rest.partition("/")
        if ".." in path.split("/"):
            raise ConfigError(f"{uri}: a path must stay in its claim, without '..'")
        root = Path(os.environ.get(ENV_PVC_DIR, DEFAULT_PVC_DIR)) / claim
        if not root.is_dir():
            raise ConfigError(f"{uri}: the claim {claim} is not mounted at {root}")
        return LocalStore(uri, root / path.strip("/"))
    if scheme == "file":
        return LocalStore(uri, Path(rest))
    raise ConfigError(f"a URI must begin with s3://, pvc:// or file://, got {uri}")


def download_tree(store: Store, prefix: str, local: Path) -> None:
    """Copy every file below `prefix` into the folder `local`."""
    head = f"{prefix.strip('/')}/" if prefix else ""
    for info in store.list(prefix):
        store.download(info.path, local / info.path.removeprefix(head))


def upload_tree(store: Store, local: Path, prefix: str, *, last: Collection[str] = ()) -> None:
    """Copy every file below the folder `local` to below `prefix`, those that `last` names when the others are there."""
    head = f"{prefix.strip('/')}/" if prefix else ""
    names = sorted(path.relative_to(local).as_posix() for path in local.rglob("*") if path.is_file())
    for name in sorted(names, key=lambda name: name in last):
        store.upload(local / name, f"{head}{name}")


@cache
def scratch_dir() -> Path:
    """A local folder for what may be lost: downloads, staged checkpoints. In a pod it is a volume of its own."""
    if given := os.environ.get(ENV_SCRATCH):
        Path(given).mkdir(parents=True, exist_ok=True)
        return Path(given)
    return Path(tempfile.mkdtemp(prefix="kubetune-"))


def secret_folder(secret: "SecretName") -> Path | None:
    """The folder of a Secret's keys, or None outside of a pod, where the environment has them."""
    folder = Path(os.environ.get(ENV_SECRETS_DIR, DEFAULT_SECRETS_DIR)) / secret.name
    return folder if folder.is_dir() else None


def read_secret(secret: "SecretKey") -> str | None:
    """The value of a Secret's key, or None outside of a pod, where the environment has it.

    Raises:
        ConfigError: The Secret is there and has no such key.
    """
    folder = Path(os.environ.get(ENV_SECRETS_DIR, DEFAULT_SECRETS_DIR)) / secret.name
    return _read_key(folder, secret.key) if folder.is_dir() else None


def config_map_file(reference: "ConfigMapKey") -> Path:
    """The file of a ConfigMap's key.

    Raises:
        ConfigError: It is not there.
    """
    path = Path(os.environ.get(ENV_CONFIGMAPS_DIR, DEFAULT_CONFIGMAPS_DIR)) / reference.name / reference.key
    if not path.is_file():
        raise ConfigError(f"ConfigMap {reference.name} must have the key {reference.key}; there is no {path}")
    return path


def config_map_folder(name: str) -> Path:
    """The folder of a ConfigMap that is mounted whole.

    Raises:
        ConfigError: It is not there.
    """
    folder = Path(os.environ.get(ENV_CONFIGMAPS_DIR, DEFAULT_CONFIGMAPS_DIR)) / name
    if not folder.is_dir():
        raise ConfigError(f"ConfigMap {name} must be mounted; there is no {folder}")
    return folder


class LocalStore:
    """A folder of the file system: file:// and pvc://."""

    def __init__(self, uri: str, root: Path) -> None:
        """Begins with a folder that need not exist.

        Args:
            uri: How the user wrote it.
            root: Where it is.
        """
        self._uri, self._root = uri.rstrip("/"), root

    def uri(self, path: str = "") -> str:
        """As `Store.uri`."""
        return f"{self._uri}/{path}".rstrip("/")

    def local_path(self, path: str = "") -> Path | None:
        """As `Store.local_path`."""
        return self._root / path

    def exists(self, path: str) -> bool:
        """As `Store.exists`."""
        return (self._root / path).is_file()

    def read_bytes(self, path: str, *, length: int | None = None) -> bytes:
        """As `Store.read_bytes`."""
        with _local_errors(self.uri(path)), (self._root / path).open("rb") as file:
            return file.read(length)

    def write_bytes(self, path: str, data: bytes) -> None:
        """As `Store.write_bytes`."""
        with _local_errors(self.uri(path)), _replacing(self._root / path) as temporary:
            temporary.write_bytes(data)

    def list(self, prefix: str = "") -> list[ObjectInfo]:
        """As `Store.list`."""
        with _local_errors(self.uri(prefix)):
            for _ in range(LIST_ATTEMPTS - 1):
                with contextlib.suppress(FileNotFoundError):  # somebody else deletes beside it, as another run's prune
                    return [*self._infos(prefix)]
            return [*self._infos(prefix)]

    def _infos(self, prefix: str) -> Iterator[ObjectInfo]:
        start = self._root / prefix
        paths = [start] if start.is_file() else sorted(start.rglob("*"))
        return (self._info(path) for path in paths if path.is_file() and not _is_temporary(path))

    def download(self, path: str, local: Path, *, etag: str | None = None) -> None:
        """As `Store.download`."""
        with _local_errors(self.uri(path)):
            _check_etag(self.uri(path), expected=etag, found=self._info(self._root / path).etag)
            with _replacing(local) as temporary:
                shutil.copyfile(self._root / path, temporary)

    def upload(self, local: Path, path: str, *, replace: bool = True) -> None:
        """As `Store.upload`."""
        with _local_errors(self.uri(path)), _replacing(self._root / path, keep=not replace) as temporary:
            shutil.copyfile(local, temporary)

    def delete(self, path: str) -> None:
        """As `Store.delete`."""
        with _local_errors(self.uri(path)):
            (self._root / path).unlink(missing_ok=True)

    def delete_tree(self, prefix: str) -> None:
        """As `Store.delete_tree`."""
        target = self._root / prefix
        with _local_errors(self.uri(prefix)):
            if target.is_dir():
                shutil.rmtree(target)
            else:
                target.unlink(missing_ok=True)

    def delete_partial(self) -> None:
        """As `Store.delete_partial`."""
        with _local_errors(self.uri()):
            for path in [path for path in self._root.rglob("*") if _is_temporary(path)]:
                path.unlink(missing_ok=True)

    def _info(self, path: Path) -> ObjectInfo:
        found = path.stat()
        name = path.relative_to(self._root).as_posix() if path != self._root else ""
        return ObjectInfo(name, found.st_size, f"{found.st_size}-{found.st_mtime_ns}")


class S3Store:
    """A prefix of an S3 bucket."""

    def __init__(self, bucket: str, prefix: str, s3: "S3Storage | None") -> None:
        """Begins without a connection.

        Args:
            bucket: The bucket.
            prefix: What every key begins with, without slashes at its ends.
            s3: How to reach the service.
        """
        self._bucket, self._prefix, self._s3 = bucket, prefix, s3

    def uri(self, path: str = "") -> str:
        """As `Store.uri`."""
        return f"s3://{self._bucket}/{self._key(path)}".rstrip("/")

    def local_path(self, path: str = "") -> Path | None:  # noqa: ARG002 (never)
        """As `Store.local_path`."""
        return None

    def exists(self, path: str) -> bool:
        """As `Store.exists`."""
        try:
            self._head(path)
        except DataError:
            return False
        return True

    def read_bytes(self, path: str, *, length: int | None = None) -> bytes:
        """As `Store.read_bytes`."""
        from botocore.exceptions import HTTPClientError, IncompleteReadError  # noqa: PLC0415 (as below)

        part = {} if length is None else {"Range": f"bytes=0-{length - 1}"}
        with self._errors(path):
            for attempt in range(1, READ_ATTEMPTS + 1):
                body = self._client.get_object(Bucket=self._bucket, Key=self._key(path), **part)["Body"]
                try:
                    content: bytes = body.read()
                except (HTTPClientError, IncompleteReadError):  # in the middle, where the client tries nothing again
                    if attempt == READ_ATTEMPTS:
                        raise
                else:
                    break
        return content

    def write_bytes(self, path: str, data: bytes) -> None:
        """As `Store.write_bytes`."""
        with self._errors(path):
            self._client.put_object(Bucket=self._bucket, Key=self._key(path), Body=data)

    def list(self, prefix: str = "") -> list[ObjectInfo]:
        """As `Store.list`."""
        return sorted(self._list(prefix), key=lambda info: info.path)

    def download(self, path: str, local: Path, *, etag: str | None = None) -> None:
        """As `Store.download`."""
        if etag is not None:
            _check_etag(self.uri(path), expected=etag, found=_etag(self._head(path)))
        with self._errors(path), _replacing(local) as temporary:
            self._client.download_file(self._bucket, self._key(path), str(temporary))

    def upload(self, local: Path, path: str, *, replace: bool = True) -> None:
        """As `Store.upload`."""
        if not replace and self.exists(path):
            return
        with self._errors(path):
            self._client.upload_file(str(local), self._bucket, self._key(path))

    def delete(self, path: str) -> None:
        """As `Store.delete`."""
        with self._errors(path):
            self._client.delete_object(Bucket=self._bucket, Key=self._key(path))

    def delete_tree(self, prefix: str) -> None:
        """As `Store.delete_tree`."""
        keys = [{"Key": self._key(info.path)} for info in self._list(prefix)]
        refused: list[dict[str, Any]] = []
        with self._errors(prefix):
            for start in range(0, len(keys), 1000):  # S3's limit of one request
                wanted = {"Objects": keys[start : start + 1000], "Quiet": True}
                # The request succeeds whatever befalls its keys: the answer lists those that are still there.
                refused += self._client.delete_objects(Bucket=self._bucket, Delete=wanted).get("Errors", ())
        if refused:
            raise self._refusal(refused[0])

    def delete_partial(self) -> None:
        """As `Store.delete_partial`; there is never a part of an object, and the bucket's rules end broken uploads."""

    def _refusal(self, refused: dict[str, Any]) -> TrainerError:
        """What became of the first key that was not deleted, as if it had been asked for alone."""
        from botocore.exceptions import ClientError  # noqa: PLC0415 (a slow import that local runs do without)

        uri = f"s3://{self._bucket}/{refused['Key']}"
        return _translate(ClientError({"Error": refused}, "DeleteObjects"), uri=uri, bucket=self._bucket)

    @property
    def _client(self) -> Any:
        try:
            return _client(self._s3)
        except ValueError as error:
            raise ConfigError(f"{self.uri()}: storage.s3 cannot be used: {error}") from error

    def _key(self, path: str) -> str:
        return "/".join(part for part in (self._prefix, path.strip("/")) if part)

    def _list(self, prefix: str) -> Iterator[ObjectInfo]:
        key = self._key(prefix)
        head = f"{self._prefix}/" if self._prefix else ""
        with self._errors(prefix):
            pages = self._client.get_paginator("list_objects_v2").paginate(Bucket=self._bucket, Prefix=key)
            for entry in (entry for page in pages for entry in page.get("Contents", ())):
                name: str = entry["Key"]
                if name.endswith("/"):  # what consoles make where somebody makes a folder: it is no file
                    continue
                # A prefix of S3's is a prefix of names: step-1 is also one of step-10, which is another folder.
                if name == key or not key or name.startswith(f"{key}/"):
                    yield ObjectInfo(
                        name.removeprefix(head) if name != self._prefix else "", entry["Size"], _etag(entry)
                    )

    def _head(self, path: str) -> dict[str, Any]:
        with self._errors(path):
            found: dict[str, Any] = self._client.head_object(Bucket=self._bucket, Key=self._key(path))
        return found

    @contextlib.contextmanager
    def _errors(self, path: str) -> Iterator[None]:
        from boto3.exceptions import Boto3Error  # noqa: PLC0415 (a slow import that local runs do without)
        from botocore.exceptions import BotoCoreError, ClientError  # noqa: PLC0415
        from s3transfer.exceptions import S3DownloadFailedError  # noqa: PLC0415

        try:
            yield
        except S3DownloadFailedError as error:
            raise DataError(f"{self.uri(path)} has changed while it was read: {error}") from error
        except (ClientError, BotoCoreError, Boto3Error) as error:
            raise _translate(error, uri=self.uri(path), bucket=self._bucket) from error
        except OSError as error:
            raise local_error(error, self.uri(path)) from error


@cache
def _client(s3: "S3Storage | None") -> Any:
    """One client per service and process: it is made slowly and may be shared by threads."""
    import boto3  # noqa: PLC0415 (a slow import that local runs do without)
    import botocore.session  # noqa: PLC0415
    from botocore.config import Config  # noqa: PLC0415

    endpoint = s3.endpoint if s3 else None
    settings = Config(
        connect_timeout=CONNECT_TIMEOUT_SECONDS,
        read_timeout=READ_TIMEOUT_SECONDS,
        retries={"mode": "standard", "total_max_attempts": REQUEST_ATTEMPTS},
        # Services other than AWS seldom answer to bucket.host.
        s3={"addressing_style": "path" if endpoint else "auto"},
    )
    bundle = str(config_map_file(s3.ca_bundle.config_map)) if s3 and s3.ca_bundle else None
    session = botocore.session.get_session()
    if s3 and s3.credentials_secret and (folder := secret_folder(s3.credentials_secret)):
        found = _credentials(folder)
        session.register_component("credential_provider", SimpleNamespace(load_credentials=lambda: found))
    return boto3.session.Session(botocore_session=session).client(
        "s3",
        endpoint_url=endpoint,
        region_name=s3.region if s3 else None,
        verify=bundle,
        config=settings,
    )


def _credentials(folder: Path) -> "Credentials":
    """The credentials in a Secret's folder, read again for each request that is signed: temporary ones are rotated.

    Each reading stands for itself, so threads may sign at the same time.
    """
    from botocore.credentials import Credentials, ReadOnlyCredentials  # noqa: PLC0415 (as above)

    class FolderCredentials(Credentials):
        def get_frozen_credentials(self) -> ReadOnlyCredentials:
            return Credentials(*_credential_keys(folder)).get_frozen_credentials()

    return FolderCredentials(*_credential_keys(folder), method="kubetune-secret")


def _credential_keys(folder: Path) -> tuple[str, str, str | None]:
    """Access key, secret key and session token: of one Secret, though it may be rotated between the readings."""

    def read() -> tuple[str, str, str | None]:
        token = _read_key(folder, "AWS_SESSION_TOKEN") if (folder / "AWS_SESSION_TOKEN").is_file() else None
        return _read_key(folder, "AWS_ACCESS_KEY_ID"), _read_key(folder, "AWS_SECRET_ACCESS_KEY"), token

    found, again = read(), read()
    while found != again:
        found, again = again, read()
    return found


def _read_key(folder: Path, key: str) -> str:
    if not (folder / key).is_file():
        there = ", ".join(sorted(path.name for path in folder.iterdir() if path.is_file())) or "none"
        raise ConfigError(f"Secret {folder.name} must have the key {key}, got {there}")
    return (folder / key).read_text().strip()


def _translate(error: Exception, *, uri: str, bucket: str) -> TrainerError:  # noqa: PLR0911 (a table of answers)
    from botocore.exceptions import NoCredentialsError, ParamValidationError, PartialCredentialsError  # noqa: PLC0415

    # s3transfer wraps what went wrong in an error of its own, once or twice.
    cause = error
    while not hasattr(cause, "response") and isinstance(cause.__cause__ or cause.__context__, Exception):
        cause = cause.__cause__ or cause.__context__  # type: ignore[assignment]
    response: dict[str, Any] = getattr(cause, "response", None) or {}  # a broken connection has one that is None
    code = str(response.get("Error", {}).get("Code", ""))
    if code == "NoSuchBucket" or "NoSuchBucket" in str(error):
        return ConfigError(f"{uri}: bucket {bucket} does not exist", hint="Create the bucket or correct the URI.")
    if code in _EXPIRED:
        return StorageError(
            f"{uri}: the credentials have expired ({code})",
            hint="Renew the Secret that storage.s3 names; a running pod has its new keys after a minute or two.",
        )
    if code in _DENIED:
        is_delete = str(getattr(cause, "operation_name", "")).startswith("DeleteObject")
        denied = "let it be deleted" if is_delete else "open it"
        return ConfigError(
            f"{uri}: the credentials do not {denied} ({code})", hint="Check the Secret that storage.s3 names."
        )
    if isinstance(cause, NoCredentialsError | PartialCredentialsError):
        return ConfigError(f"{uri}: no credentials", hint="Name a Secret in storage.s3.credentialsSecret.")
    if isinstance(cause, ParamValidationError):
        return ConfigError(f"{uri}: {cause}")
    if code in _MISSING:
        return DataError(f"{uri} does not exist")
    if code in _FULL:
        return DoesNotFitError(f"{uri}: the storage is full ({code})")
    if code == "400":  # to HEAD, whose answers have no body that could say more
        hint = "So S3 answers expired credentials too: look whether the Secret that storage.s3 names is to be renewed."
        return StorageError(f"{uri}: {cause}", hint=hint)
    return StorageError(f"{uri}: {cause}", hint="Check that storage.s3.endpoint can be reached from the pod.")


@contextlib.contextmanager
def _local_errors(uri: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise local_error(error, uri) from error


def local_error(error: OSError, uri: str) -> TrainerError:
    """Return what an error of the file system is to a run: whose turn it is."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return DoesNotFitError(f"{uri}: the disk is full", hint="Enlarge the volume, or keep fewer checkpoints.")
    if isinstance(error, FileNotFoundError):
        return DataError(f"{uri} does not exist")
    if isinstance(error, PermissionError):
        return ConfigError(f"{uri}: permission denied", hint="The pod runs as user and group 65532.")
    return StorageError(f"{uri}: {error}")


@contextlib.contextmanager
def _replacing(path: Path, *, keep: bool = False) -> Iterator[Path]:
    """A temporary file that takes the place of `path` if the block succeeds, and leaves nothing if it does not.

    With `keep` it does not where there is a file by then.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # Pods that share the folder count their processes each from 1: only chance keeps their files apart.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.partial")
    temporary.open("xb").close()
    try:
        yield temporary
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        if keep and path.exists():
            return
        try:
            os.link(temporary, path) if keep else temporary.replace(path)
        except FileExistsError:  # of a link: somebody else was faster
            return
        except OSError:
            if not keep:
                raise
            temporary.replace(path)  # a file system without hard links
    finally:
        temporary.unlink(missing_ok=True)


def _is_temporary(path: Path) -> bool:
    return path.name.startswith(".") and path.name.endswith(".partial")


def _check_etag(uri: str, *, expected: str | None, found: str) -> None:
    if expected is not None and expected != found:
        raise DataError(
            f"{uri} has changed since the run was prepared: its ETag was {expected} and is {found}",
            hint="Restore the file, or start a new job.",
        )


def _etag(entry: dict[str, Any]) -> str:
    return str(entry["ETag"]).strip('"')
