"""An evaluation gives lm_eval's own numbers, on any number of ranks, however often it is interrupted."""

import json
import math
import os
import shutil
import signal
import statistics
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import boto3
import pytest
import torch
import yaml
from lm_eval.loggers import EvaluationTracker
from moto.server import ThreadedMotoServer
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken
from transformers import AutoTokenizer, LlamaForCausalLM

from kubetune_trainer.export.compressed_tensors import save_compressed_tensors
from kubetune_trainer.export.digest import folder_digest
from kubetune_trainer.export.gguf import save_gguf
from kubetune_trainer.export.torchao import save_torchao
from tests.recipes.evaluation import TASKS, by_lm_eval, write_eval_config, write_material
from tests.recipes.gang import Gang, Zygote
from tests.s3 import endpoint_of

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")


@pytest.fixture(scope="session")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_material(tmp_path_factory.mktemp("evaluation"))


@pytest.fixture
def place(material: Path, tmp_path: Path) -> Path:
    """A fresh folder with the model and the tasks."""
    for name in ("model", "tasks"):
        shutil.copytree(material / name, tmp_path / name)
    return tmp_path


def start(zygote: Zygote, folder: Path, config: Path, *overrides: str, ranks: int = 1, **more: Any) -> Gang:
    return Gang.start(zygote, folder, config, *overrides, ranks=ranks, recipe="eval_model", **more)


def results_of(place: Path, run: str = "run") -> dict[str, Any]:
    return json.loads((place / "runs" / run / "results.json").read_bytes())


def lineage_of(place: Path, run: str = "run") -> dict[str, Any]:
    return json.loads((place / "runs" / run / "lineage.json").read_bytes())


def samples_of(place: Path, task: str, run: str = "run") -> list[dict[str, Any]]:
    lines = (place / "runs" / run / "samples" / f"{task}.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


CASES: dict[str, dict[str, Any]] = {
    "plain": {"tasks": list(TASKS)},
    "fewshot": {"tasks": ["choice", "write", "letters"], "num_fewshot": 3, "limit": 20},
    "chat": {
        "tasks": ["choice", "write"], "num_fewshot": 2, "limit": 15, "apply_chat_template": True,
        "system_instruction": "Answer well.",
    },
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_the_numbers_are_those_of_lm_evals_own_backend(zygote: Zygote, place: Path, case: str) -> None:
    asked = dict(CASES[case])
    theirs = by_lm_eval(place, **asked)
    per_task = {key: asked.pop(key) for key in ("num_fewshot", "limit") if key in asked}
    tasks = [{"name": name, **per_task} for name in asked.pop("tasks")]
    config = write_eval_config(place / "run.yaml", tasks=tasks, **asked)
    start(zygote, place / "ranks", config, ranks=2, before="tests.recipes.without_forks").succeed()
    ours = results_of(place)

    assert ours["results"].keys() == theirs["results"].keys()
    for task, metrics in theirs["results"].items():
        assert ours["results"][task].keys() == metrics.keys()
        for name, value in metrics.items():
            wanted = value if isinstance(value, str) else pytest.approx(value, rel=1e-4)
            assert ours["results"][task][name] == wanted, (task, name)
        samples = samples_of(place, task)
        assert len(samples) == len(theirs["samples"][task])
        for mine, reference in zip(samples, theirs["samples"][task], strict=True):
            same_sample(mine, reference)
    for key in ("n-shot", "versions", "higher_is_better", "n-samples"):
        assert ours[key] == theirs[key]
    assert {task["name"]: task["hash"] for task in lineage_of(place)["tasks"]} == hashes_by_lm_eval(place, theirs)


def hashes_by_lm_eval(folder: Path, found: dict[str, Any]) -> dict[str, str]:
    """What lm_eval's own writer of results says of the samples."""
    record = {key: value for key, value in found.items() if key != "samples"}
    tracker = EvaluationTracker(output_path=str(folder / "lm_eval"))
    tracker.save_results_aggregated(results={**record, "config": {}}, samples=found["samples"])
    return json.loads(next((folder / "lm_eval").rglob("results_*.json")).read_bytes())["task_hashes"]


def same_sample(mine: Mapping[str, Any], reference: Mapping[str, Any]) -> None:
    for key in ("doc_id", "doc", "filter", "doc_hash", "prompt_hash", "target_hash", "metrics"):
        assert mine[key] == reference[key], key
    assert [list(arguments) for arguments in reference["arguments"]] == mine["arguments"]
    for answers, expected in zip(mine["resps"], reference["resps"], strict=True):
        for answer, wanted in zip(answers, expected, strict=True):
            if isinstance(wanted, tuple):
                assert answer[0] == pytest.approx(wanted[0], abs=1e-4)
                assert answer[1] == wanted[1]
            else:
                assert answer == (pytest.approx(wanted, rel=1e-5) if isinstance(wanted, float) else wanted)


def numbers(place: Path, run: str = "run") -> tuple[dict[str, Any], dict[str, list[dict[str, Any]]]]:
    """All that an evaluation found, without where and when."""
    results = results_of(place, run)
    return results["results"], {task: samples_of(place, task, run) for task in results["configs"]}


def test_the_number_of_ranks_changes_no_bit(zygote: Zygote, place: Path) -> None:
    config = write_eval_config(place / "run.yaml")
    for ranks in (1, 3):
        start(zygote, place / f"ranks-{ranks}", config, f"run.name=on-{ranks}", ranks=ranks).succeed()
    assert numbers(place, "on-1") == numbers(place, "on-3")


MANY_BATCHES = {"tasks": [{"name": "choice"}, {"name": "pages"}, {"name": "write", "limit": 25}], "batch_size": 1}


@pytest.fixture(scope="module")
def peaceful(zygote: Zygote, material: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What an evaluation finds that nothing disturbs."""
    folder = tmp_path_factory.mktemp("peaceful")
    for name in ("model", "tasks"):
        shutil.copytree(material / name, folder / name)
    start(zygote, folder / "ranks", write_eval_config(folder / "run.yaml", **MANY_BATCHES)).succeed()
    return numbers(folder)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_stopped_evaluation_goes_on_and_ends_with_the_same_numbers(
    zygote: Zygote, place: Path, peaceful: Any, number: signal.Signals
) -> None:
    config = write_eval_config(place / "run.yaml", **MANY_BATCHES)
    first = start(zygote, place / "first", config, ranks=2)
    first.wait_for(lambda event: event["event"] == "progress")
    first.kill(0, number)
    first.kill(1, number)
    codes = [75, 75] if number == signal.SIGTERM else [-9, -9]
    assert first.wait() == codes, first.stderr()
    assert not (place / "runs" / "run" / "results.json").exists()
    if number == signal.SIGTERM:
        assert first.message()["result"] == "Preempted"

    second = start(zygote, place / "second", config, ranks=2).succeed()
    answered = second.events("start")[0]["answered"]
    progress = second.events("progress")
    assert answered > 0
    assert progress[0]["done"] > 1, "what was answered before counts"
    assert progress[-1]["done"] == progress[-1]["total"] == first.events("progress")[0]["total"]
    assert numbers(place) == peaceful


def test_what_is_answered_is_not_asked_again(zygote: Zygote, place: Path) -> None:
    config = write_eval_config(place / "run.yaml", tasks=[{"name": "letters"}, {"name": "write", "limit": 5}])
    second = start(zygote, place / "second", config).succeed()
    third = start(zygote, place / "third", config).succeed()
    assert third.events("progress") == [], "everything is answered"
    assert third.events("result") == [
        {**event, "time": told["time"]}
        for event, told in zip(second.events("result"), third.events("result"), strict=True)
    ]
    more = start(zygote, place / "more", config, "tasks.1.limit=8").succeed()
    assert more.events("progress")[-1]["done"] == 160 + 8
    assert more.events("start")[0]["answered"] == 160 + 5


def test_the_course_and_the_end_of_a_run_are_reported(zygote: Zygote, place: Path) -> None:
    gates = [
        {"name": "reached", "task": "choice", "metric": "acc", "at_least": 0.0},
        {"name": "missed", "task": "pages", "metric": "bits_per_byte", "at_most": 0.5},
        {"name": "unknown", "task": "choice", "metric": "acc", "filter": "nonsense", "at_most": 0.5},
    ]
    tasks = [{"name": "choice", "limit": 7}, {"name": "pages"}, {"name": "write", "limit": 500}]
    gang = start(zygote, place / "ranks", write_eval_config(place / "run.yaml", tasks=tasks, gates=gates)).succeed()
    assert [event["phase"] for event in gang.events("phase")] == ["Downloading", "Loading", "Evaluating", "Judging"]
    last = gang.events("progress")[-1]
    assert last["done"] == last["total"] == 7 * 8 + 6 + 40
    assert last["etaSeconds"] == 0

    told = {(event["task"], event["metric"], event["filter"]): event for event in gang.events("result")}
    assert told["choice", "acc", "none"]["samples"] == 7
    assert told["write", "exact_match", "word"]["samples"] == 40
    message = gang.message()
    assert (message["result"], message["exitCode"]) == ("Complete", 0)
    rows = {(row["task"], row["metric"], row["filter"]): row for row in message["results"]}
    assert rows.keys() == told.keys()
    assert float(rows["pages", "bits_per_byte", "none"]["value"]) == pytest.approx(
        told["pages", "bits_per_byte", "none"]["value"], rel=1e-5
    )
    assert "stderr" not in rows["pages", "bits_per_byte", "none"]
    assert {row["name"]: row["passed"] for row in message["gates"]} == {
        "reached": True, "missed": False, "unknown": False,
    }  # fmt: skip
    assert gang.events("gate")[2]["message"].startswith("there is no acc of choice with filter nonsense")
    assert message["artifacts"]["results"] == f"file://{place}/runs/run/results.json"
    assert sorted(path.name for path in (place / "runs" / "run" / "samples").iterdir()) == [
        "choice.jsonl", "pages.jsonl", "write.jsonl",
    ]  # fmt: skip
    assert len(samples_of(place, "write")) == 80, "once for each filter"


def test_results_that_do_not_fit_into_the_message_are_left_to_the_log(zygote: Zygote, place: Path) -> None:
    gates = [
        {"name": f"gate-{number}", "task": "choice", "metric": "acc", "at_least": 0.0} for number in range(30)
    ]  # fmt: skip
    tasks = [{"name": "choice", "limit": 2}]
    gang = start(zygote, place / "ranks", write_eval_config(place / "run.yaml", tasks=tasks, gates=gates)).succeed()
    message = gang.message()
    assert (message["result"], message["seeLog"]) == ("Complete", True)
    assert not {"results", "gates"} & message.keys()
    assert len(gang.events("gate")) == 30


def test_another_evaluation_is_compared_sample_by_sample(zygote: Zygote, place: Path) -> None:
    tasks = [{"name": "choice"}, {"name": "pages"}]
    start(zygote, place / "base", write_eval_config(place / "base.yaml", tasks=tasks)).succeed()
    weights = load_file(place / "model" / "model.safetensors")
    save_file({name: weight * 0.97 for name, weight in weights.items()}, place / "model" / "model.safetensors",
              metadata={"format": "pt"})  # fmt: skip

    def against_base(name: str, metric: str, task: str = "choice", **rule: float) -> dict[str, Any]:
        other = {"name": "base", "directory": f"file://{place}/runs/base", **rule}
        return {"name": name, "task": task, "metric": metric, "compared_to": other}

    gates = [
        against_base("loose", "acc", max_drop=1.0),
        against_base("strict", "bits_per_byte", "pages", max_increase=0.0),
        against_base("wide", "bits_per_byte", "pages", max_increase=5.0),
    ]
    config = write_eval_config(place / "tuned.yaml", tasks=tasks, gates=gates)
    verdicts = {row["name"]: row for row in start(zygote, place / "tuned", config).succeed().events("gate")}
    mine, theirs = (
        [sample["acc"] for sample in samples_of(place, "choice", run) if sample["filter"] == "none"]
        for run in ("tuned", "base")
    )
    pairs = [one - other for one, other in zip(mine, theirs, strict=True)]
    assert verdicts["loose"]["passed"]
    assert verdicts["loose"]["difference"] == pytest.approx(statistics.mean(pairs))
    assert verdicts["loose"]["stderr"] == pytest.approx(statistics.stdev(pairs) / math.sqrt(len(pairs)))
    difference = verdicts["wide"]["difference"]
    assert verdicts["wide"]["passed"]
    assert verdicts["strict"]["passed"] == (difference <= 0)
    assert 0 < verdicts["wide"]["stderr"] < 1

    lineage = lineage_of(place, "tuned")
    assert lineage["parents"] == [lineage_of(place, "base")], "an evaluation that was compared with is a parent"
    assert [(task["name"], task["samples"]) for task in lineage["tasks"]] == [("choice", 40), ("pages", 6)]
    assert lineage["tasks"] == lineage_of(place, "base")["tasks"], "the same was asked"
    assert {gate["name"]: gate["passed"] for gate in lineage["gates"]} == {
        name: verdict["passed"] for name, verdict in verdicts.items()
    }
    assert [source["location"] for source in lineage["sources"]] == [f"file://{place}/tasks"]
    assert lineage["model"] == {"location": f"file://{place}/model", "digest": folder_digest(place / "model")[0]}

    fewer = start(zygote, place / "fewer", config, "run.name=fewer", "tasks.0.limit=10", "tasks.1.num_fewshot=0")
    verdict = fewer.succeed().events("gate")[0]
    assert not verdict["passed"]
    assert verdict["message"] == (
        "acc of choice cannot be compared with EvalJob base: there are 10 samples here and 40 there"
    )
    missing = start(zygote, place / "gone", config, "run.name=gone", f"gates.0.compared_to.directory=file://{place}/no")
    verdict = missing.succeed().events("gate")[0]
    assert (verdict["passed"], verdict["message"]) == (False, f"EvalJob base has no results in file://{place}/no")


@pytest.mark.parametrize(
    ("override", "code", "words"),
    [
        ("tasks.0.name=choise", 64, "tasks[0].name must be a task of lm_eval or of task_files, got choise"),
        ("tasks.1.name=both", 64, "tasks[1].name must not bring a task again, got both, and choice is there already"),
        ("tasks.0.limit=0", 64, "tasks[0].limit must be greater than or equal to 1, got 0"),
        ("tasks.0.fewshot=1", 64, "tasks[0].fewshot is not a field"),
        ("max_sequence_length=4096", 64, "max_sequence_length must be at most the model's 512, got 4096"),
        (
            "gates=[{name: g, task: pages, metric: acc, at_least: 1}]",
            64,
            "gates[0].task must be one of choice, letters",
        ),
        ("gates=[{name: g, task: choice, metric: acc}]", 64, "takes exactly one of at_least, at_most, compared_to"),
        ("task_files.0.uri.location=file:///nowhere", 65, "task_files mine has no .yaml files"),
        ("model.uri.location=file:///nowhere", 65, "Model folder file:///nowhere: there is no such folder"),
        ("model.adapter={location: 'file:///nowhere'}", 65, "Adapter folder file:///nowhere: adapter_config.json"),
    ],
)
def test_bad_input_names_object_field_rule_and_value(
    zygote: Zygote, place: Path, override: str, code: int, words: str
) -> None:
    config = write_eval_config(place / "run.yaml", tasks=[{"name": "choice"}, {"name": "letters"}])
    gang = start(zygote, place / "ranks", config, override)
    assert gang.wait() == [code], gang.stderr()
    message = gang.message()
    assert words in message["message"]
    if code == 64:
        assert message["message"].startswith("EvalJob local/run")
    if "choise" in override:
        assert message["hint"].startswith("Did you mean choice")


def test_a_broken_task_names_the_task_and_the_file(zygote: Zygote, place: Path) -> None:
    (place / "tasks" / "questions.jsonl").unlink()
    config = write_eval_config(place / "run.yaml", tasks=[{"name": "choice"}])
    gang = start(zygote, place / "ranks", config)
    assert gang.wait() == [65], gang.stderr()
    assert (
        "task choice: dataset_kwargs.data_files names questions.jsonl, which is not next to its YAML"
        in (gang.message()["message"])
    )


def test_an_adapter_with_a_token_of_its_own_is_merged_into_its_base(zygote: Zygote, place: Path) -> None:
    base, tokenizer = LlamaForCausalLM.from_pretrained(place / "model"), AutoTokenizer.from_pretrained(place / "model")
    tokenizer.add_tokens([AddedToken("cat", normalized=False)])  # which stands in the tasks
    base.resize_token_embeddings(len(tokenizer))
    torch.manual_seed(1)
    settings = LoraConfig(
        r=4, lora_alpha=12, target_modules=["q_proj", "down_proj"], trainable_token_indices=[len(tokenizer) - 1]
    )
    tuned = get_peft_model(base, settings)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_B" in name or "trainable_tokens" in name:
                parameter.normal_(std=0.2)
    tuned.save_pretrained(place / "adapter", save_embedding_layers=False)
    tokenizer.save_pretrained(place / "adapter")
    shutil.copytree(place / "model", place / "merged")
    tuned.merge_and_unload().save_pretrained(place / "merged")
    tokenizer.save_pretrained(place / "merged")
    tasks = [{"name": "choice"}, {"name": "pages"}]
    adapted = write_eval_config(
        place / "adapted.yaml", tasks=tasks,
        model={"uri": {"location": f"file://{place}/model"}, "adapter": {"location": f"file://{place}/adapter"}},
    )  # fmt: skip
    merged = write_eval_config(
        place / "merged.yaml", tasks=tasks, model={"uri": {"location": f"file://{place}/merged"}}
    )
    for config in (adapted, merged):
        start(zygote, place / f"ranks-{config.stem}", config).succeed()
    ours, theirs = results_of(place, "adapted")["results"], results_of(place, "merged")["results"]
    assert ours["pages"]["bits_per_byte,none"] == pytest.approx(theirs["pages"]["bits_per_byte,none"], rel=1e-5)
    assert ours["choice"]["acc,none"] == theirs["choice"]["acc,none"]


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
def test_an_adapter_is_asked_through_the_chat_template_that_it_was_trained_with(zygote: Zygote, place: Path) -> None:
    base = LlamaForCausalLM.from_pretrained(place / "model")
    get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj"])).save_pretrained(place / "adapter")
    template = "{% for message in messages %}TRAINED {{ message.content }}{% endfor %}"
    (place / "adapter" / "chat_template.jinja").write_text(template)
    model = {"uri": {"location": f"file://{place}/model"}, "adapter": {"location": f"file://{place}/adapter"}}
    tasks = [{"name": "write", "limit": 2}]
    config = write_eval_config(place / "run.yaml", tasks=tasks, model=model, apply_chat_template=True)
    start(zygote, place / "ranks", config).succeed()
    for sample in samples_of(place, "write"):
        assert sample["arguments"][0][0].startswith("TRAINED Question: ")
    assert not (place / "model" / "chat_template.jinja").exists()


@pytest.mark.parametrize("said_by", ["the model's folder", "the task"])
def test_generated_answers_take_the_repetition_penalty_that_lm_evals_backend_takes(
    zygote: Zygote, place: Path, said_by: str
) -> None:
    asked, file = {"tasks": ["write"], "limit": 15}, place / "model" / "generation_config.json"
    without = [sample["resps"] for sample in by_lm_eval(place, **asked)["samples"]["write"]]
    if said_by == "the task":
        task = yaml.safe_load((place / "tasks" / "write.yaml").read_text())
        task["generation_kwargs"]["repetition_penalty"] = 1.4
        (place / "tasks" / "write.yaml").write_text(yaml.safe_dump(task))
    else:
        file.write_text(json.dumps(json.loads(file.read_text()) | {"repetition_penalty": 1.4}))
    theirs = [sample["resps"] for sample in by_lm_eval(place, **asked)["samples"]["write"]]
    config = write_eval_config(place / "run.yaml", tasks=[{"name": "write", "limit": 15}])
    start(zygote, place / "ranks", config).succeed()
    assert [sample["resps"] for sample in samples_of(place, "write")] == theirs != without


def test_a_group_of_tasks_is_one_more_result(zygote: Zygote, place: Path) -> None:
    config = write_eval_config(place / "run.yaml", tasks=[{"name": "both", "limit": 10}])
    told = start(zygote, place / "ranks", config).succeed().events("result")
    values = {event["task"]: event for event in told if event["metric"] == "acc"}
    assert values.keys() == {"both", "choice", "letters"}
    assert values["both"]["value"] == pytest.approx((values["choice"]["value"] + values["letters"]["value"]) / 2)
    assert values["both"]["samples"] == 20


def test_the_launcher_prepares_and_evaluates(place: Path) -> None:
    config = write_eval_config(place / "run.yaml", tasks=[{"name": "letters", "limit": 5}])
    environment = {
        **os.environ, "PET_NPROC_PER_NODE": "2", "KUBETUNE_TERMINATION_LOG": str(place / "log"), "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    for recipe, result in (("prepare", "Prepared"), ("eval_model", "Complete")):
        ranks = {"PET_NPROC_PER_NODE": "1"} if recipe == "prepare" else {}
        done = subprocess.run(
            [sys.executable, "-m", "kubetune_trainer.launch", recipe, "--config", str(config)],
            env=environment | ranks, cwd=place, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert "it/s" not in done.stderr, "bars would fill a pod's log"
        message = json.loads((place / "log").read_bytes())
        assert message["result"] == result
    assert [row["metric"] for row in message["results"]] == ["acc", "brier_score"]


def test_everything_may_lie_in_s3(zygote: Zygote, place: Path, s3_server: ThreadedMotoServer) -> None:
    endpoint = endpoint_of(s3_server)
    client = boto3.client("s3", endpoint_url=endpoint, region_name="us-east-1")
    client.create_bucket(Bucket="team")
    for path in (*(place / "model").iterdir(), *(place / "tasks").iterdir()):
        client.upload_file(str(path), "team", path.relative_to(place).as_posix())
    tasks = [{"name": "choice", "limit": 5}, {"name": "pages"}]
    local = write_eval_config(place / "local.yaml", tasks=tasks)
    stored = write_eval_config(
        place / "stored.yaml",
        tasks=tasks,
        model={"uri": {"location": "s3://team/model"}},
        task_files=[{"name": "mine", "uri": {"location": "s3://team/tasks"}}],
        storage={"s3": {"endpoint": endpoint, "region": "us-east-1"}},
        workspace={"uri": "s3://team/runs"},
    )
    start(zygote, place / "ranks-local", local).succeed()
    keys_of_s3 = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test"}
    gang = start(zygote, place / "ranks-stored", stored, ranks=2, environment=keys_of_s3).succeed()
    message = gang.message()
    assert message["artifacts"]["samples"] == "s3://team/runs/stored/samples"
    keys = {entry["Key"] for entry in client.list_objects_v2(Bucket="team", Prefix="runs/stored/")["Contents"]}
    assert {key.removeprefix("runs/stored/") for key in keys if "/answers/" not in key} == {
        "results.json", "samples/choice.jsonl", "samples/pages.jsonl", "lineage.json", "logs/attempt-1.jsonl",
        "prepared.json",
    }  # fmt: skip
    found = json.loads(client.get_object(Bucket="team", Key="runs/stored/results.json")["Body"].read())
    assert found["results"] == results_of(place, "local")["results"]


def test_a_quantized_model_is_evaluated_as_it_is(zygote: Zygote, place: Path) -> None:
    save_torchao(place / "model", place / "torchao", scheme="Int8WeightOnly", group_size=32)
    save_compressed_tensors(place / "model", place / "compressed", scheme="Int4WeightOnly", group_size=16)
    config = write_eval_config(place / "run.yaml", tasks=[{"name": "pages"}])
    found = {}
    for name in ("model", "torchao", "compressed"):
        overrides = f"run.name={name}", f"model.uri.location=file://{place}/{name}"
        start(zygote, place / f"ranks-{name}", config, *overrides).succeed()
        found[name] = results_of(place, name)["results"]["pages"]["bits_per_byte,none"]
    assert found["torchao"] != found["model"] == pytest.approx(found["torchao"], rel=0.01)
    assert found["compressed"] != found["model"] == pytest.approx(found["compressed"], rel=0.1)


def test_a_gguf_output_gives_the_numbers_and_the_texts_of_its_source(zygote: Zygote, place: Path) -> None:
    weights = load_file(place / "model" / "model.safetensors")
    save_file({name: weight.half() for name, weight in weights.items()}, place / "model" / "model.safetensors",
              metadata={"format": "pt"})  # fmt: skip
    tokenizer = place / "model" / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text().replace('"use_regex": false', '"use_regex": true'))  # as llama.cpp does
    save_gguf(place / "model", place / "gguf", type="F16")
    config = write_eval_config(place / "run.yaml", tasks=[{"name": "pages"}, {"name": "write", "limit": 12}])
    for name in ("model", "gguf"):
        overrides = f"run.name={name}", f"model.uri.location=file://{place}/{name}"
        start(zygote, place / f"ranks-{name}", config, *overrides).succeed()
    assert numbers(place, "gguf") == numbers(place, "model"), "the same values in memory compute the same"


@pytest.mark.parametrize("name", ["model.pte", "other.bin"])
def test_a_folder_without_weights_that_can_be_loaded_is_refused(zygote: Zygote, place: Path, name: str) -> None:
    (place / "model" / "model.safetensors").rename(place / "model" / name)
    gang = start(zygote, place / "ranks", write_eval_config(place / "run.yaml", tasks=[{"name": "pages"}]))
    assert gang.wait() == [65], gang.stderr()
    words = {
        "model.pte": "model.pte is an ExecuTorch program, which `kubetune chat` and executorch's runtime run",
        "other.bin": "neither model.safetensors nor model.safetensors.index.json is there",
    }
    assert words[name] in gang.message()["message"]
