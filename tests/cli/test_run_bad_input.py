"""Bad input that only a run can find: what `kubetune run` says, and the exit code that a pod would have."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kubetune_operator.api.manifest import dump_manifests
from tests.api.test_finetunejob import manifest
from tests.recipes.tiny import write_messages, write_model
from tests.s3 import locked_s3_server

CONFIG, DATA = 64, 65
DATASET = "spec__dataset__sources__0"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "model")


@pytest.fixture
def place(model: Path, tmp_path: Path) -> Path:
    """A folder with a model and data that can be spoiled."""
    shutil.copytree(model, tmp_path / "model")
    write_messages(tmp_path / "pairs.jsonl", samples=8, seed=1)
    return tmp_path


def nothing(_place: Path) -> None:
    pass


def remove_config(place: Path) -> None:
    (place / "model" / "config.json").unlink()


def truncate_weights(place: Path) -> None:
    weights = place / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


def break_a_line(place: Path) -> None:
    with (place / "pairs.jsonl").open("a") as data:
        data.write('{"messages": [\n')


def empty_the_data(place: Path) -> None:
    (place / "pairs.jsonl").write_text("")


def rename_columns(place: Path) -> None:
    (place / "pairs.jsonl").write_text(json.dumps({"question": "a", "reply": "b"}) + "\n")


Case = tuple[Callable[[Path], None], dict[str, Any], int, list[str]]
BAD: dict[str, Case] = {
    "a model folder without config.json": (remove_config, {}, DATA, ["model: config.json is missing"]),
    "truncated weights": (truncate_weights, {}, DATA, ["model.safetensors", "cut off"]),
    "a model folder that is not there": (
        nothing, {"spec__model__uri__location": "file:///nonexistent"}, DATA,
        ["Model folder file:///nonexistent: there is no such folder"],
    ),
    "a malformed line": (break_a_line, {}, DATA, ["pairs.jsonl", "line 9"]),
    "empty data": (empty_the_data, {}, DATA, ["pairs"]),
    "columns of no format": (rename_columns, {}, DATA, ["question", "reply"]),
    "a mapped column that is not there": (
        nothing, {DATASET + "__format": "Messages", DATASET + "__columns": {"messages": "chat"}}, DATA, ["chat"],
    ),
    "a template that fails": (nothing, {"spec__dataset__chatTemplate": "{{ messages[9].role }}"}, DATA, ["template"]),
    "a template that is no template": (nothing, {"spec__dataset__chatTemplate": "{% for %}"}, DATA, ["template"]),
    "a sample over the limit": (
        nothing, {"spec__dataset__maxSequenceLength": 16, "spec__dataset__overlong": "Fail"}, DATA, ["pairs", "16"],
    ),
    "a ConfigMap that is not in the file": (
        nothing, {"spec__dataset__sources": [{"name": "pairs", "configMap": {"name": "cm", "key": "a.jsonl"}}]}, CONFIG,
        ["ConfigMap cm", "a.jsonl"],
    ),
}  # fmt: skip


def local_job(place: Path, **changes: Any) -> Path:
    """A manifest with everything in the folder."""
    good = {
        "spec__model__uri__location": f"file://{place}/model",
        "spec__dataset__sources": [{"name": "pairs", "uri": {"location": f"file://{place}/pairs.jsonl"}}],
        "spec__workspace__uri": f"file://{place}/runs",
    }
    (place / "job.yaml").write_text(dump_manifests([manifest(**good | changes)]))
    return place / "job.yaml"


@pytest.mark.parametrize("case", BAD.values(), ids=BAD)
def test_bad_input_ends_the_run_with_a_code_and_words(case: Case, place: Path, kubetune: Any) -> None:
    spoil, changes, code, words = case
    spoil(place)
    assert_told(kubetune("run", local_job(place, **changes)), code=code, words=words)


@pytest.mark.parametrize(
    ("bucket", "secret_key", "words"),
    [
        ("team", "not the secret key", ["s3://team/runs", "the credentials do not open it"]),
        ("nobody", "the secret key", ["bucket nobody does not exist"]),
    ],
)
def test_a_workspace_that_does_not_open_ends_the_run(
    *, bucket: str, secret_key: str, words: list[str], place: Path, kubetune: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    (place / "buckets" / "team").mkdir(parents=True)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "somebody")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", secret_key)
    with locked_s3_server(place / "buckets", access_key="somebody", secret_key="the secret key") as url:
        storage = {"s3": {"endpoint": url, "region": "us-east-1"}}
        job = local_job(place, spec__workspace__uri=f"s3://{bucket}/runs", spec__storage=storage)
        assert_told(kubetune("run", job), code=CONFIG, words=words)


def assert_told(ran: Any, *, code: int, words: list[str]) -> None:
    """The run has ended with the code, and names the job and what is wrong with it."""
    assert ran.code == code, ran.err
    assert all(word in ran.err for word in words), ran.err
    assert ran.err.startswith("error: FineTuneJob default/run7")
    assert "Traceback" not in ran.err
