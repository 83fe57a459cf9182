"""YAML means the same to us as to kubectl."""

import json
from typing import Any

import pytest
import yaml

from kubetune_operator.api.finetunejob import parse_finetunejob
from kubetune_operator.api.manifest import dump_manifests, load_manifests
from kubetune_operator.errors import SpecError
from tests.api.test_finetunejob import MINIMAL
from tests.cluster.controlplane import ControlPlane

SCALARS: dict[str, Any] = {
    "2e-4": 0.0002, "2.0e-4": 0.0002, "1e3": 1000, "1E3": 1000, ".5": 0.5, "1.": 1, "16.0": 16, "-0.5": -0.5,
    "1e21": 1e21,
    "0777": 511, "0o17": 15, "089": 89, "0x1F": 31, "0b11": 3, "1_000": 1000, "+12": 12, "1_0.5": 10.5,
    "1e400": "1e400",
    "1:30": "1:30", "2001-01-01": "2001-01-01", "12e": "12e", "=": "=", "None": "None", "1.2.3": "1.2.3",
    "y": True, "N": False, "on": True, "Off": False, "YES": True, "true": True, "~": None, "Null": None, "": None,
    '"2e-4"': "2e-4", "'on'": "on", "!!str 3": "3", "123456789012345678901234567890": 1.2345678901234568e29,
}  # fmt: skip
KEYS = {"on": "true", "2": "2", "1.5": "1.5", "1e3": "1000", "2001-01-01": "2001-01-01", "<": "<"}


def document() -> str:
    values = "".join(f"  v{number}: {scalar}\n" for number, scalar in enumerate(SCALARS))
    keys = "".join(f"  {key}: k\n" for key in KEYS)
    return f"apiVersion: v1\nkind: ConfigMap\nmetadata: {{name: x}}\ndata:\n{values}{keys}"


def test_scalars_and_keys_are_read_as_kubectl_reads_them() -> None:
    data = load_manifests(document(), source="document")[0]["data"]
    assert data == {f"v{number}": value for number, value in enumerate(SCALARS.values())} | dict.fromkeys(
        KEYS.values(), "k"
    )


@pytest.mark.control_plane
def test_kubectl_reads_them_so(control_plane: ControlPlane) -> None:
    printed = control_plane.kubectl(
        "create", "--dry-run=client", "--validate=false", "--output=json", "--filename=-", input=document()
    ).stdout
    assert json.loads(printed)["data"] == load_manifests(document(), source="document")[0]["data"]


def test_an_unquoted_learning_rate_is_refused_as_a_number() -> None:
    text = MINIMAL.replace("{epochs: 3}", "{epochs: 3, learningRate: 2e-4}")
    with pytest.raises(SpecError, match='learningRate in body must be of type string: "number"'):
        parse_finetunejob(load_manifests(text, source="text")[0])


def test_a_whole_number_written_as_a_float_is_an_integer() -> None:
    text = MINIMAL.replace("{epochs: 3}", "{epochs: 3.0}")
    assert parse_finetunejob(load_manifests(text, source="text")[0]).spec.training.epochs == 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: {{ .Values.name }}\n", "job.yaml: a key is no text; is this a template that was not rendered?"),
        ("? [a]\n: 1\n", "job.yaml: a key is no text"),
        ("[" * 5000, "job.yaml: is nested too deep"),
        ("a: 1\na: 2\n", 'job.yaml: key "a" stands twice in "<unicode string>", line 2, column 1'),
        ("\ta: 1\n", "job.yaml: while scanning"),
        ("- a\n", "job.yaml: document 1 is no object with apiVersion and kind"),
        ("a: .inf\n", "job.yaml: JSON has no number .inf"),
        ("~: 1\n", "job.yaml: a key is empty"),
        ("a: !!python/object:os.system x\n", "job.yaml: could not determine a constructor"),
    ],
)
def test_a_broken_file_is_refused_by_name(text: str, message: str) -> None:
    with pytest.raises(SpecError) as refused:
        load_manifests(text, source="job.yaml")
    assert str(refused.value).startswith(message)


def test_what_is_written_is_read_back_by_kubectl_and_by_pyyaml() -> None:
    data = {"a": "2e-4", "b": "on", "c": "1:30", "d": "2001-01-01", "e": "None", "f": "~", "g": 2e-4, "h": ["1_000"]}
    text = dump_manifests([data])
    assert load_manifests(text, source="text") == [data]
    assert yaml.safe_load(text) == data
