"""Tasks are found by name, with their data from task files, from a copy in the workspace, or once from the Hub."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import yaml
from pyarrow import parquet

from kubetune_trainer.config import EvalConfig, load_config
from kubetune_trainer.errors import ConfigError, DataError, StorageError, TrainerError
from kubetune_trainer.evaluate import tasks
from kubetune_trainer.evaluate.prepare import PreparedEval, dataset_finder, prepare
from kubetune_trainer.evaluate.tasks import load_tasks
from kubetune_trainer.storage import scratch_dir
from tests.trainer.test_hub import COMMIT, HubServer
from tests.trainer.tiny_model import write_model

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

ARC = "allenai/ai2_arc"
README = {
    "configs": [
        {"config_name": "ARC-Challenge", "data_files": [{"split": "test", "path": "ARC-Challenge/test-*"}]},
        {
            "config_name": "ARC-Easy",
            "data_files": [
                {"split": split, "path": f"ARC-Easy/{split}-*"} for split in ("train", "validation", "test")
            ],
        },
    ]
}


@pytest.fixture(autouse=True)
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KUBETUNE_SCRATCH", str(tmp_path / "scratch"))
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # nobody listens
    monkeypatch.setattr("kubetune_trainer.hub.PAUSES_SECONDS", ())
    scratch_dir.cache_clear()


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    server = HubServer()
    monkeypatch.setenv("HF_ENDPOINT", server.url)
    yield server
    server.stop()


class Project:
    """A folder with a tiny model, and the config of an evaluation."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.events: list[tuple[str, dict[str, Any]]] = []
        write_model(folder / "model")

    def config(self, *overrides: str, **blocks: Any) -> EvalConfig:
        values = {
            "kind": "EvalJob",
            "model": {"uri": {"location": f"file://{self.folder}/model"}},
            "tasks": [{"name": "arc_easy"}],
            "workspace": {"uri": f"file://{self.folder}/runs"},
        }
        (self.folder / "run.yaml").write_text(yaml.safe_dump({**values, **blocks}))
        return load_config(self.folder / "run.yaml", expect=EvalConfig, overrides=overrides)

    def report(self, event: str, **fields: Any) -> None:
        self.events.append((event, fields))

    def prepare(self, config: EvalConfig) -> PreparedEval:
        return prepare(config, report=self.report)

    def error(self, config: EvalConfig) -> TrainerError:
        with pytest.raises(TrainerError) as caught:
            self.prepare(config)
        assert not (self.folder / "runs/run/prepared.json").exists()
        return caught.value


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return Project(tmp_path)


def question(number: int) -> dict[str, Any]:
    choices = {"text": [f"answer {letter}" for letter in "ABCD"], "label": list("ABCD")}
    return {"id": str(number), "question": f"Question {number}?", "choices": choices, "answerKey": "B"}


def arc_files(folder: Path) -> dict[str, bytes]:
    """A repository like that of ARC: two configs, the one that is asked for in three splits."""
    folder.mkdir(parents=True, exist_ok=True)
    files = {}
    for place, number in (
        ("ARC-Easy/train", 5),
        ("ARC-Easy/validation", 4),
        ("ARC-Easy/test", 7),
        ("ARC-Challenge/test", 2),
    ):
        parquet.write_table(pa.Table.from_pylist([question(each) for each in range(number)]), folder / "part")
        files[f"{place}-00000-of-00001.parquet"] = (folder / "part").read_bytes()
    (folder / "part").unlink()
    files["README.md"] = f"---\n{yaml.safe_dump(README)}---\n".encode()
    return files


def test_a_copy_of_the_dataset_in_the_workspace_needs_no_network(project: Project) -> None:
    copy = project.folder / "runs/cache/datasets/allenai--ai2_arc"
    for path, content in arc_files(project.folder / "arc").items():
        (copy / path).parent.mkdir(parents=True, exist_ok=True)
        (copy / path).write_bytes(content)
    config = project.config(tasks=[{"name": "arc_easy", "num_fewshot": 2, "limit": 3}])
    prepared = project.prepare(config)
    assert [(found.name, found.config, found.commit) for found in prepared.datasets] == [(ARC, "ARC-Easy", None)]
    loaded = load_tasks(config, find_dataset=dataset_finder(prepared, config), report=project.report)
    task = loaded.tasks["arc_easy"]
    assert len(task.eval_docs) == 7
    assert task.config.num_fewshot == 2
    assert loaded.samples == {"arc_easy": range(3)}


def test_a_dataset_is_taken_from_the_hub_once_and_only_what_is_asked_for(project: Project, hub: HubServer) -> None:
    hub.repos[f"datasets/{ARC}"] = arc_files(project.folder / "arc")
    hub.cards[f"datasets/{ARC}"] = README
    config = project.config()
    prepared = project.prepare(config)
    assert prepared.datasets[0].commit == COMMIT
    assert prepared.message()["sources"] == [{"name": ARC, "commit": COMMIT}]
    assert len({path for path in hub.downloads if path.endswith(".parquet")}) == 3, "not those of the other config"
    (project.folder / "runs/run/prepared.json").unlink()
    before = len(hub.downloads)
    assert project.prepare(config) == prepared
    assert len(hub.downloads) == before
    hub.stop()
    assert (
        len(
            load_tasks(config, find_dataset=dataset_finder(prepared, config), report=project.report)
            .tasks["arc_easy"]
            .eval_docs
        )
        == 7
    )


def test_without_hub_and_copy_the_message_says_where_a_copy_belongs(project: Project) -> None:
    error = project.error(project.config())
    assert isinstance(error, StorageError)
    assert f"dataset {ARC}" in str(error)
    assert error.hint.endswith(f"into file://{project.folder}/runs/cache/datasets/allenai--ai2_arc.")


@pytest.mark.usefixtures("hub")
def test_a_dataset_that_the_hub_does_not_have_is_the_configs_fault(project: Project) -> None:
    error = project.error(project.config())
    assert isinstance(error, ConfigError)
    assert str(error).startswith(f"EvalJob local/run: dataset {ARC}")


def test_an_attempt_refuses_a_dataset_that_was_not_prepared(project: Project) -> None:
    config = project.config()
    prepared = PreparedEval.model_construct(datasets=())
    with pytest.raises(DataError, match="dataset allenai/ai2_arc was not there when the run was prepared"):
        load_tasks(config, find_dataset=dataset_finder(prepared, config), report=project.report)


@pytest.mark.parametrize(("name", "near"), [("hellaswagg", "hellaswag"), ("arc_eazy", "arc_easy"), ("gsm8", "gsm8k")])
def test_an_unknown_task_is_told_the_nearest_names(project: Project, name: str, near: str) -> None:
    error = project.error(project.config(tasks=[{"name": name}]))
    assert isinstance(error, ConfigError)
    assert str(error) == f"EvalJob local/run: tasks[0].name must be a task of lm_eval or of task_files, got {name}"
    assert near in error.hint


OWN_TASK = {
    "task": "mine", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": "mine.jsonl"}},
    "test_split": "test", "output_type": "multiple_choice", "doc_to_text": "{{q}}", "doc_to_choice": ["yes", "no"],
    "doc_to_target": "a", "num_fewshot": 0, "metric_list": [{"metric": "acc"}],
}  # fmt: skip


def write_config_map(folder: Path) -> None:
    """As the kubelet mounts one: the files in a folder with a date, and links to them."""
    inside = folder / "..2026_01_01"
    inside.mkdir(parents=True)
    (inside / "mine.yaml").write_text(yaml.safe_dump(OWN_TASK))
    (inside / "mine.jsonl").write_text('{"q": "Is water wet?", "a": 0}\n')
    (folder / "..data").symlink_to(inside.name)
    for path in inside.iterdir():
        (folder / path.name).symlink_to(f"..data/{path.name}")


def test_tasks_of_a_config_map_lie_beside_their_data(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KUBETUNE_CONFIGMAPS_DIR", str(project.folder / "configmaps"))
    files = [{"name": "own", "config_map": {"name": "my-tasks"}}]
    config = project.config(tasks=[{"name": "mine", "num_fewshot": 3}], task_files=files)
    assert "ConfigMap my-tasks must be mounted" in str(project.error(config))
    write_config_map(project.folder / "configmaps" / "my-tasks")
    prepared = project.prepare(config)
    task = load_tasks(config, find_dataset=dataset_finder(prepared, config), report=project.report).tasks["mine"]
    assert len(task.eval_docs) == 1
    assert task.config.num_fewshot == 0
    warnings = {fields["message"] for event, fields in project.events if event == "warning"}
    assert warnings == {"task mine is made for no solved examples; num_fewshot is not applied"}


def test_ones_own_task_stands_in_front_of_the_librarys(project: Project) -> None:
    (project.folder / "tasks").mkdir()
    (project.folder / "tasks" / "arc.yaml").write_text(yaml.safe_dump(OWN_TASK | {"task": "arc_easy"}))
    (project.folder / "tasks" / "mine.jsonl").write_text('{"q": "Is water wet?", "a": 0}\n' * 3)
    files = [{"name": "own", "uri": {"location": f"file://{project.folder}/tasks"}}]
    config = project.config(task_files=files)
    assert project.prepare(config).datasets == ()
    assert (
        len(load_tasks(config, find_dataset=lambda *_: Path(), report=project.report).tasks["arc_easy"].eval_docs) == 3
    )


def own_tasks(project: Project, *more: dict[str, Any], rows: int = 2) -> dict[str, Any]:
    """Task files of OWN_TASK and more, as a config has them."""
    folder = project.folder / "tasks"
    folder.mkdir()
    for number, task in enumerate((OWN_TASK, *more)):
        (folder / f"{number}.yaml").write_text(
            yaml.safe_dump(task).replace("'!function utils.shuffled'", "!function utils.shuffled")
        )
    (folder / "mine.jsonl").write_text("".join(f'{{"q": "Question {row}?", "a": 0}}\n' for row in range(rows)))
    return {"task_files": [{"name": "own", "uri": {"location": f"file://{folder}"}}]}


def test_groups_inside_of_groups_are_found_with_their_parts() -> None:
    library = Path(tasks.lm_eval.tasks.__file__).parent
    index = tasks.lm_eval.tasks.TaskManager(include_path=[library / "mmlu"], include_defaults=False).task_index
    assert tasks._is_whole("mmlu_generative", index)
    parts = {"task": [{"group": "inner", "task": ["mmlu_anatomy", {"task": "arc_easy", "num_fewshot": 5}]}]}
    assert not tasks._has_its_parts(parts, index, within="outer")
    parts["task"][0]["task"].pop()
    assert tasks._has_its_parts(parts, index, within="outer")


def test_ones_own_group_may_have_tasks_of_the_library(project: Project) -> None:
    own_tasks(project, {"group": "suite_of_mine", "task": ["mine", "arc_easy"]})
    finder = tasks._TaskFinder([project.folder / "tasks"], lambda *_: Path())
    assert list(finder._places("suite_of_mine"))[-1] == [finder._library]


def test_tasks_that_shuffle_are_the_same_each_time(project: Project) -> None:
    shuffling = OWN_TASK | {"task": "shuffled", "process_docs": "!function utils.shuffled"}
    config = project.config(tasks=[{"name": "shuffled"}], **own_tasks(project, shuffling, rows=40))
    (project.folder / "tasks" / "utils.py").write_text(
        "import random\ndef shuffled(docs):\n    return docs.select(random.sample(range(len(docs)), len(docs)))\n"
    )
    orders = []
    for _ in range(2):
        loaded = load_tasks(config, find_dataset=lambda *_: Path(), report=project.report)
        orders.append([doc["q"] for doc in loaded.tasks["shuffled"].eval_docs])
    assert orders[0] == orders[1] != sorted(orders[0])


@pytest.mark.parametrize(
    ("task", "asked", "gates", "words"),
    [
        (
            {"task": "few", "num_fewshot": None},
            {"name": "few", "num_fewshot": 3},
            [],
            "tasks[0]: task few has 2 solved examples, and num_fewshot is 3",
        ),
        (
            {"task": "long", "output_type": "generate_until", "doc_to_target": "yes", "metric_list": [],
             "generation_kwargs": {"until": ["."], "max_gen_toks": 100_000}},
            {"name": "long"},
            [],
            "task long asks for answers of 100000 tokens",
        ),
        (
            {"group": "all_of_mine", "task": ["mine"], "aggregate_metric_list": [{"metric": "acc"}]},
            {"name": "all_of_mine"},
            [{"name": "g", "task": "all_of_mine", "metric": "acc",
              "compared_to": {"name": "base", "max_drop": 0.1, "directory": "file:///none"}}],
            "gates[0].task must be a task with comparedTo, which goes sample by sample, got the group all_of_mine",
        ),
    ],
    ids=["too few examples", "too long answers", "a group that is compared"],
)  # fmt: skip
def test_what_cannot_be_evaluated_is_refused_before_a_model_is_loaded(
    project: Project, task: dict[str, Any], asked: dict[str, Any], gates: list[dict[str, Any]], words: str
) -> None:
    given = task if "group" in task else OWN_TASK | task
    whole = {key: value for key, value in given.items() if value is not None}
    config = project.config(tasks=[asked], gates=gates, **own_tasks(project, whole))
    error = project.error(config)
    assert isinstance(error, ConfigError)
    assert words in str(error)


def test_few_of_the_librarys_files_are_read(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[Path] = []
    manager = tasks.lm_eval.tasks.TaskManager

    def watched(*, include_path: list[Path], include_defaults: bool) -> Any:
        read.extend(path for folder in include_path for path in Path(folder).rglob("*.yaml"))
        return manager(include_path=include_path, include_defaults=include_defaults)

    monkeypatch.setattr("lm_eval.tasks.TaskManager", watched)
    with pytest.raises(StorageError):
        project.prepare(project.config())
    assert 0 < len(read) < 100
