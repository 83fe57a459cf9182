"""One behaviour for every kind of store, and an error that says whose turn it is."""

import contextlib
import json
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import boto3
import pytest
import torch
from torch import nn

from kubetune_trainer import storage
from kubetune_trainer.checkpoint import Checkpointer
from kubetune_trainer.claim import claim
from kubetune_trainer.config import Checkpoint, FineTuneConfig, S3Storage, SecretName
from kubetune_trainer.distributed import World
from kubetune_trainer.errors import ConfigError, DataError, DoesNotFitError, StorageError
from kubetune_trainer.names import ENV_PVC_DIR, ENV_SECRETS_DIR
from kubetune_trainer.storage import LocalStore, Store, download_tree, open_store, upload_tree
from tests.s3 import endpoint_of, s3_server, s3_server_behind

BUCKET = "team"
KEPT = "kept"
"""A bucket of which nothing may be deleted."""
EXPIRED = ("400 Bad Request", "<Error><Code>ExpiredToken</Code><Message>The token has expired.</Message></Error>")


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    keys = {"aws_access_key_id": "user", "aws_secret_access_key": "password"}
    with s3_server() as server:
        url = endpoint_of(server)
        client = boto3.client("s3", endpoint_url=url, region_name="us-east-1", **keys)
        client.create_bucket(Bucket=BUCKET)
        client.create_bucket(Bucket=KEPT)
        denied = {"Effect": "Deny", "Principal": "*", "Action": "s3:DeleteObject", "Resource": f"arn:aws:s3:::{KEPT}/*"}
        client.put_bucket_policy(Bucket=KEPT, Policy=json.dumps({"Version": "2012-10-17", "Statement": [denied]}))
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


def test_a_file_is_removed_and_no_folder(store: Store) -> None:
    for path in ("a/b/one", "a/bb"):
        store.write_bytes(path, b"1")
    store.delete("a/bb")
    store.delete("a/nothing")
    with contextlib.suppress(StorageError):  # the file system knows folders, and says what it was asked
        store.delete("a/b")
    assert [info.path for info in store.list()] == ["a/b/one"]


def test_what_shall_come_last_does(tmp_path: Path) -> None:
    for name in ("a", "b", "c", "d/b"):
        (tmp_path / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "tree" / name).write_text(name)

    class Told(storage.LocalStore):
        def upload(self, local: Path, path: str) -> None:
            uploads.append((local.relative_to(tmp_path / "tree").as_posix(), path))

    uploads: list[tuple[str, str]] = []
    upload_tree(Told("file://x", tmp_path / "x"), tmp_path / "tree", "to", last=("a", "b"))
    assert uploads == [(name, f"to/{name}") for name in ("c", "d/b", "a", "b")]


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


@contextlib.contextmanager
def moody_server(*moods: str) -> Iterator[tuple[str, list[str]]]:
    """A service that takes each connection in its next mood: silent, broken in the middle, or well; its URL and moods.

    With the last mood it stays.
    """
    left, taken = list(moods), []

    class Moody(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            taken.append(left.pop(0) if len(left) > 1 else left[0])
            if taken[-1] == "silent":
                time.sleep(3)
                return
            self.send_response(200)
            self.send_header("Content-Length", "10")
            self.end_headers()
            self.wfile.write(b"01234" if taken[-1] == "broken" else b"0123456789")
            self.close_connection = True

        def log_message(self, *_words: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Moody)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", taken
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize(
    ("moods", "content"),
    [
        (["silent"], None),
        (["silent", "well"], b"0123456789"),
        (["broken"], None),
        (["broken", "broken", "well"], b"0123456789"),
    ],
    ids=["silent", "silent once", "broken", "broken twice"],
)
def test_a_service_that_falls_silent_is_worth_another_attempt(
    s3: S3Storage, monkeypatch: pytest.MonkeyPatch, moods: list[str], content: bytes | None
) -> None:
    monkeypatch.setattr(storage, "REQUEST_ATTEMPTS", 2)
    monkeypatch.setattr(storage, "READ_TIMEOUT_SECONDS", 0.5)
    with moody_server(*moods) as (url, taken):
        store = open_store("s3://team", s3=s3.model_copy(update={"endpoint": url}))
        if content is None:
            with pytest.raises(StorageError, match="s3://team/x"):
                store.read_bytes("x")
        else:
            assert store.read_bytes("x") == content
            assert taken == moods


def test_what_is_there_stays_where_nothing_is_to_be_replaced(store: Store, tmp_path: Path) -> None:
    for name in ("first", "second"):
        (tmp_path / name).write_text(name)
    store.upload(tmp_path / "first", "model", replace=False)
    [before] = store.list()
    store.upload(tmp_path / "second", "model", replace=False)
    assert store.list() == [before]
    assert store.read_bytes("model") == b"first"
    store.upload(tmp_path / "second", "model")
    assert store.read_bytes("model") == b"second"


def test_folders_of_a_console_are_no_files(s3: S3Storage, endpoint: str, tmp_path: Path) -> None:
    keys = {"aws_access_key_id": "user", "aws_secret_access_key": "password"}
    client = boto3.client("s3", endpoint_url=endpoint, region_name="us-east-1", **keys)
    for key in ("", "sub/", "sub/file"):
        client.put_object(Bucket=BUCKET, Key=f"{tmp_path.name}/{key}", Body=b"x" if key == "sub/file" else b"")
    store = open_store(f"s3://{BUCKET}/{tmp_path.name}", s3=s3)
    assert [info.path for info in store.list()] == ["sub/file"]
    download_tree(store, "", tmp_path / "copy")
    assert (tmp_path / "copy" / "sub" / "file").read_bytes() == b"x"


def test_a_path_stays_in_its_claim(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "disk").mkdir()
    monkeypatch.setenv(ENV_PVC_DIR, str(tmp_path))
    assert open_store("pvc://disk//runs/").local_path() == tmp_path / "disk" / "runs"
    with pytest.raises(ConfigError, match=r"pvc://disk/\.\./other: a path must stay in its claim"):
        open_store("pvc://disk/../other")


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


def test_pods_that_write_the_same_file_keep_out_of_each_others_way(tmp_path: Path) -> None:
    target = tmp_path / "tokens.bin"
    with storage._replacing(target) as mine:
        mine.write_bytes(b"mine, whole")
        # Another pod's, whose process may well have the same number.
        with storage._replacing(target) as theirs:
            theirs.write_bytes(b"theirs")
        assert target.read_bytes() == b"theirs"
        assert LocalStore("file://x", tmp_path).list()[0].path == "tokens.bin"
        assert len(list(tmp_path.iterdir())) == 2
    assert target.read_bytes() == b"mine, whole"
    assert list(tmp_path.iterdir()) == [target]


def test_what_a_killed_write_has_left_is_removed(tmp_path: Path) -> None:
    store = LocalStore("file://x", tmp_path)
    store.write_bytes("whole", b"1")
    with pytest.raises(FileNotFoundError), storage._replacing(tmp_path / "deep" / "part"):  # it has no file to publish
        store.delete_partial()
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["whole"]


def token_of(environ: Mapping[str, Any]) -> str:
    """The session token that a request was signed with."""
    return str(environ.get("HTTP_X_AMZ_SECURITY_TOKEN", ""))


def test_credentials_that_have_expired_are_worth_another_attempt_and_renewed_ones_are_taken(
    s3: S3Storage, tmp_path: Path
) -> None:
    secret = tmp_path / "secrets" / "s3" / "AWS_SESSION_TOKEN"
    secret.write_text("first")
    open_store(f"s3://{BUCKET}", s3=s3).write_bytes("rotated", b"1")
    with s3_server_behind(lambda request: None if token_of(request) == "second" else EXPIRED) as url:
        store = open_store(f"s3://{BUCKET}", s3=s3.model_copy(update={"endpoint": url}))
        with pytest.raises(
            StorageError, match=r"s3://team/rotated: the credentials have expired \(ExpiredToken\)"
        ) as no:
            store.read_bytes("rotated")
        assert no.value.hint.startswith("Renew the Secret that storage.s3 names")
        with pytest.raises(StorageError) as no:
            store.exists("rotated")
        assert "Secret" in no.value.hint
        secret.write_text("second")
        assert store.read_bytes("rotated") == b"1"


def test_an_upload_in_parts_outlives_the_credentials_that_it_began_with(s3: S3Storage, tmp_path: Path) -> None:
    secret, valid = tmp_path / "secrets" / "s3" / "AWS_SESSION_TOKEN", ["first"]
    secret.write_text("first")
    (tmp_path / "big").write_bytes(bytes(20_000_000))

    def rotate(request: Mapping[str, Any]) -> tuple[str, str] | None:
        answer = None if token_of(request) == valid[0] else EXPIRED
        if request["QUERY_STRING"] == "uploads":  # the upload begins, none of its parts is signed yet
            valid[0] = "second"
            secret.write_text("second")
        return answer

    with s3_server_behind(rotate) as url:
        store = open_store(f"s3://{BUCKET}", s3=s3.model_copy(update={"endpoint": url}))
        store.upload(tmp_path / "big", "big")
    assert valid == ["second"]
    assert open_store(f"s3://{BUCKET}", s3=s3).list("big")[0].size == 20_000_000


def test_no_request_is_signed_with_parts_of_two_secrets(
    s3: S3Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    volume, signed = tmp_path / "volume", set()

    def rotate(number: int) -> None:
        """As the kubelet does: all keys at once, by one link."""
        (volume / f"..{number}" / "s3").mkdir(parents=True)
        for key in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
            (volume / f"..{number}" / "s3" / key).write_text(f"{key}{number}")
        (volume / "..data_tmp").symlink_to(f"..{number}")
        (volume / "..data_tmp").replace(volume / "..data")

    def look(request: Mapping[str, Any]) -> None:
        key = re.search(r"Credential=AWS_ACCESS_KEY_ID(\d+)/", request["HTTP_AUTHORIZATION"])
        assert key is not None
        signed.add((key[1], token_of(request).removeprefix("AWS_SESSION_TOKEN")))

    rotate(0)
    (volume / "s3").symlink_to("..data/s3")
    monkeypatch.setenv(ENV_SECRETS_DIR, str(volume))
    with s3_server_behind(look) as url, ThreadPoolExecutor(4) as threads:
        store = open_store(f"s3://{BUCKET}", s3=s3.model_copy(update={"endpoint": url}))
        writes = [threads.submit(store.write_bytes, f"many/{number}", b"") for number in range(60)]
        for number in range(1, 200):
            rotate(number)
        for write in writes:
            write.result()
    assert {key == token for key, token in signed} == {True}
    assert len(signed) > 1, "they were rotated meanwhile"


def test_what_may_not_be_deleted_is_named_and_so_is_who_refuses(s3: S3Storage, tmp_path: Path) -> None:
    store = open_store(f"s3://{KEPT}/{tmp_path.name}", s3=s3)
    store.write_bytes("a", b"")
    refused = rf"s3://kept/{tmp_path.name}/a: the credentials do not let it be deleted \(AccessDenied\)"
    with pytest.raises(ConfigError, match=refused):
        store.delete_tree("")
    config = FineTuneConfig.model_validate({
        "run": {"name": "run", "directory": store.uri(), "cache": store.uri("cache")},
        "workspace": {"uri": store.uri()},
        "model": {"uri": {"location": "file:///model"}},
        "dataset": {"sources": [{"name": "a", "uri": {"location": "s3://data/a.jsonl"}}]},
        "training": {"max_steps": 3},
        "storage": {"s3": s3.model_dump()},
    })  # fmt: skip
    with pytest.raises(ConfigError, match=refused):
        claim(config, fresh=True)
    assert [info.path for info in store.list()] == ["a"], "nothing is claimed of what is not fresh"


def test_a_delete_that_failed_for_the_moment_is_worth_another_attempt(s3: S3Storage) -> None:
    open_store(f"s3://{BUCKET}", s3=s3).write_bytes("moment/a", b"")
    error = "<Error><Key>moment/a</Key><Code>InternalError</Code><Message>try again</Message></Error>"
    busy = ("200 OK", f"<DeleteResult>{error}</DeleteResult>")
    with s3_server_behind(lambda request: busy if "delete" in request["QUERY_STRING"] else None) as url:
        store = open_store(f"s3://{BUCKET}", s3=s3.model_copy(update={"endpoint": url}))
        with pytest.raises(StorageError, match=r"s3://team/moment/a: .*InternalError.*try again"):
            store.delete_tree("moment")


def test_old_checkpoints_that_may_not_be_deleted_are_warned_of(
    s3: S3Storage, world: World, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    store = open_store(f"s3://{KEPT}/{tmp_path.name}", s3=s3)
    settings = Checkpoint(keep=1, mode="Sync")
    saver = Checkpointer(store, settings=settings, world=world, scratch=tmp_path / "scratch", record={})
    model = nn.Linear(2, 2)
    for step in (1, 2):
        saver.save(step, model, torch.optim.AdamW(model.parameters()))
    [warning] = [event for event in map(json.loads, capfd.readouterr().out.splitlines()) if event["event"] == "warning"]
    place = f"s3://kept/{tmp_path.name}/step-1/COMPLETE"
    assert warning["message"].startswith(
        f"old checkpoints could not be removed: {place}: the credentials do not let it"
    )
