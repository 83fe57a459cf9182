"""The generated files are in step with the models, and the CRD keeps the API's own rules."""

from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from kubetune_operator.api import crd
from kubetune_operator.api.finetunejob import FROZEN, FineTuneJobSpec, FineTuneJobStatus, Progress
from tests.cluster.controlplane import ControlPlane

SCHEMA = crd.finetunejob_crd()["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
MUTABLE = {"suspend", "lifecycle"}


def fields(schema: dict[str, Any], path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Every schema below this one with its path."""
    for name, field in schema.get("properties", {}).items():
        yield f"{path}.{name}", field
        yield from fields(field, f"{path}.{name}")
    for name in ("items", "additionalProperties"):
        if isinstance(inner := schema.get(name), dict):
            yield f"{path}[]", inner
            yield from fields(inner, f"{path}[]")


FIELDS = [(path, field) for path, field in fields(SCHEMA) if path not in {".apiVersion", ".kind", ".metadata"}]


@pytest.mark.parametrize("path", crd.generated_files(), ids=lambda path: path.name)
def test_a_generated_file_matches_the_models(path: Any) -> None:
    assert path.read_text() == crd.generated_files()[path], "run `make generate`"


def test_a_stale_file_fails_the_check(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    path = next(iter(crd.generated_files()))
    monkeypatch.setattr(crd, "generated_files", lambda: {path: "old"})
    monkeypatch.setattr("sys.argv", ["crd", "--check"])
    assert crd.main() == 1
    assert "run `make generate`" in capsys.readouterr().err


def test_every_field_is_described() -> None:
    assert not [path for path, field in FIELDS if not path.endswith("[]") and not field.get("description")]


def test_every_string_list_and_map_has_a_limit() -> None:
    unlimited = [
        path
        for path, field in FIELDS
        if (field.get("type") == "string" and not field.keys() & {"maxLength", "enum"})
        or (field.get("type") == "array" and "maxItems" not in field)
        or ("additionalProperties" in field and "maxProperties" not in field)
    ]
    assert not unlimited


def test_every_list_says_how_it_merges() -> None:
    assert not [
        path for path, field in FIELDS if field.get("type") == "array" and "x-kubernetes-list-type" not in field
    ]


def test_there_are_no_floats_and_no_unknown_content() -> None:
    kinds = {field.get("type") for _, field in FIELDS}
    assert kinds == {"string", "integer", "boolean", "object", "array", None}  # None: integer or string
    assert "x-kubernetes-preserve-unknown-fields" not in crd.crd_text(crd.finetunejob_crd())


def test_status_has_no_defaults_and_conditions_first() -> None:
    assert not [path for path, field in FIELDS if path.startswith(".status") and "default" in field]
    assert next(iter(SCHEMA["properties"]["status"]["properties"])) == "conditions"
    assert next(iter(FineTuneJobStatus.model_fields)) == "conditions"


def test_every_field_of_the_spec_is_either_frozen_or_meant_to_change() -> None:
    assert {field.alias for field in FineTuneJobSpec.model_fields.values()} == {*FROZEN, *MUTABLE}


def test_the_crd_is_small_enough_for_kubectl_apply() -> None:
    assert len(crd.crd_text(crd.finetunejob_crd()).encode()) < 200_000


def test_the_chart_holds_the_same_crd_behind_its_switch() -> None:
    text = crd.chart_text(crd.finetunejob_crd())
    assert text.startswith("{{- if .Values.crds.enabled }}\n")
    lines = [line for line in text.splitlines() if "{{" not in line]
    chart = yaml.safe_load("\n".join(lines))
    assert chart["metadata"].pop("annotations") == {"helm.sh/resource-policy": "keep"}
    assert chart == yaml.safe_load(crd.crd_text(crd.finetunejob_crd()))


@pytest.mark.parametrize(
    ("progress", "steps", "eta"),
    [
        (Progress(step=340, total_steps=900, eta_seconds=412), "340/900", "6m52s"),
        (Progress(step=3, eta_seconds=41), "3", "41s"),
        (Progress(step=1, total_steps=2, eta_seconds=11_220), "1/2", "3h07m"),
        (Progress(step=1, total_steps=2, eta_seconds=187_200), "1/2", "2d04h"),
        (Progress(), "0", None),
    ],
)
def test_progress_is_written_for_people_too(progress: Progress, steps: str, eta: str | None) -> None:
    written = progress.to_manifest()
    assert (written["steps"], written.get("eta")) == (steps, eta)
    assert Progress.model_validate(written) == progress


@pytest.mark.control_plane
def test_kubectl_prints_the_columns(control_plane: ControlPlane) -> None:
    header = control_plane.kubectl("get", "crd", "finetunejobs.kubetune.dev", "--output=yaml").stdout
    columns = yaml.safe_load(header)["spec"]["versions"][0]["additionalPrinterColumns"]
    shown = [column["name"].upper() for column in columns if not column.get("priority")]
    assert shown == ["STATE", "STEP", "LOSS", "TOKENS/S", "ETA", "RESTARTS", "AGE"]


@pytest.mark.control_plane
def test_kubectl_finds_jobs_by_short_name_and_category(control_plane: ControlPlane) -> None:
    for word in ("ftj", "kubetune", "finetunejobs.kubetune.dev"):
        assert control_plane.kubectl("get", word, "--all-namespaces").returncode == 0
