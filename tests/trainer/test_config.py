"""A config is complete, checked as a whole, and every refusal names the field, the rule and the value."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from kubetune_trainer.config import load_config
from kubetune_trainer.errors import ConfigError

MINIMAL: dict[str, Any] = {
    "model": {"uri": {"location": "s3://models/tiny"}},
    "dataset": {"sources": [{"name": "tickets", "uri": {"location": "s3://data/train.jsonl"}}]},
    "training": {"max_steps": 4, "global_batch_size": 12, "micro_batch_size": 2},
}


def write(tmp_path: Path, values: Any) -> Path:
    path = tmp_path / "support-bot.yaml"
    path.write_text(values if isinstance(values, str) else yaml.safe_dump(values))
    return path


def test_a_config_written_by_hand_is_completed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    config = load_config(write(tmp_path, MINIMAL))
    assert config.title == "FineTuneJob local/support-bot"
    assert config.run.directory == f"file://{tmp_path}/runs/support-bot"
    assert config.run.cache == f"file://{tmp_path}/runs/cache"
    assert (config.run.num_nodes, config.run.processes_per_node) == (2, 2)
    assert config.lora is not None
    assert config.lora.target_modules == ("all-linear",)


def test_a_workspace_of_ones_own_holds_the_run_and_the_cache(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, {**MINIMAL, "workspace": {"uri": "s3://team/runs/"}}))
    assert config.run.directory == "s3://team/runs/support-bot"
    assert config.run.cache == "s3://team/runs/cache"


@pytest.mark.parametrize(
    ("override", "field", "value"),
    [
        ("training.max_steps=10", "training.max_steps", 10),
        ("training.learning_rate=2e-4", "training.learning_rate", 2e-4),
        ("training.learning_rate=1.5E-3", "training.learning_rate", 1.5e-3),
        ("dataset.packing=None", "dataset.packing", "None"),
        ("lora.target_modules=[q_proj, v_proj]", "lora.target_modules", ("q_proj", "v_proj")),
        ("checkpoint.resume_from.uri=s3://team/runs/a/checkpoints", "checkpoint.resume_from.uri",
         "s3://team/runs/a/checkpoints"),
        ("run.name=other", "run.name", "other"),
    ],
)  # fmt: skip
def test_an_override_sets_one_field_with_a_value_in_yaml(
    tmp_path: Path, override: str, field: str, value: object
) -> None:
    found: Any = load_config(write(tmp_path, MINIMAL), overrides=[override])
    for name in field.split("."):
        found = getattr(found, name)
    assert found == value
    assert type(found) is type(value)


def test_an_override_reaches_into_a_list(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, MINIMAL), overrides=["dataset.sources.0.weight=2"])
    assert config.dataset.sources[0].weight == 2.0


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["training.learning_rate=-1"], "training.learning_rate must be greater than 0, got -1"),
        (["training.learning_rte=1"], "training.learning_rte is not a field; did you mean learning_rate?"),
        (["training.learningRate=1"], "training.learningRate is not a field; did you mean learning_rate?"),
        (["dataset.sources.0.wieght=1"], "dataset.sources[0].wieght is not a field; did you mean weight?"),
        (["training.scheduler=Cosin"], "training.scheduler must be 'Cosine', 'Linear' or 'Constant', got 'Cosin'"),
        (["training.epochs=1"], "training takes exactly one of epochs, max_steps, got epochs and max_steps"),
        (["training.max_steps=null"], "training takes exactly one of epochs, max_steps, got none"),
        (["model.hub={repo: a/b}"], "model takes exactly one of hub, uri, got hub and uri"),
        (["model={}"], "model takes exactly one of hub, uri, got none"),
        (["model=null"], "model must be a valid dictionary"),
        (["lora.rank=0"], "lora.rank must be greater than or equal to 1, got 0"),
        (["tuning=Full", "lora.rank=4"], "lora must not be set with tuning Full"),
        (["tuning=Full", "outputs=[{name: a, type: PEFT}]"], "outputs of type PEFT need adapters"),
        (["outputs=[{name: a, type: PEFT}, {name: a, type: PEFT}]"], "outputs with names of their own, got a twice"),
        (["outputs=[{name: a, type: ONNX}]"], "outputs[0].type must be 'HuggingFace', 'PEFT', 'GGUF', 'ExecuTorch' or"),
        (["outputs=[{name: a, type: GGUF}]"], "outputs[0] must have gguf with type GGUF, and only with it, got"),
        (["outputs=[{name: a, type: GGUF, gguf: {type: Q5_K}}]"], "gguf.type must be 'F16', 'Q8_0', 'Q4_0' or 'Q4_1'"),
        (["outputs=[{name: a, type: PEFT, gguf: {type: F16}}]"], "only with it, got type PEFT"),
        (["outputs=[{name: a, type: PEFT, scheme: NF4}]"], "may have a scheme only with type CompressedTensors or"),
        (["outputs=[{name: a, type: CompressedTensors}]"],
         "must have the scheme Int8WeightOnly or Int8DynamicActivation or Int4WeightOnly, got none"),
        (["outputs=[{name: a, type: ExecuTorch, scheme: NF4}]"],
         "must have the scheme Int8DynamicActivationInt4Weight, or none, got NF4"),
        (["outputs=[{name: a, type: CompressedTensors, scheme: Int8WeightOnly, group_size: 64}]"],
         "only with scheme Int4WeightOnly or Int8DynamicActivationInt4Weight, got Int8WeightOnly"),
        (["outputs=[{name: a, type: CompressedTensors, scheme: Int4WeightOnly, group_size: 48}]"],
         "outputs[0].group_size must be 32, 64 or 128, got 48"),
        (["outputs=[{name: a, type: PEFT, execu_torch: {}}]"], "may have execu_torch only with type ExecuTorch, got"),
        (["outputs=[{name: a, type: ExecuTorch, execu_torch: {max_sequence_length: 8}}]"],
         "execu_torch.max_sequence_length must be greater than or equal to 16, got 8"),
        (["outputs=[{name: a, type: PEFT, dtype: FP32}]"], "may have a dtype only with type HuggingFace, got PEFT"),
        (["outputs=[{name: a, type: PEFT}]", "model.adapter.location=s3://a/b"],
         "outputs of type PEFT need a model without an adapter, got output a with model.adapter"),
        (["dataset.sources=[]"], "dataset.sources"),
        (["dataset.validation={}"], "dataset.validation takes exactly one of fraction, sources, got none"),
        (["model.uri.location=/data"], "model.uri.location"),
        (["workspace.uri=ftp://x"], "workspace.uri"),
        (["lora.dropout=1.0"], "lora.dropout must be less than 1, got 1.0"),
        (["recipe=DPO", "dpo={loss: IPO, label_smoothing: 0.1}"],
         "dpo label_smoothing must be 0 with loss IPO, got 0.1"),
        (["recipe=DPO", "dpo={loss: Hinge, label_smoothing: 0.1}"],
         "dpo label_smoothing must be 0 with loss Hinge, got 0.1"),
        (["recipe=KTO", "training.global_batch_size=1"],
         "training.global_batch_size must be at least 2 with kto, got 1: the divergence is estimated from answers to"),
    ],
)  # fmt: skip
def test_a_wrong_field_is_refused_by_name_rule_and_value(tmp_path: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(write(tmp_path, MINIMAL), overrides=overrides)
    assert str(caught.value).startswith("FineTuneJob local/support-bot: ")
    assert message in str(caught.value)


def test_every_broken_rule_is_named_at_once_and_nothing_else(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(write(tmp_path, MINIMAL), overrides=["lora.rank=0", "dataset.sources.0.weight=0"])
    assert str(caught.value) == (
        "FineTuneJob local/support-bot: dataset.sources[0].weight must be greater than 0, got 0;"
        " lora.rank must be greater than or equal to 1, got 0"
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [("a: [", "is not YAML"), ("[1]", "must be a mapping, got list"), (None, "cannot be read: No such file")],
)
def test_a_file_that_is_no_config_is_refused(tmp_path: Path, text: str | None, message: str) -> None:
    path = write(tmp_path, text) if text is not None else tmp_path / "none.yaml"
    with pytest.raises(ConfigError, match=message):
        load_config(path)


@pytest.mark.parametrize("override", ["training", "=3", "dataset.sources.7.weight=1", "training.max_steps.x=1"])
def test_an_override_that_leads_nowhere_is_refused(tmp_path: Path, override: str) -> None:
    with pytest.raises(ConfigError, match="override"):
        load_config(write(tmp_path, MINIMAL), overrides=[override])


def test_accumulation_is_the_batch_over_ranks_and_micro_batches(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, MINIMAL))
    assert [config.accumulation_steps(ranks) for ranks in (1, 2, 3, 6)] == [6, 3, 2, 1]


def test_ranks_that_split_layers_see_the_same_rows(tmp_path: Path) -> None:
    overrides = ["training.parallelism.tensor=2", "training.parallelism.replicate=2"]
    config = load_config(write(tmp_path, MINIMAL), overrides=overrides)
    assert [config.accumulation_steps(ranks) for ranks in (4, 12)] == [3, 1]
    with pytest.raises(ConfigError, match="replicate x tensor must divide the number of ranks 6, got 2 x 2"):
        config.accumulation_steps(6)
    with pytest.raises(ConfigError, match=r"groups of 2 ranks x training\.micro_batch_size = 4 x 2 = 8, got 12"):
        config.accumulation_steps(8)


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["tuning=DoRA"], "training.parallelism.tensor must be 1 with tuning DoRA, got 2"),
        (["lora.dropout=0.1"], "lora.dropout must be 0 with training.parallelism.tensor 2, got 0.1"),
    ],
)
def test_what_cannot_be_split_is_refused(tmp_path: Path, overrides: list[str], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        load_config(write(tmp_path, MINIMAL), overrides=["training.parallelism.tensor=2", *overrides])


QAT = ["recipe=QAT", "qat.scheme=Int4WeightOnly"]


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["lora.merge_base=Original"], "lora.merge_base must be set only with tuning QLoRA, got tuning LoRA"),
        (["tuning=QLoRA", "training.compile=Blocks"], "training.compile must be None with tuning QLoRA, got Blocks"),
        ([*QAT, "tuning=DoRA"], "tuning must be Full or LoRA with qat, got DoRA"),
        ([*QAT, "tuning=QLoRA"], "tuning must be Full or LoRA with qat, got QLoRA"),
        ([*QAT, "lora.dropout=0.1"], "lora.dropout must be 0 with qat, got 0.1: what is rounded is the merged weight"),
        (["recipe=QAT", "tuning=Full"], "qat.scheme"),
        ([*QAT, "tuning=Full", "training.compile=Blocks"], "training.compile must be None with qat, got Blocks"),
        ([*QAT, "tuning=Full", "training.parallelism.tensor=2"], "tensor must be 1 with qat, got 2"),
        (
            [
                *QAT,
                "tuning=Full",
                "outputs=[{name: a, type: CompressedTensors, scheme: Int4WeightOnly, group_size: 64}]",
            ],
            "outputs must be quantized as qat says, Int4WeightOnly in groups of 32, got output a",
        ),
    ],
)
def test_few_bits_are_refused_where_they_do_not_go(tmp_path: Path, overrides: list[str], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        load_config(write(tmp_path, MINIMAL), overrides=overrides)


@pytest.mark.parametrize(("ranks", "nearest"), [(4, "8 or 16"), (5, "10 or 20"), (8, "16.")])
def test_a_batch_that_does_not_divide_names_the_nearest_that_do(tmp_path: Path, ranks: int, nearest: str) -> None:
    config = load_config(write(tmp_path, MINIMAL))
    with pytest.raises(ConfigError, match=f"= {ranks} x 2 = {ranks * 2}, got 12") as caught:
        config.accumulation_steps(ranks)
    assert nearest in caught.value.hint


def test_the_training_digest_follows_what_decides_the_numbers_and_nothing_else(tmp_path: Path) -> None:
    path = write(tmp_path, MINIMAL)
    digest = load_config(path).training_digest()
    assert load_config(path, overrides=["run.name=b", "checkpoint.keep=9"]).training_digest() == digest
    assert load_config(path, overrides=["training.parallelism.tensor=2"]).training_digest() == digest
    assert load_config(path, overrides=["training.seed=1"]).training_digest() != digest
