"""The generated files are in step with the models, and the CRDs keep the API's own rules."""

from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from kubetune_operator.api import crd
from kubetune_operator.api.evaljob import EvalProgress
from kubetune_operator.api.finetunejob import Progress
from kubetune_operator.api.kinds import MODELS
from kubetune_operator.names import KINDS
from tests.cluster.controlplane import ControlPlane

CRDS = {kind: crd.crd_of(kind) for kind in KINDS}
SCHEMAS = {kind: each["spec"]["versions"][0]["schema"]["openAPIV3Schema"] for kind, each in CRDS.items()}
MUTABLE = {"suspend", "lifecycle"}
every_kind = pytest.mark.parametrize("kind", KINDS)


def fields(schema: dict[str, Any], path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Every schema below this one with its path."""
    for name, field in schema.get("properties", {}).items():
        yield f"{path}.{name}", field
        yield from fields(field, f"{path}.{name}")
    for name in ("items", "additionalProperties"):
        if isinstance(inner := schema.get(name), dict):
            yield f"{path}[]", inner
            yield from fields(inner, f"{path}[]")


FIELDS = [
    (f"{kind}{path}", field)
    for kind, schema in SCHEMAS.items()
    for path, field in fields(schema)
    if path not in {".apiVersion", ".kind", ".metadata"}
]


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
    assert not [kind for kind in KINDS if "x-kubernetes-preserve-unknown-fields" in crd.crd_text(CRDS[kind])]


def test_status_has_no_defaults() -> None:
    assert not [path for path, field in FIELDS if ".status" in path and "default" in field]


@every_kind
def test_conditions_come_first_in_status(kind: str) -> None:
    assert next(iter(SCHEMAS[kind]["properties"]["status"]["properties"])) == "conditions"
    assert next(iter(MODELS[kind].status.model_fields)) == "conditions"


@every_kind
def test_every_field_of_the_spec_is_either_frozen_or_meant_to_change(kind: str) -> None:
    spec = SCHEMAS[kind]["properties"]["spec"]
    messages = {rule["message"] for rule in spec["x-kubernetes-validations"]}
    frozen = {
        name for name in spec["properties"] if f"spec.{name} is immutable; make a new job to change it" in messages
    }
    assert set(spec["properties"]) - frozen == MUTABLE


@every_kind
def test_the_crd_is_small_enough_for_kubectl_apply(kind: str) -> None:
    assert len(crd.crd_text(CRDS[kind]).encode()) < 200_000


@every_kind
def test_the_chart_holds_the_same_crd_behind_its_switch(kind: str) -> None:
    text = crd.chart_text(CRDS[kind])
    assert text.startswith("{{- if .Values.crds.enabled }}\n")
    lines = [line for line in text.splitlines() if "{{" not in line]
    chart = yaml.safe_load("\n".join(lines))
    assert chart["metadata"].pop("annotations") == {"helm.sh/resource-policy": "keep"}
    assert chart == yaml.safe_load(crd.crd_text(CRDS[kind]))


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


def test_requests_and_tensors_are_written_for_people_too() -> None:
    written = EvalProgress(done=120, total=800, eta_seconds=61).to_manifest()
    assert (written["ofTotal"], written["eta"]) == ("120/800", "1m01s")
    assert EvalProgress().to_manifest() == {"done": 0, "ofTotal": "0"}


COLUMNS = {
    "FineTuneJob": ["STATE", "STEP", "LOSS", "TOKENS/S", "ETA", "RESTARTS", "AGE"],
    "EvalJob": ["STATE", "PROGRESS", "GATE", "ETA", "RESTARTS", "AGE"],
    "QuantizeJob": ["STATE", "PROGRESS", "GATE", "ETA", "RESTARTS", "AGE"],
}


@pytest.mark.control_plane
@every_kind
def test_kubectl_prints_the_columns(kind: str, control_plane: ControlPlane) -> None:
    header = control_plane.kubectl("get", "crd", f"{KINDS[kind].plural}.kubetune.dev", "--output=yaml").stdout
    columns = yaml.safe_load(header)["spec"]["versions"][0]["additionalPrinterColumns"]
    assert [column["name"].upper() for column in columns if not column.get("priority")] == COLUMNS[kind]


@pytest.mark.control_plane
def test_kubectl_finds_jobs_by_short_name_and_category(control_plane: ControlPlane) -> None:
    for word in ("ftj", "evj", "qj", "kubetune", "evaljobs.kubetune.dev"):
        assert control_plane.kubectl("get", word, "--all-namespaces").returncode == 0
