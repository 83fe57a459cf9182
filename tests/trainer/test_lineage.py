"""Each output says where it comes from, to the first model and data, and can be held to what was written."""

import json
from pathlib import Path
from typing import Any

import pytest

from kubetune_operator.cli.verify import digest_of as operators_digest_of
from kubetune_operator.cli.verify import hash_files
from kubetune_trainer import verify
from kubetune_trainer.config import FineTuneConfig
from kubetune_trainer.config.outputs import OutputBase
from kubetune_trainer.data.sources import FoundSource
from kubetune_trainer.export import folder_digest
from kubetune_trainer.export.store import store_output
from kubetune_trainer.lineage import lineage_sources, read_lineage, record_lineage
from kubetune_trainer.model_files import find_model
from kubetune_trainer.software import software_digest
from tests.trainer.tiny_model import write_model


def config(folder: Path, **blocks: Any) -> FineTuneConfig:
    name = blocks.pop("name", "first")
    values = {
        "run": {"namespace": "team", "name": name, "uid": f"uid-{name}", "directory": f"file://{folder}/{name}",
                "cache": f"file://{folder}/cache", **blocks.pop("run", {})},
        "workspace": {"uri": f"file://{folder}"},
        "model": {"uri": {"location": f"file://{folder}/model"}},
        "dataset": {"sources": [{"name": "tickets", "uri": {"location": "s3://data/tickets.jsonl"}}]},
        "training": {"max_steps": 1},
    }  # fmt: skip
    return FineTuneConfig.model_validate({**values, **blocks})


def finished(run: FineTuneConfig, folder: Path) -> dict[str, Any]:
    """A run that leaves the model that it began with; returns its lineage."""
    model_dir = Path(run.model.uri.location.removeprefix("file://"))
    output = OutputBase(name="merged", type="HuggingFace")
    return record_lineage(
        run,
        model=find_model(f"file://{model_dir}", s3=None),
        model_dir=model_dir,
        sources=lineage_sources(run.dataset.sources, [FoundSource(name="tickets", etag="abc")]),
        outputs=[store_output(output, folder / "model", config=run)],
    )


def test_the_lineage_stands_in_the_runs_folder_and_beside_each_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_model(tmp_path / "model")
    monkeypatch.setenv("KUBETUNE_IMAGE", "trainer@sha256:9")
    told = finished(config(tmp_path), tmp_path)
    digest, size = folder_digest(tmp_path / "model")
    assert json.loads((tmp_path / "first" / "lineage.json").read_text()) == told
    assert (told["kind"], told["namespace"], told["name"], told["uid"]) == ("FineTuneJob", "team", "first", "uid-first")
    assert told["image"] == "trainer@sha256:9"
    assert told["softwareDigest"] == software_digest()
    assert told["model"] == {"location": f"file://{tmp_path}/model", "digest": digest}
    assert told["sources"] == [{"name": "tickets", "location": "s3://data/tickets.jsonl", "etag": "abc"}]
    uri = f"file://{tmp_path}/first/outputs/merged"
    assert told["outputs"] == [{"name": "merged", "type": "HuggingFace", "uri": uri, "digest": digest, "bytes": size}]
    beside = read_lineage(tmp_path / "first" / "outputs" / "merged")
    assert beside is not None
    assert beside.pop("output") == "merged"
    assert set(beside.pop("files")) == {path.name for path in (tmp_path / "model").iterdir()}
    assert beside == told


def test_the_lineage_of_a_chain_leads_back_to_the_first_model(tmp_path: Path) -> None:
    write_model(tmp_path / "model")
    first = finished(config(tmp_path), tmp_path)
    output = f"{tmp_path}/first/outputs/merged"
    parents = [
        {"kind": "FineTuneJob", "name": "first", "uid": "uid-first", "output": "merged"},
        {"kind": "FineTuneJob", "name": "resumed", "uid": "uid-resumed"},
    ]
    run = config(tmp_path, name="second", run={"parents": parents}, model={"uri": {"location": f"file://{output}"}})
    second = finished(run, tmp_path)
    assert second["parents"] == [first, {"kind": "FineTuneJob", "name": "resumed", "uid": "uid-resumed"}]
    assert second["model"]["digest"] == first["outputs"][0]["digest"], "what was read is what was written"
    by_hand = finished(config(tmp_path, name="third", model={"uri": {"location": f"file://{output}"}}), tmp_path)
    assert by_hand["parents"] == [first], "the folder tells its job, even where nobody names it"


def test_what_decides_a_run_changes_its_digest_and_where_it_ran_does_not(tmp_path: Path) -> None:
    write_model(tmp_path / "model")
    told = finished(config(tmp_path), tmp_path)
    elsewhere = finished(config(tmp_path, name="again"), tmp_path)
    longer = finished(config(tmp_path, training={"max_steps": 2}), tmp_path)
    assert told["configDigest"] == elsewhere["configDigest"] != longer["configDigest"]


@pytest.fixture
def output(tmp_path: Path) -> Path:
    write_model(tmp_path / "model")
    finished(config(tmp_path), tmp_path)
    return tmp_path / "first" / "outputs" / "merged"


def test_an_untouched_folder_is_verified_by_path_uri_and_digest(
    output: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    digest = folder_digest(output)[0]
    for arguments in ([str(output)], [f"file://{output}"], [str(output), "--digest", digest]):
        assert verify.main(arguments) == 0
        assert digest in capsys.readouterr().out
    assert operators_digest_of(hash_files(output)) == digest, "both sides have one rule"


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda folder: (folder / "config.json").write_text("{}"), "config.json has changed"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer.json is missing"),
        (lambda folder: (folder / "more.txt").write_text(""), "more.txt is not one of its files"),
    ],
    ids=["changed", "missing", "more"],
)
def test_what_differs_is_named(output: Path, capsys: pytest.CaptureFixture[str], damage: Any, words: str) -> None:
    damage(output)
    assert verify.main([str(output)]) == 1
    told = capsys.readouterr().err
    assert words in told
    assert "the digest must be sha256:" in told


def test_a_folder_that_nothing_is_known_of_needs_a_digest(output: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (output / "lineage.json").unlink()
    assert verify.main([str(output)]) == 65
    assert "has no lineage.json that says its digest" in capsys.readouterr().err
    assert verify.main([str(output), "--digest", "sha256:0"]) == 1
    assert verify.main([str(output.parent / "none")]) == 65
