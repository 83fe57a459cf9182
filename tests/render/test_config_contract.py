"""The config file is the contract between operator and trainer: what one writes, the other reads as it is meant."""

from enum import IntEnum
from pathlib import Path
from types import ModuleType
from typing import Any, get_args

import pytest
import yaml

from kubetune_operator import names as operator_names
from kubetune_operator.api import dataset as operator_dataset
from kubetune_operator.api import outputs as operator_outputs
from kubetune_operator.api import quantizejob as operator_quantizejob
from kubetune_operator.api.evaljob import EvalJobSpec
from kubetune_operator.render.config import Resolved, dump_config, render_config
from kubetune_trainer import config as trainer_config
from kubetune_trainer import names as trainer_names
from kubetune_trainer.config import (
    FineTuneConfig,
    JobConfig,
    Mlflow,
    Profile,
    PushToHub,
    SecretKey,
    TensorBoard,
    Wandb,
    load_config,
)
from kubetune_trainer.config import outputs as trainer_outputs
from kubetune_trainer.config import quantize as trainer_quantize
from kubetune_trainer.config.evaluate import EvalConfig
from kubetune_trainer.config.quantize import QuantizeConfig
from kubetune_trainer.data import formats as trainer_formats
from kubetune_trainer.model.config import QUANTIZATION_METHODS
from kubetune_trainer.model.weights import GGUF_FILE
from tests.render.manifests import (
    EVAL_EVERYTHING,
    EVAL_SMALL,
    EVERYTHING,
    QUANTIZE_EVERYTHING,
    QUANTIZE_SMALL,
    SMALL,
    finetunejob,
    job,
)

RESOLVED = Resolved(
    processes_per_node=1,
    models={"model": {"uri": {"location": "s3://models/base"}, "adapter": {"location": "s3://runs/adapter"}}},
    compared={"base": "s3://runs/team/team-a/base-1f0c9a2b"},
    parents=(
        {"kind": "FineTuneJob", "name": "tuned", "uid": "u1", "output": "adapter"},
        {"kind": "EvalJob", "name": "base", "uid": "u2"},
    ),
)


def read(text: str, *, tmp_path: Path, resolved: Resolved | None = None, **spec: Any) -> JobConfig:
    config = render_config(job(text, **spec), resolved=resolved or Resolved(processes_per_node=8))
    path = tmp_path / "config.yaml"
    path.write_text(dump_config(config))
    return load_config(path, expect=JobConfig)


def loaded(text: str, *, tmp_path: Path, resolved: Resolved | None = None, **spec: Any) -> FineTuneConfig:
    config = read(text, tmp_path=tmp_path, resolved=resolved, **spec)
    assert isinstance(config, FineTuneConfig)
    return config


@pytest.mark.parametrize("text", ["81e4567", "1e5", "2e-4", "+.5E3", "12", "0x1f", "null", "true", "2026-01-01", "~"])
def test_a_string_that_looks_like_something_else_arrives_as_it_is(text: str, tmp_path: Path) -> None:
    model = {"hub": {"repo": "org/base", "revision": text}}
    config = loaded(SMALL, tmp_path=tmp_path, model=model, lora={"trainTokens": [text]})
    assert config.model.hub is not None
    assert config.lora is not None
    assert (config.model.hub.revision, list(config.lora.train_tokens)) == (text, [text])


def test_the_trainer_reads_the_smallest_job_with_the_operators_defaults(tmp_path: Path) -> None:
    config = loaded(SMALL, tmp_path=tmp_path)
    spec = finetunejob(SMALL).spec
    assert config.lora is not None
    assert (config.lora.rank, config.lora.alpha, config.lora.target_modules) == (16, 32, ("all-linear",))
    assert config.training.global_batch_size == spec.training.global_batch_size
    assert config.training.learning_rate == float(spec.training.learning_rate)
    assert config.checkpoint.keep == 3
    assert config.run.directory == "pvc://runs/kubetune/team-a/small-1f0c9a2b"
    assert config.run.cache == "pvc://runs/kubetune/team-a/cache"
    assert (config.run.num_nodes, config.run.processes_per_node) == (1, 8)


def test_the_trainer_reads_every_field_with_its_value(tmp_path: Path) -> None:
    config = loaded(EVERYTHING, tmp_path=tmp_path)
    assert [source.weight for source in config.dataset.sources] == [2.5, 1.0, 1.0]
    assert config.dataset.validation is not None
    assert config.dataset.validation.sources is not None
    assert config.dataset.validation.sources[0].weight == 0.5
    assert config.dataset.packing == "None"
    assert config.lora is not None
    assert config.lora.dropout == 0.1
    assert (config.lora.rank_stabilized, config.lora.learning_rate_ratio) == (True, 16)
    assert config.lora.train_tokens == ("<|tool|>",)
    assert (config.training.learning_rate, config.training.weight_decay) == (2e-4, 1e-5)
    assert (config.training.optimizer, config.training.stochastic_rounding) == ("AdamW8bit", True)
    assert (config.training.max_grad_norm, config.training.optimizer_in_backward) == (1, False)
    assert (config.training.activation_checkpointing, config.training.compile) == ("Selective", "Blocks")
    assert (config.training.cpu_offload, config.training.activation_offload) == (True, False)
    assert config.checkpoint.resume_from is not None
    assert config.checkpoint.resume_from.uri == "s3://runs/old/checkpoints"
    assert config.model.uri is not None
    assert config.model.uri.s3 is not None
    assert config.model.uri.s3.credentials_secret is not None
    assert config.model.uri.s3.credentials_secret.name == "other"
    assert config.run.directory == "s3://runs/team/team-a/everything-1f0c9a2b"
    assert config.training.profile == Profile(start_step=5, num_steps=3, memory=True)
    assert config.push_to_hub == PushToHub(
        repo="team/bot", output="merged", private=False, token_secret=SecretKey(name="hf", key="write")
    )
    assert config.tracking is not None
    assert config.tracking.wandb == Wandb(
        project="bots", entity="team", group="night", tags=("a",), mode="Online",
        api_key_secret=SecretKey(name="wandb", key="api"), base_url="https://w",
    )  # fmt: skip
    assert config.tracking.mlflow == Mlflow(
        tracking_uri="https://mlflow:5000", experiment="bots", token_secret=SecretKey(name="mlflow", key="token")
    )
    assert config.tracking.tensorboard == TensorBoard()


def test_the_trainer_reads_where_activations_wait_and_takes_it_for_the_same_run(tmp_path: Path) -> None:
    training: dict[str, Any] = {"epochs": 1}
    compute = {"accelerator": {"resource": "nvidia.com/gpu", "perNode": 8}}
    plain = loaded(SMALL, tmp_path=tmp_path, training=training)
    for field in ("activationOffload", "cpuOffload"):
        config = loaded(SMALL, tmp_path=tmp_path, training={**training, field: True}, compute=compute)
        assert (config.training.activation_offload, config.training.cpu_offload) == (
            field == "activationOffload", field == "cpuOffload",
        )  # fmt: skip
        assert config.training_digest() == plain.training_digest(), "the numbers are the same"


def test_the_trainer_reads_what_is_trained_in_few_bits(tmp_path: Path) -> None:
    packed = loaded(SMALL, tmp_path=tmp_path, tuning="QLoRA")
    assert packed.adapter_settings()["packs_base"]
    assert packed.merges_packed
    original = loaded(SMALL, tmp_path=tmp_path, tuning="QLoRA", lora={"mergeBase": "Original"})
    assert not original.merges_packed
    assert original.training_digest() == packed.training_digest(), "what is exported does not change what is trained"
    rounded = loaded(SMALL, tmp_path=tmp_path, recipe="QAT", tuning="Full", qat={"scheme": "Int4WeightOnly"})
    assert rounded.qat is not None
    assert (rounded.qat.scheme, rounded.qat.group_size, rounded.rows) == ("Int4WeightOnly", 32, "Samples")
    assert rounded.dataset.packing == "BestFit"


def test_the_trainer_reads_an_evaluation_with_the_operators_defaults(tmp_path: Path) -> None:
    config, spec = read(EVAL_SMALL, tmp_path=tmp_path), job(EVAL_SMALL).spec
    assert isinstance(config, EvalConfig)
    assert isinstance(spec, EvalJobSpec)
    assert (config.batch_size, config.seed) == (spec.batch_size, spec.seed)
    assert (config.max_sequence_length, config.apply_chat_template, config.gates) == (None, False, ())
    assert config.run.directory == "pvc://runs/kubetune/team-a/small-1f0c9a2b"


def test_the_trainer_reads_every_field_of_an_evaluation(tmp_path: Path) -> None:
    config = read(EVAL_EVERYTHING, tmp_path=tmp_path, resolved=RESOLVED)
    assert isinstance(config, EvalConfig)
    assert config.model.adapter is not None
    assert config.model.adapter.location == "s3://runs/adapter"
    assert [(task.name, task.num_fewshot, task.limit) for task in config.tasks] == [
        ("hellaswag", 0, 200), ("tickets", 3, None),
    ]  # fmt: skip
    assert config.task_files[0].config_map is not None
    assert config.task_files[0].config_map.name == "tasks"
    floor, ceiling, as_good, as_low = config.gates
    assert (floor.at_least, floor.filter, ceiling.at_most, ceiling.filter) == (0.4, "none", 12.0, "strict-match")
    assert as_good.compared_to is not None
    assert (as_good.compared_to.max_drop, as_good.compared_to.directory) == (0.01, RESOLVED.compared["base"])
    assert as_low.compared_to is not None
    assert as_low.compared_to.max_increase == 0.5
    assert [(parent.kind, parent.output) for parent in config.run.parents] == [
        ("FineTuneJob", "adapter"), ("EvalJob", None),
    ]  # fmt: skip


def test_the_trainer_reads_a_quantization(tmp_path: Path) -> None:
    small = read(QUANTIZE_SMALL, tmp_path=tmp_path)
    assert isinstance(small, QuantizeConfig)
    assert (small.calibration, small.verify, small.gates, small.run.parents) == (None, None, (), ())
    config = read(QUANTIZE_EVERYTHING, tmp_path=tmp_path, resolved=RESOLVED)
    assert isinstance(config, QuantizeConfig)
    assert [(output.type, output.scheme, output.group_size) for output in config.outputs] == [
        ("CompressedTensors", "Int4WeightOnly", 128), ("TorchAO", "NF4", None), ("GGUF", None, None),
        ("ExecuTorch", None, None),
    ]  # fmt: skip
    assert config.calibration is not None
    assert [source.weight for source in config.calibration.dataset.sources] == [2.5, 1.0]
    assert (config.calibration.samples, config.calibration.method) == (16, "GPTQ")
    assert config.calibration.dataset.packing == "None"
    assert config.verify is not None
    assert config.verify.dataset.sources[0].weight == 0.5
    assert [(gate.output, gate.max_perplexity_increase_percent) for gate in config.gates] == [
        (None, 2.0),
        ("int4", 1.0),
    ]


def test_both_sides_have_one_table_of_schemes() -> None:
    assert operator_outputs.SCHEMES == trainer_outputs.SCHEMES
    assert operator_outputs.UNQUANTIZED == trainer_outputs.UNQUANTIZED
    assert operator_outputs.GROUPED == trainer_outputs.GROUPED
    assert operator_outputs.GROUP_SIZE == trainer_outputs.GROUP_SIZE
    assert operator_quantizejob.CALIBRATED == trainer_quantize.CALIBRATED


def test_both_sides_know_the_same_formats_and_their_columns() -> None:
    known = operator_dataset.Source.model_fields["format"].annotation
    assert known == trainer_config.Source.model_fields["format"].annotation
    assert set(get_args(known)) == {"Auto", *trainer_formats.REQUIRED}
    columns = {field for fields in trainer_formats.REQUIRED.values() for field in fields}
    assert columns <= set(operator_dataset.Columns.model_fields)


def test_evaluations_are_given_the_formats_that_the_trainer_loads() -> None:
    formats = {name.replace("-", "") for name in QUANTIZATION_METHODS} | {GGUF_FILE.rpartition(".")[2]}
    assert {name.lower() for name in operator_outputs.LOADABLE["EvalJob"]} - {"huggingface"} == formats


def test_a_fraction_and_full_tuning_are_read(tmp_path: Path) -> None:
    dataset = yaml.safe_load(SMALL)["spec"]["dataset"] | {"validation": {"fraction": "0.05"}}
    config = loaded(SMALL, tmp_path=tmp_path, dataset=dataset, tuning="Full")
    assert config.dataset.validation is not None
    assert config.dataset.validation.fraction == 0.05
    assert config.lora is None


REFERENCE = {"hub": {"repo": "a/b", "revision": "main"}}


@pytest.mark.parametrize(
    ("recipe", "block", "given", "expected"),
    [
        (
            "DPO",
            "dpo",
            {"beta": "0.2", "labelSmoothing": "0.1"},
            {"loss": "Sigmoid", "beta": 0.2, "label_smoothing": 0.1},
        ),
        ("DPO", "dpo", {"loss": "IPO"}, {"loss": "IPO", "beta": 0.1, "label_smoothing": 0.0}),
        ("DPO", "dpo", {"reference": {"hub": {"repo": "a/b"}}}, {"reference": REFERENCE}),
        ("ORPO", "orpo", None, {"beta": 0.1}),
        (
            "KTO",
            "kto",
            {"desirableWeight": "1.5", "reference": {"hub": {"repo": "a/b"}}},
            {"beta": 0.1, "desirable_weight": 1.5, "undesirable_weight": 1.0, "reference": REFERENCE},
        ),
        ("SimPO", "simpo", {"gamma": "0.5"}, {"beta": 2.0, "gamma": 0.5}),
    ],
)
def test_a_recipe_is_read_with_its_block_and_without_packing(
    tmp_path: Path, recipe: str, block: str, given: dict[str, Any] | None, expected: dict[str, Any]
) -> None:
    config = loaded(SMALL, tmp_path=tmp_path, recipe=recipe, **({block: given} if given else {}))
    found = getattr(config, block).model_dump(exclude_none=True)
    assert {name: found[name] for name in expected} == expected
    assert len(found) == len(expected) or "reference" in expected
    rows = "Answers" if recipe == "KTO" else "Pairs"
    assert (config.recipe, config.rows, config.dataset.packing) == (recipe, rows, "None")


def test_a_teacher_is_read_with_its_numbers_and_rows_may_be_packed(tmp_path: Path) -> None:
    teacher = {"hub": {"repo": "HuggingFaceTB/SmolLM2-1.7B-Instruct"}}
    config = loaded(
        SMALL, tmp_path=tmp_path, recipe="Distillation", distillation={"teacher": teacher, "temperature": "2.5"}
    )
    assert config.distillation is not None
    assert config.distillation.model_dump(exclude={"teacher"}) == {
        "divergence": "Forward", "temperature": 2.5, "weight": 0.5,
    }  # fmt: skip
    assert [model.hub.repo for model in config.other_models.values() if model.hub] == [teacher["hub"]["repo"]]
    assert (config.rows, config.dataset.packing) == ("Samples", "BestFit")


@pytest.mark.parametrize(
    ("format_", "rows", "packing"), [("Auto", "Samples", "BestFit"), ("Preference", "Pairs", "None")]
)
def test_a_script_of_ones_own_is_read_and_its_data_says_what_a_row_is(
    tmp_path: Path, format_: str, rows: str, packing: str
) -> None:
    dataset = {"sources": [{"name": "pairs", "hub": {"repo": "a/b"}, "format": format_}]}
    script = {"configMap": {"name": "focal", "key": "focal.py"}}
    config = loaded(
        SMALL, tmp_path=tmp_path, recipe="Custom", dataset=dataset, dpo={"beta": "0.2"},
        custom={"script": script, "args": ["--gamma", "2.0"]},
    )  # fmt: skip
    assert config.custom is not None
    assert config.custom.model_dump(exclude_none=True) == {
        "script": {"config_map": {"name": "focal", "key": "focal.py"}}, "args": ("--gamma", "2.0"),
    }  # fmt: skip
    assert config.dpo is not None
    assert (config.dpo.beta, config.rows, config.dataset.packing) == (0.2, rows, packing)
    in_image = loaded(SMALL, tmp_path=tmp_path, recipe="Custom", custom={"script": {"path": "/opt/my.py"}}).custom
    assert in_image is not None
    assert (in_image.script.path, in_image.args) == ("/opt/my.py", ())


def test_references_to_other_jobs_are_replaced_by_what_they_stand_for(tmp_path: Path) -> None:
    reference = {"kind": "FineTuneJob", "name": "first"}
    resolved = Resolved(
        processes_per_node=1,
        models={
            "model": {"uri": {"location": "s3://runs/out", "s3": {"endpoint": "https://s3:9000"}}},
            "dpo.reference": {"uri": {"location": "s3://models/base"}, "adapter": {"location": "s3://runs/adapter"}},
        },
        resume_from="s3://runs/c/step-8",
    )
    config = loaded(
        SMALL, tmp_path=tmp_path, resolved=resolved,
        model={"jobRef": reference}, checkpoint={"resumeFrom": {"jobRef": reference}},
        recipe="DPO", dpo={"reference": {"jobRef": reference}},
    )  # fmt: skip
    assert config.model.uri is not None
    assert config.model.uri.location == "s3://runs/out"
    assert config.checkpoint.resume_from is not None
    assert config.checkpoint.resume_from.uri == "s3://runs/c/step-8"
    assert config.other_models["dpo.reference"].model_dump(exclude_none=True) == resolved.models["dpo.reference"]


def _shared(module: ModuleType) -> dict[str, Any]:
    return {name: value for name, value in vars(module).items() if name.isupper()}


@pytest.mark.parametrize("name", sorted(_shared(operator_names).keys() & _shared(trainer_names).keys()))
def test_a_name_that_both_sides_have_means_the_same(name: str) -> None:
    assert _shared(operator_names)[name] == _shared(trainer_names)[name]


def test_the_folders_of_the_pod_are_the_trainers_defaults() -> None:
    assert operator_names.SECRETS_DIR == trainer_names.DEFAULT_SECRETS_DIR
    assert operator_names.CONFIGMAPS_DIR == trainer_names.DEFAULT_CONFIGMAPS_DIR
    assert operator_names.PVC_DIR == trainer_names.DEFAULT_PVC_DIR


def test_exit_codes_are_the_same_on_both_sides() -> None:
    def codes(enum: type[IntEnum]) -> dict[str, int]:
        return {item.name: item.value for item in enum}

    assert codes(operator_names.ExitCode) == codes(trainer_names.ExitCode)
