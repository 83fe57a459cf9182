"""The config file is the contract between operator and trainer: what one writes, the other reads as it is meant."""

from enum import IntEnum
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from kubetune_operator import names as operator_names
from kubetune_operator.render.config import Resolved, dump_config, render_config
from kubetune_trainer import names as trainer_names
from kubetune_trainer.config import FineTuneConfig, load_config
from tests.render.manifests import EVERYTHING, SMALL, finetunejob


def loaded(text: str, *, tmp_path: Path, resolved: Resolved | None = None, **spec: Any) -> FineTuneConfig:
    config = render_config(finetunejob(text, **spec), resolved=resolved or Resolved(processes_per_node=8))
    path = tmp_path / "config.yaml"
    path.write_text(dump_config(config))
    return load_config(path)


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
    assert (config.training.learning_rate, config.training.weight_decay) == (2e-4, 1e-5)
    assert config.checkpoint.resume_from is not None
    assert config.checkpoint.resume_from.uri == "s3://runs/old/checkpoints"
    assert config.model.uri is not None
    assert config.model.uri.s3 is not None
    assert config.model.uri.s3.credentials_secret is not None
    assert config.model.uri.s3.credentials_secret.name == "other"
    assert config.run.directory == "s3://runs/team/team-a/everything-1f0c9a2b"


def test_a_fraction_and_full_tuning_are_read(tmp_path: Path) -> None:
    dataset = yaml.safe_load(SMALL)["spec"]["dataset"] | {"validation": {"fraction": "0.05"}}
    config = loaded(SMALL, tmp_path=tmp_path, dataset=dataset, tuning="Full")
    assert config.dataset.validation is not None
    assert config.dataset.validation.fraction == 0.05
    assert config.lora is None


def test_references_to_other_jobs_are_replaced_by_what_they_stand_for(tmp_path: Path) -> None:
    reference = {"kind": "FineTuneJob", "name": "first"}
    resolved = Resolved(
        processes_per_node=1,
        model={"uri": {"location": "s3://runs/out", "s3": {"endpoint": "https://s3:9000"}}},
        resume_from="s3://runs/c/step-8",
    )
    config = loaded(
        SMALL, tmp_path=tmp_path, resolved=resolved,
        model={"jobRef": reference}, checkpoint={"resumeFrom": {"jobRef": reference}},
    )  # fmt: skip
    assert config.model.uri is not None
    assert config.model.uri.location == "s3://runs/out"
    assert config.checkpoint.resume_from is not None
    assert config.checkpoint.resume_from.uri == "s3://runs/c/step-8"


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
