"""A run is prepared once; what is wrong with its model or its data is named before an accelerator is used."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
import yaml

from kubetune_trainer import report
from kubetune_trainer.config import FineTuneConfig, load_config
from kubetune_trainer.data.prepare import Prepared, fetch, prepare
from kubetune_trainer.data.store import DataWriter
from kubetune_trainer.errors import ConfigError, DataError, TrainerError
from kubetune_trainer.storage import _client, scratch_dir
from tests.cluster.paths import ROOT
from tests.s3 import endpoint_of, s3_server
from tests.trainer.tiny_model import write_model

QUESTIONS = [f"What is {number} and {number}?" for number in range(40)]
Records = list[dict[str, Any]]


def conversation(question: str, answer: str = "I do not know.") -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def write_lines(path: Path, records: Records) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.fixture(autouse=True)
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KUBETUNE_SCRATCH", str(tmp_path / "scratch"))
    scratch_dir.cache_clear()
    _client.cache_clear()


class Project:
    """A folder with a tiny model, forty questions, and the config of a run over them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model = write_model(folder / "model")
        self.data = write_lines(folder / "train.jsonl", [conversation(question) for question in QUESTIONS])
        self.events: list[tuple[str, dict[str, Any]]] = []

    def config(self, *overrides: str) -> FineTuneConfig:
        path = self.folder / "run.yaml"
        values = {
            "model": {"uri": {"location": f"file://{self.model}"}},
            "dataset": {
                "sources": [{"name": "questions", "uri": {"location": f"file://{self.data}"}}],
                "max_sequence_length": 256,
            },
            "training": {"epochs": 2, "global_batch_size": 4},
            "workspace": {"uri": f"file://{self.folder}/runs"},
        }
        path.write_text(yaml.safe_dump(values))
        return load_config(path, overrides=overrides)

    def report(self, event: str, **fields: Any) -> None:
        self.events.append((event, fields))

    def prepare(self, *overrides: str) -> Prepared:
        return prepare(self.config(*overrides), report=self.report)

    def error(self, *overrides: str) -> TrainerError:
        with pytest.raises(TrainerError) as caught:
            self.prepare(*overrides)
        assert not (self.folder / "runs/run/prepared.json").exists()
        return caught.value


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return Project(tmp_path)


def test_what_an_output_carries_in_part_only_is_a_warning(project: Project) -> None:
    file = project.model / "tokenizer.json"
    written = json.loads(file.read_text())
    written["pre_tokenizer"]["use_regex"] = True
    file.write_text(json.dumps(written | {"normalizer": {"type": "NFC"}}))
    project.prepare("outputs=[{name: edge, type: GGUF, gguf: {type: F16}}]")
    [told] = [fields["message"] for event, fields in project.events if event == "warning"]
    assert "output edge: llama.cpp does not bring text into NFC" in told


def test_a_run_trains_on_the_rows_that_were_prepared(project: Project) -> None:
    config = project.config("dataset.packing=None")
    prepared = prepare(config, report=project.report)
    local = fetch(prepared, config)
    assert local.model_dir == project.model
    assert local.validation_data is None
    assert len(local.train_data) == prepared.train.rows == prepared.data.rows == prepared.data.samples == 40
    assert prepared.total_steps == 20
    row = local.train_data[3]
    text = "<|im_start|>user\nWhat is 3 and 3?<|im_end|>\n<|im_start|>assistant\nI do not know.<|im_end|>\n"
    assert len(row.tokens) == len(text) - len("<|im_start|>" * 2 + "<|im_end|>" * 2) + 4
    assert row.trained_tokens == len("I do not know.") + 1
    assert prepared.data.trainable_token_percent == pytest.approx(100 * 15 / len(row.tokens), rel=0.05)


def test_a_page_shows_the_data_with_what_is_trained_even_if_an_earlier_run_tokenized_it(project: Project) -> None:
    write_lines(project.data, [conversation("Is 1 < 2?", "Yes & no.")] * 2 + [conversation(q) for q in QUESTIONS])
    pages = []
    for name in ("first", "second"):
        prepared = project.prepare(f"run.name={name}")
        assert prepared.message()["artifacts"] == {"report": f"file://{project.folder}/runs/{name}/report.html"}
        pages.append((project.folder / f"runs/{name}/report.html").read_text())
    page = pages[0]
    assert (
        "Is 1 &lt; 2?&lt;|im_end|&gt;\n&lt;|im_start|&gt;assistant\n<mark>Yes &amp; no.&lt;|im_end|&gt;</mark>" in page
    )
    assert page.count("<pre>") == 2
    assert "<th>samples</th><td>42</td>" in page
    assert pages[1] == page.replace("local/first", "local/second")


def test_packing_puts_the_same_samples_into_fewer_rows(project: Project) -> None:
    packed = project.prepare("run.name=packed")
    apart = project.prepare("run.name=apart", "dataset.packing=None")
    assert packed.train.tokens == apart.train.tokens
    assert packed.train.rows < apart.train.rows / 2


def test_a_prepared_run_is_only_reported_again(project: Project) -> None:
    first = project.prepare()
    project.data.unlink()
    assert project.prepare() == first


def test_another_run_over_the_same_data_uses_its_rows(project: Project) -> None:
    first = project.prepare()
    second = project.prepare("run.name=other", "training.learning_rate=1e-5")
    assert second.train == first.train
    assert ("prepare", {"stage": "Using tokenized data of an earlier run"}) in project.events


def test_rows_are_found_where_this_run_reaches_them(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(project.folder)
    first = project.prepare("workspace.uri=file://runs")
    second = project.prepare("run.name=other")
    assert first.train.location.startswith("file://runs/")
    assert second.train.location == first.train.location.replace("file://runs", f"file://{project.folder}/runs")


@pytest.mark.parametrize(
    "override", ["dataset.train_on=All", "dataset.packing=None", "training.seed=1", "dataset.max_sequence_length=128"]
)
def test_what_decides_the_rows_makes_new_ones(override: str, project: Project) -> None:
    assert project.prepare("run.name=other", override).train.location != project.prepare().train.location


def test_changed_data_is_tokenized_again(project: Project) -> None:
    first = project.prepare()
    write_lines(project.data, [conversation(question) for question in QUESTIONS[:20]])
    assert project.prepare("run.name=other").data.samples == first.data.samples - 20


def test_a_model_that_changed_since_is_refused(project: Project) -> None:
    prepared = project.prepare()
    os.utime(project.model / "model.safetensors", (1, 1))
    with pytest.raises(DataError, match=r"model\.safetensors has changed since the run was prepared"):
        fetch(prepared, project.config())


def texts(store: Any) -> list[str]:
    return sorted("".join(map(str, row.tokens.tolist())) for row in store)


def test_what_is_held_out_is_never_trained_on_even_if_it_comes_twice(project: Project) -> None:
    records = [conversation(question) for question in QUESTIONS]
    write_lines(project.data, [*records, *records, *records])
    config = project.config("dataset.validation.fraction=0.25", "dataset.packing=None")
    local = fetch(prepare(config, report=project.report), config)
    assert local.validation_data is not None
    held, trained = texts(local.validation_data), texts(local.train_data)
    assert len(held) == 30  # a quarter of the different questions, each three times
    assert len(trained) == 90
    assert not set(held) & set(trained)


def test_validation_may_have_sources_of_its_own(project: Project) -> None:
    write_lines(project.folder / "held.jsonl", [conversation("Who?")])
    source = f"{{name: held, uri: {{location: 'file://{project.folder}/held.jsonl'}}}}"
    prepared = project.prepare(f"dataset.validation.sources=[{source}]")
    assert prepared.validation is not None
    assert (prepared.validation.rows, prepared.data.samples) == (1, 40)
    [held] = prepared.held_out
    assert held.name == "held"
    assert held.etag or held.digest


@pytest.mark.parametrize(("weight", "rows"), [("2", 80), ("0.5", 20), ("1.25", 50)])
def test_a_weight_says_how_often_a_source_comes(weight: str, rows: int, project: Project) -> None:
    assert project.prepare(f"dataset.sources.0.weight={weight}", "dataset.packing=None").train.rows == rows


@pytest.mark.parametrize(
    ("overlong", "rows", "dropped", "truncated"),
    [("Truncate", 41, 0, 1), ("Split", 43, 0, 0), ("Drop", 40, 1, 0)],
)
def test_a_sample_that_is_too_long(overlong: str, rows: int, dropped: int, truncated: int, project: Project) -> None:
    write_lines(project.data, [*map(conversation, QUESTIONS), conversation("Why?", "x" * 600)])
    prepared = project.prepare(f"dataset.overlong={overlong}", "dataset.packing=None")
    assert (prepared.train.rows, prepared.data.dropped_samples, prepared.data.truncated_samples) == (
        rows,
        dropped,
        truncated,
    )


def test_a_sample_with_nothing_to_learn_is_left_out_and_counted(project: Project) -> None:
    only_asked = {"messages": [{"role": "user", "content": "Anyone?"}]}
    write_lines(project.data, [*map(conversation, QUESTIONS), only_asked, conversation("x" * 300)])
    data = project.prepare("dataset.packing=None").data
    assert (data.samples, data.rows, data.dropped_samples) == (42, 40, 2)


@pytest.mark.parametrize(
    ("record", "learned"),
    [
        ({"text": "Once upon"}, 8 + 1),
        ({"prompt": "Once", "completion": " upon"}, 5 + 1),
        ({"instruction": "Once", "output": "upon"}, 4 + 1),
    ],
)
def test_every_format_is_learned_with_an_end(record: dict[str, Any], learned: int, project: Project) -> None:
    write_lines(project.data, [record])
    config = project.config()
    assert fetch(prepare(config, report=project.report), config).train_data[0].trained_tokens == learned


def test_files_of_a_folder_and_keys_of_config_maps_are_sources(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KUBETUNE_CONFIGMAPS_DIR", str(project.folder / "configmaps"))
    write_lines(project.folder / "configmaps/small/a.jsonl", [conversation("Small?")])
    for number in range(3):
        write_lines(project.folder / f"parts/part-{number}.jsonl", [conversation(f"Part {number}?")])
    sources = (
        f"[{{name: parts, uri: {{location: 'file://{project.folder}/parts'}}}}, "
        f"{{name: two, uri: {{location: 'file://{project.folder}/parts/part-[01].jsonl'}}}}, "
        "{name: small, config_map: {name: small, key: a.jsonl}}]"
    )
    prepared = project.prepare(f"dataset.sources={sources}")
    assert prepared.data.samples == 6
    assert [source.name for source in prepared.sources] == ["parts", "two", "small"]
    assert str(prepared.sources[2].digest).startswith("sha256:")


def break_line(project: Project) -> None:
    with project.data.open("a") as file:
        file.write('{"messages": [}\n')


def cut_off_weights(project: Project) -> None:
    with (project.model / "model.safetensors").open("r+b") as file:
        file.truncate(5000)


def cut_off_header(project: Project) -> None:
    with (project.model / "model.safetensors").open("r+b") as file:
        file.truncate(100)


def lose(name: str) -> Callable[[Project], None]:
    return lambda project: (project.model / name).unlink()


def set_records(*records: dict[str, Any]) -> Callable[[Project], None]:
    return lambda project: write_lines(project.data, list(records)) and None


def leave_as_it_is(_: Project) -> None:
    """Some mistakes are in the config alone."""


LONG = conversation("Why?", "x" * 600)
ALPACA = {"instruction": "Add", "context": "1+1", "output": "2"}


@pytest.mark.parametrize(
    ("spoil", "overrides", "message"),
    [
        (break_line, [], "{data} line 41 is not JSON: Expecting value at column 15"),
        (set_records(), [], "dataset source questions: {data} has no samples"),
        (set_records({"question": "a", "answer": "b"}), [],
         "dataset source questions: {data} line 1: the columns question, answer match no format: Messages needs "),
        (set_records(conversation("a"), {"text": "b"}), [],
         "dataset source questions: {data} line 2: messages must be a list of messages, got None"),
        (set_records(*9 * [ALPACA]), ["dataset.sources.0.columns={input: contxt}"],
         "dataset source questions: dataset.sources[].columns.input is contxt, and no record has that column"),
        (leave_as_it_is, ["dataset.chat_template=\"{{ raise_exception('no users here') }}\""],
         "dataset source questions: {data} line 1: the chat template fails: no users here"),
        (leave_as_it_is, ["dataset.chat_template='{% if %}'"], "the chat template is not jinja: line 1: "),
        (set_records(conversation("a"), LONG), ["dataset.overlong=Fail"],
         "dataset source questions: {data} line 2: the sample has 625 tokens, and dataset.maxSequenceLength is 256"),
        (set_records(LONG), ["dataset.overlong=Drop"],
         "dataset source questions: none of its 1 samples has a token to train on"),
        (leave_as_it_is, ["dataset.sources.0.uri.location=file:///nowhere/x.jsonl"],
         "dataset source questions: file:///nowhere/x.jsonl has no data files"),
        (lose("config.json"), [], "Model folder file://{model}: config.json is missing"),
        (lose("tokenizer.json"), [], "Model folder file://{model}: tokenizer.json is missing"),
        (lose("model.safetensors"), [],
         "Model folder file://{model}: neither model.safetensors nor model.safetensors.index.json is there"),
        (cut_off_weights, [],
         "Model folder file://{model}: model.safetensors is not a whole safetensors file: by its header it must have "),
        (cut_off_header, [],
         "Model folder file://{model}: model.safetensors is not a whole safetensors file: its header must have "),
        (leave_as_it_is, ["model.uri.location=file:///nowhere"],
         "Model folder file:///nowhere: there is no such folder, or it is empty"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(
    spoil: Callable[[Project], None], overrides: list[str], message: str, project: Project
) -> None:
    spoil(project)
    error = project.error(*overrides)
    assert (error.exit_code, error.reason) == (65, "DataInvalid")
    assert str(error).startswith(message.format(data=f"file://{project.data}", model=project.model))


def test_a_mapped_column_may_be_in_some_records_only(project: Project) -> None:
    write_lines(project.data, [*299 * [{"instruction": "Add", "output": "2"}], ALPACA])
    config = project.config("dataset.sources.0.columns={input: context}", "dataset.packing=None")
    rows = fetch(prepare(config, report=project.report), config).train_data
    assert len(rows[299].tokens) == len(rows[0].tokens) + len("\n\n1+1")


def test_a_table_without_a_mapped_column_is_refused_at_its_first_record(project: Project) -> None:
    project.data = project.folder / "train.csv"
    project.data.write_text("instruction,context,output\nAdd,1+1,2\n1,2\n")
    error = project.error("dataset.sources.0.columns={input: contxt}")
    assert str(error) == (
        "dataset source questions: dataset.sources[].columns.input is contxt, and no record has that column; "
        "the first has instruction, context, output"
    )


def test_a_model_without_a_template_asks_for_one(project: Project) -> None:
    write_model(project.model, template=None)
    error = project.error()
    assert "line 1: the model has no chat template" in str(error)
    assert "dataset.chatTemplate" in error.hint


def test_a_shard_that_the_index_names_must_be_there(project: Project) -> None:
    index = {"weight_map": {"a": "model-1.safetensors"}}
    (project.model / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "model-1.safetensors is missing, and model.safetensors.index.json names it" in str(project.error())


def test_a_full_disk_ends_the_run_as_one(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    """/dev/full answers a write as a full disk does."""
    begin = DataWriter.__init__

    def begin_on_a_full_disk(writer: DataWriter, folder: Path) -> None:
        begin(writer, folder)
        writer._files["tokens"].close()
        writer._files["tokens"] = Path("/dev/full").open("wb", buffering=0)  # noqa: SIM115 (the writer closes it)

    monkeypatch.setattr(DataWriter, "__init__", begin_on_a_full_disk)
    with pytest.raises(OSError, match="No space left on device") as caught:
        project.prepare()
    known = report._known(caught.value)
    assert known is not None
    assert (known.exit_code, known.reason) == (66, "DoesNotFit")
    assert not any((project.folder / "scratch/prepare").iterdir())


def test_the_recipe_ends_with_what_the_status_needs(project: Project) -> None:
    project.config()
    log = project.folder / "termination"
    done = subprocess.run(
        [sys.executable, str(ROOT / "recipes/prepare.py"), "--config", str(project.folder / "run.yaml")],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "KUBETUNE_TERMINATION_LOG": str(log)},
    )
    told = json.loads(log.read_text())
    assert told["result"] == "Prepared"
    assert set(told) == {
        "result", "exitCode", "model", "sources", "data", "estimate", "parameters", "totalSteps", "artifacts",
    }  # fmt: skip
    assert set(told["model"]) == {"location", "etag"}
    assert set(told["data"]) == {
        "samples", "rows", "tokens", "trainableTokenPercent", "droppedSamples", "truncatedSamples",
    }  # fmt: skip
    assert set(told["estimate"]) == {"memoryPerDeviceBytes", "message"}
    events = [json.loads(line) for line in done.stdout.splitlines()]
    assert {event["event"] for event in events} == {"prepare"}
    assert events[-1]["stage"] == "Prepared"


def test_datasets_too_many_for_the_termination_message_cost_nothing_else(project: Project) -> None:
    location = f"file://{project.data}"
    sources = [{"name": f"questions-{number:050}", "uri": {"location": location}} for number in range(64)]
    message = project.prepare(f"dataset.sources={json.dumps(sources)}").message()
    assert "sources" not in message
    assert message["data"]["samples"] == 64 * 40
    told = report.fit({"result": "Prepared", "exitCode": 0, **message})
    assert json.loads(told)["data"] == message["data"]


def test_the_recipe_ends_with_the_exit_code_of_what_went_wrong(project: Project) -> None:
    project.config()
    break_line(project)
    log = project.folder / "termination"
    done = subprocess.run(
        [sys.executable, str(ROOT / "recipes/prepare.py"), "--config", str(project.folder / "run.yaml")],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "KUBETUNE_TERMINATION_LOG": str(log)},
    )
    assert done.returncode == 65
    told = json.loads(log.read_text())
    assert (told["result"], told["reason"]) == ("Failed", "DataInvalid")
    assert told["message"].startswith(f"file://{project.data} line 41 is not JSON")


@pytest.fixture
def bucket(project: Project, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """An S3 server with the project's model and data; returns its endpoint."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "user")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "password")
    with s3_server() as server:
        s3 = boto3.client("s3", endpoint_url=endpoint_of(server), region_name="us-east-1")
        s3.create_bucket(Bucket="team")
        for file in project.model.iterdir():
            s3.upload_file(str(file), "team", f"models/tiny/{file.name}")
        s3.upload_file(str(project.data), "team", "data/train.jsonl")
        yield endpoint_of(server)


def on_s3(endpoint: str) -> list[str]:
    return [
        f"storage.s3={{endpoint: '{endpoint}', region: us-east-1}}",
        "model.uri.location=s3://team/models/tiny/",
        "dataset.sources.0.uri.location=s3://team/data/train.jsonl",
        "workspace.uri=s3://team/runs",
        "run.directory=s3://team/runs/run",
        "run.cache=s3://team/runs/cache",
    ]


def test_model_data_and_workspace_may_lie_in_s3(project: Project, bucket: str) -> None:
    there = prepare(project.config(*on_s3(bucket), "dataset.validation.fraction=0.25"), report=project.report)
    here = project.prepare("dataset.validation.fraction=0.25")
    assert there.data == here.data
    assert there.train.location.startswith("s3://team/runs/cache/data/")
    config = project.config(*on_s3(bucket), "dataset.validation.fraction=0.25")
    assert prepare(config, report=project.report) == there
    local = fetch(there, config)
    assert fetch(there, config).model_dir == local.model_dir
    assert local.model_dir.is_relative_to(project.folder / "scratch")
    assert (local.model_dir / "model.safetensors").read_bytes() == (project.model / "model.safetensors").read_bytes()
    assert local.validation_data is not None
    assert texts(local.train_data) == texts(fetch(here, project.config()).train_data)
    assert not (project.folder / "scratch/sources/questions/data").exists()


def test_a_folder_that_was_prepared_for_other_data_is_refused(project: Project) -> None:
    project.prepare()
    with pytest.raises(ConfigError, match=r"run\.directory .* was prepared for another model, dataset or seed"):
        project.prepare("dataset.max_sequence_length=32")


def test_prepare_reads_no_more_of_the_weights_than_their_header(project: Project, bucket: str) -> None:
    project.prepare(*on_s3(bucket))
    assert not list((project.folder / "scratch").rglob("*.safetensors"))


def test_a_model_that_changed_in_s3_since_is_refused(project: Project, bucket: str) -> None:
    config = project.config(*on_s3(bucket))
    prepared = prepare(config, report=project.report)
    put(bucket, "models/tiny/model.safetensors", b"other")
    with pytest.raises(
        DataError, match=r"s3://team/models/tiny/model\.safetensors has changed since the run was prepared"
    ):
        fetch(prepared, config)


@pytest.mark.parametrize(
    ("overrides", "exit_code", "message"),
    [
        (["model.uri.location=s3://nowhere/tiny"], 64, "nowhere"),
        (["dataset.sources.0.uri.location=s3://nowhere/train.jsonl"], 64, "nowhere"),
        (["run.directory=s3://nowhere/run"], 64, "nowhere"),
        (["model.uri.location=s3://team/models/other"], 65, "there is no such folder, or it is empty"),
        (["dataset.sources.0.uri.location=s3://team/data/other.jsonl"], 65, "has no data files"),
    ],
)
def test_what_is_not_in_s3_is_named(
    overrides: list[str], exit_code: int, message: str, project: Project, bucket: str
) -> None:
    error = project.error(*on_s3(bucket), *overrides)
    assert error.exit_code == exit_code
    assert message in str(error)


@pytest.mark.parametrize("length", [0, 5, 100, 5000])
def test_weights_that_were_cut_off_in_s3_are_refused(length: int, project: Project, bucket: str) -> None:
    put(bucket, "models/tiny/model.safetensors", (project.model / "model.safetensors").read_bytes()[:length])
    error = project.error(*on_s3(bucket))
    assert "Model folder s3://team/models/tiny: model.safetensors is not a whole safetensors file" in str(error)
    assert error.exit_code == 65


def put(endpoint: str, key: str, content: bytes) -> None:
    boto3.client("s3", endpoint_url=endpoint, region_name="us-east-1").put_object(Bucket="team", Key=key, Body=content)
