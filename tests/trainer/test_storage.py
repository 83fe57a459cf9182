"""One behaviour for every kind of store, and an error that says whose turn it is."""

import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import boto3
import pytest

from kubetune_trainer import storage
from kubetune_trainer.config import S3Storage, SecretName
from kubetune_trainer.errors import ConfigError, DataError, DoesNotFitError, StorageError
from kubetune_trainer.names import ENV_PVC_DIR, ENV_SECRETS_DIR
from kubetune_trainer.storage import Store, download_tree, open_store, upload_tree
from tests.s3 import endpoint_of, s3_server

BUCKET = "team"


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    keys = {"aws_access_key_id": "user", "aws_secret_access_key": "password"}
    with s3_server() as server:
        url = endpoint_of(server)
        boto3.client("s3", endpoint_url=url, region_name="us-east-1", **keys).create_bucket(Bucket=BUCKET)
        yield url


@pytest.fixture
def s3(endpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> S3Storage:
    (tmp_path / "secrets" / "s3").mkdir(parents=True)
    (tmp_path / "secrets" / "s3" / "AWS_ACCESS_KEY_ID").write_text("user\n")
    (tmp_path / "secrets" / "s3" / "AWS_SECRET_ACCESS_KEY").write_text("password\n")
    monkeypatch.setenv(ENV_SECRETS_DIR, str(tmp_path / "secrets"))
    storage._client.cache_clear()
    return S3Storage(endpoint=endpoint, region="us-east-1", credentials_secret=SecretName(name="s3"))


@pytest.fixture(params=["s3", "pvc", "file"])
def store(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    if request.param == "s3":
        return open_store(f"s3://{BUCKET}/{tmp_path.name}", s3=request.getfixturevalue("s3"))
    if request.param == "pvc":
        (tmp_path / "claims" / "disk").mkdir(parents=True)
        monkeypatch.setenv(ENV_PVC_DIR, str(tmp_path / "claims"))
        return open_store("pvc://disk/runs")
    return open_store(f"file://{tmp_path}/store")


def test_what_is_written_is_read_listed_and_removed(store: Store) -> None:
    store.write_bytes("a/one", b"1")
    store.write_bytes("a/two", b"22")
    assert store.exists("a/one")
    assert not store.exists("a")
    assert store.read_bytes("a/two") == b"22"
    assert [(info.path, info.size) for info in store.list("a")] == [("a/one", 1), ("a/two", 2)]
    store.delete_tree("a")
    assert store.list() == []
    store.delete_tree("a")


def test_a_folder_is_not_another_folder_whose_name_it_begins(store: Store) -> None:
    store.write_bytes("step-1/COMPLETE", b"")
    store.write_bytes("step-10/COMPLETE", b"")
    assert [info.path for info in store.list("step-1")] == ["step-1/COMPLETE"]
    store.delete_tree("step-1")
    assert [info.path for info in store.list()] == ["step-10/COMPLETE"]


def test_a_large_file_comes_back_byte_for_byte(store: Store, tmp_path: Path) -> None:
    content = bytes(range(256)) * 80_000  # 20 MB: more than one part
    (tmp_path / "big").write_bytes(content)
    store.upload(tmp_path / "big", "big")
    store.download("big", tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == content


def test_a_tree_comes_back_as_it_was(store: Store, tmp_path: Path) -> None:
    (tmp_path / "tree" / "deep").mkdir(parents=True)
    (tmp_path / "tree" / "deep" / "leaf").write_text("green")
    upload_tree(store, tmp_path / "tree", "copy")
    download_tree(store, "copy", tmp_path / "back")
    assert (tmp_path / "back" / "deep" / "leaf").read_text() == "green"


def test_a_file_that_changed_since_it_was_recorded_is_refused(store: Store, tmp_path: Path) -> None:
    store.write_bytes("model", b"first")
    (recorded,) = store.list("model")
    store.download("model", tmp_path / "model", etag=recorded.etag)
    store.write_bytes("model", b"second")
    with pytest.raises(DataError, match=r"model has changed since the run was prepared: its ETag was"):
        store.download("model", tmp_path / "model", etag=recorded.etag)
    assert (tmp_path / "model").read_bytes() == b"first"


@pytest.mark.parametrize(
    "read",
    [
        lambda store, _: store.read_bytes("nothing"),
        lambda store, target: store.download("nothing", target / "x"),
        lambda store, target: store.download("nothing", target / "x", etag="e"),
    ],
    ids=["read", "download", "download with an etag"],
)
def test_a_missing_file_is_named(store: Store, tmp_path: Path, read: Callable[[Store, Path], object]) -> None:
    with pytest.raises(DataError, match="nothing does not exist"):
        read(store, tmp_path)
    assert not (tmp_path / "x").exists()


def test_a_missing_bucket_is_named(s3: S3Storage) -> None:
    store = open_store("s3://nobody/runs", s3=s3)
    for call in (store.list, lambda: store.write_bytes("x", b""), lambda: store.read_bytes("x")):
        with pytest.raises(ConfigError, match=r"s3://nobody/runs.*: bucket nobody does not exist"):
            call()


@pytest.mark.parametrize(
    "call",
    [
        lambda store, _: store.list(),
        lambda store, _: store.exists("x"),
        lambda store, _: store.read_bytes("x"),
        lambda store, _: store.write_bytes("x", b""),
        lambda store, file: store.upload(file, "x"),
        lambda store, file: store.download("x", file),
    ],
    ids=["list", "exists", "read", "write", "upload", "download"],
)
def test_wrong_credentials_are_named(
    s3: S3Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: Callable[[Store, Path], object]
) -> None:
    monkeypatch.setattr("moto.settings.INITIAL_NO_AUTH_ACTION_COUNT", 0)  # from now on the server checks keys
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match=r"s3://team/runs.*: the credentials do not open it \(") as caught:
        call(open_store("s3://team/runs", s3=s3), tmp_path / "file")
    assert caught.value.hint == "Check the Secret that storage.s3 names."


def test_an_upload_to_a_missing_bucket_is_named(s3: S3Storage, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match="bucket nobody does not exist"):
        open_store("s3://nobody/runs", s3=s3).upload(tmp_path / "file", "file")


def test_a_service_that_does_not_answer_is_worth_another_attempt(
    s3: S3Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "REQUEST_ATTEMPTS", 2)
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        service = s3.model_copy(update={"endpoint": f"http://127.0.0.1:{closed.getsockname()[1]}"})
        with pytest.raises(StorageError, match="s3://team/x"):
            open_store("s3://team", s3=service).read_bytes("x")


def test_a_secret_without_a_key_is_named(s3: S3Storage, tmp_path: Path) -> None:
    (tmp_path / "secrets" / "s3" / "AWS_ACCESS_KEY_ID").unlink()
    with pytest.raises(ConfigError, match="Secret s3 must have the key AWS_ACCESS_KEY_ID, got AWS_SECRET_ACCESS_KEY"):
        open_store("s3://team", s3=s3).list()


def test_an_endpoint_that_is_none_is_named() -> None:
    with pytest.raises(ConfigError, match=r"s3://team: storage\.s3 cannot be used"):
        open_store("s3://team", s3=S3Storage(endpoint="http://", region="us-east-1")).list()


def test_a_claim_that_is_not_mounted_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENV_PVC_DIR, str(tmp_path))
    with pytest.raises(ConfigError, match=r"pvc://disk/runs: the claim disk is not mounted"):
        open_store("pvc://disk/runs")


def test_a_full_disk_leaves_nothing_behind(tmp_path: Path) -> None:
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("needs /dev/full")
    store = open_store(f"file://{tmp_path}/store")
    (tmp_path / "store").mkdir()
    with pytest.raises(DoesNotFitError, match="the disk is full"), storage._local_errors(store.uri("x")):
        full.write_bytes(b"x")
    assert store.list() == []
