"""EvalJob and QuantizeJob: a table of manifests, judged twice, by pydantic and by the real API server."""

import json
from typing import Any

import pytest

from kubetune_operator.api.kinds import parse_job
from kubetune_operator.api.manifest import dump_manifests, load_manifests
from kubetune_operator.errors import SpecError
from tests.api.test_finetunejob import ABSENT, changed
from tests.cluster.controlplane import ControlPlane

Changes = dict[str, Any]

EVAL = """
apiVersion: kubetune.dev/v1alpha1
kind: EvalJob
metadata: {name: run7}
spec:
  model: {uri: {location: "s3://models/smollm2"}}
  tasks: [{name: hellaswag}]
  workspace: {uri: "s3://team/runs"}
"""
QUANTIZE = """
apiVersion: kubetune.dev/v1alpha1
kind: QuantizeJob
metadata: {name: run7}
spec:
  model: {uri: {location: "s3://models/smollm2"}}
  outputs: [{name: int8, type: CompressedTensors, scheme: Int8WeightOnly}]
  workspace: {uri: "s3://team/runs"}
"""
MINIMAL = {"EvalJob": EVAL, "QuantizeJob": QUANTIZE}
GATE: Changes = {"name": "floor", "task": "hellaswag", "metric": "acc", "atLeast": "0.40"}
DATASET: Changes = {"sources": [{"name": "held-out", "uri": {"location": "s3://data/v.jsonl"}}]}
NUMBER = 'must be a number in quotes, for example "0.40"'
NOT_NEGATIVE = 'must be a number in quotes, 0 or more, for example "0.01"'


def gates(*changes: Changes) -> Changes:
    return {
        "spec__gates": [{key: value for key, value in (GATE | each).items() if value is not ABSENT} for each in changes]
    }


def compared(**comparison: Any) -> Changes:
    return gates({"atLeast": ABSENT, "comparedTo": comparison})


def output(output_type: str, **options: Any) -> Changes:
    return {"spec__outputs": [{"name": "a", "type": output_type, **options}]}


GOOD: dict[str, dict[str, Changes]] = {
    "EvalJob": {
        "the minimal manifest": {},
        "a tuned model": {"spec__model": {"jobRef": {"name": "run7"}}},
        "a quantized model": {"spec__model": {"jobRef": {"kind": "QuantizeJob", "name": "run7", "output": "int8"}}},
        "everything": {
            "spec__tasks": [{"name": "hellaswag", "numFewshot": 0, "limit": 200}, {"name": "a/b", "numFewshot": 64}],
            "spec__taskFiles": [
                {"name": "a", "configMap": {"name": "tasks"}},
                {"name": "b", "uri": {"location": "s3://data/tasks", "s3": {"region": "r"}}},
            ],
            "spec__batchSize": 32, "spec__maxSequenceLength": 512, "spec__applyChatTemplate": True,
            "spec__systemInstruction": "Be brief.", "spec__seed": 0, "spec__compute": {"nodes": 2},
            "spec__queue": {"name": "team-a"}, "spec__after": [{"kind": "EvalJob", "name": "base"}],
        },
        "gates of each sort": gates(
            {}, {"name": "b", "atLeast": ABSENT, "atMost": "-1.5e-3", "filter": "strict-match", "metric": "pass@1"},
            {"name": "c", "atLeast": ABSENT, "comparedTo": {"name": "base", "maxDrop": "0.01"}},
            {"name": "d", "atLeast": ABSENT, "comparedTo": {"name": "base", "maxIncrease": "0"}},
        ),
    },
    "QuantizeJob": {
        "the minimal manifest": {},
        "a tuned model of the same name": {"spec__model": {"jobRef": {"name": "run7"}}},
        "every format and scheme": {
            "spec__outputs": [
                {"name": f"c{number}", "type": "CompressedTensors", "scheme": scheme}
                for number, scheme in enumerate(("Int8WeightOnly", "Int8DynamicActivation", "Int4WeightOnly"))
            ]
            + [
                {"name": f"t{number}", "type": "TorchAO", "scheme": scheme}
                for number, scheme in enumerate(
                    ("Int8WeightOnly", "Int8DynamicActivation", "Int8DynamicActivationInt4Weight", "Float8WeightOnly",
                     "Float8DynamicActivation", "NF4")
                )
            ]
            + [{"name": f"g-{kind[-1]}", "type": "GGUF", "gguf": {"type": kind}} for kind in ("F16", "Q4_0")]
            + [
                {"name": "grouped", "type": "TorchAO", "scheme": "Int4WeightOnly", "groupSize": 128},
                {"name": "pte", "type": "ExecuTorch", "execuTorch": {"maxSequenceLength": 1024}},
                {"name": "pte4", "type": "ExecuTorch", "scheme": "Int8DynamicActivationInt4Weight", "uri": "s3://models/pte"},
            ]
        },
        "calibration, verification and gates": {
            "spec__calibration": {"dataset": DATASET, "samples": 16, "method": "None"},
            "spec__verify": {"dataset": DATASET | {"maxSequenceLength": 512, "packing": "None"}},
            "spec__gates": [
                {"name": "all", "maxPerplexityIncreasePercent": "2.0"},
                {"name": "one", "output": "int8", "maxPerplexityIncreasePercent": "0"},
            ],
        },
        "calibration that is switched off": {"spec__calibration": {"dataset": DATASET, "method": "None"}},
        "one device": {"spec__compute": {"nodes": 1, "accelerator": {"perNode": 1}}},
    },
}  # fmt: skip

BAD: dict[str, dict[str, tuple[Changes, str]]] = {
    "EvalJob": {
        "an unknown field": ({"spec__dataset": {}}, 'unknown field "spec.dataset"'),
        "no tasks": ({"spec__tasks": ABSENT}, "spec.tasks: Required value"),
        "an empty list of tasks": (
            {"spec__tasks": []}, "spec.tasks: Invalid value: 0: spec.tasks in body should have at least 1 items",
        ),
        "a task twice": (
            {"spec__tasks": [{"name": "a"}, {"name": "a", "limit": 3}]}, 'spec.tasks[1]: Duplicate value: {"name":"a"}',
        ),
        "a task with a space": ({"spec__tasks": [{"name": "arc easy"}]}, "must consist of letters, digits, and"),
        "too many examples": (
            {"spec__tasks__0__numFewshot": 65},
            "spec.tasks[0].numFewshot in body should be less than or equal to 64",
        ),
        "a limit of zero": (
            {"spec__tasks__0__limit": 0}, "spec.tasks[0].limit in body should be greater than or equal to 1",
        ),
        "a limit as a fraction": ({"spec__tasks__0__limit": 0.5}, "tasks[0].limit in body must be of type integer"),
        "a batch of zero": ({"spec__batchSize": 0}, "spec.batchSize in body should be greater than or equal to 1"),
        "a chat template that is named": (
            {"spec__applyChatTemplate": "chatml"}, "spec.applyChatTemplate in body must be of type boolean",
        ),
        "an empty instruction": (
            {"spec__systemInstruction": ""}, "spec.systemInstruction in body should be at least 1 chars long",
        ),
        "task files from two places": (
            {"spec__taskFiles": [{"name": "a", "configMap": {"name": "c"}, "uri": {"location": "s3://data/t"}}]},
            "exactly one of configMap, uri must be set",
        ),
        "task files from nowhere": ({"spec__taskFiles": [{"name": "a"}]}, "exactly one of configMap, uri must be set"),
        "task files of one key": (
            {"spec__taskFiles": [{"name": "a", "configMap": {"name": "c", "key": "k"}}]},
            'unknown field "spec.taskFiles[0].configMap.key"',
        ),
        "a gate without a rule": (gates({"atLeast": ABSENT}), "exactly one of atLeast, atMost, comparedTo must be set"),
        "a gate with two rules": (gates({"atMost": "1"}), "exactly one of atLeast, atMost, comparedTo must be set"),
        "a gate without a metric": (gates({"metric": ABSENT}), "spec.gates[0].metric: Required value"),
        "a gate's limit as a number": (gates({"atLeast": 0.4}), "spec.gates[0].atLeast in body must be of type string"),
        "a gate's limit in words": (gates({"atLeast": "high"}), NUMBER),
        "two gates of one name": (gates({}, {}), 'spec.gates[1]: Duplicate value: {"name":"floor"}'),
        "a comparison without a limit": (compared(name="base"), "exactly one of maxDrop, maxIncrease must be set"),
        "a comparison with two limits": (
            compared(name="base", maxDrop="0", maxIncrease="0"), "exactly one of maxDrop, maxIncrease must be set",
        ),
        "a negative drop": (compared(name="base", maxDrop="-0.1"), NOT_NEGATIVE),
        "a comparison with itself": (compared(name="run7", maxDrop="0"), "spec.gates.comparedTo must name another job"),
        "the model of an evaluation": (
            {"spec__model": {"jobRef": {"kind": "EvalJob", "name": "a"}}},
            'spec.model.jobRef.kind: Unsupported value: "EvalJob": supported values: "FineTuneJob", "QuantizeJob"',
        ),
        "a job that comes after itself": (
            {"spec__after": [{"kind": "EvalJob", "name": "run7"}]}, "spec.after must name other jobs",
        ),
        "a name with a dot": ({"metadata__name": "run.7"}, "metadata.name must have at most 40 lower-case letters"),
    },
    "QuantizeJob": {
        "no outputs": ({"spec__outputs": ABSENT}, "spec.outputs: Required value"),
        "a format of FineTuneJobs": (
            output("HuggingFace"), 'spec.outputs[0].type: Unsupported value: "HuggingFace": supported values: "C',
        ),
        "a format without its scheme": (
            output("TorchAO"), "type: TorchAO takes the scheme Int8WeightOnly or Int8DynamicActivation or",
        ),
        "a scheme of another format": (
            output("CompressedTensors", scheme="NF4"),
            "type: CompressedTensors takes the scheme Int8WeightOnly or Int8DynamicActivation or Int4WeightOnly",
        ),
        "a scheme that ExecuTorch has not": (
            output("ExecuTorch", scheme="Int8WeightOnly"),
            "type: ExecuTorch takes the scheme Int8DynamicActivationInt4Weight, or none",
        ),
        "a scheme for GGUF": (
            output("GGUF", scheme="Int8WeightOnly", gguf={"type": "Q8_0"}),
            "scheme is allowed only with type: CompressedTensors or TorchAO or ExecuTorch",
        ),
        "a scheme that nobody knows": (
            output("TorchAO", scheme="Int3"), 'spec.outputs[0].scheme: Unsupported value: "Int3"',
        ),
        "GGUF without its type": (output("GGUF"), "gguf must be set with type: GGUF, and only with it"),
        "GGUF's type elsewhere": (
            output("ExecuTorch", gguf={"type": "F16"}), "gguf must be set with type: GGUF, and only with it",
        ),
        "a type of GGUF that we do not write": (
            output("GGUF", gguf={"type": "Q6_K"}),
            'spec.outputs[0].gguf.type: Unsupported value: "Q6_K": supported values: "F16", "Q8_0", "Q4_0", "Q4_1"',
        ),
        "ExecuTorch's options elsewhere": (
            output("GGUF", gguf={"type": "F16"}, execuTorch={}), "execuTorch is allowed only with type: ExecuTorch",
        ),
        "a group for 8 bits": (
            output("TorchAO", scheme="Int8WeightOnly", groupSize=32),
            "groupSize is allowed only with scheme: Int4WeightOnly or Int8DynamicActivationInt4Weight",
        ),
        "a group of another size": (
            output("TorchAO", scheme="Int4WeightOnly", groupSize=33), "spec.outputs[0].groupSize: Invalid value: 33",
        ),
        "a group in quotes": (
            output("TorchAO", scheme="Int4WeightOnly", groupSize="32"),
            "spec.outputs[0].groupSize in body must be of type integer",
        ),
        "two nodes": (
            {"spec__compute": {"nodes": 2}}, "spec.compute must have one node and at most one device",
        ),
        "two devices": (
            {"spec__compute": {"accelerator": {"perNode": 2}}}, "spec.compute must have one node and at most one",
        ),
        "gates without data to judge by": (
            {"spec__gates": [{"name": "a", "maxPerplexityIncreasePercent": "2"}]}, "spec.gates needs spec.verify",
        ),
        "a gate on an output that is not made": (
            {
                "spec__verify": {"dataset": DATASET},
                "spec__gates": [{"name": "a", "output": "int4", "maxPerplexityIncreasePercent": "2"}],
            },
            "the output of each of spec.gates must be one of spec.outputs",
        ),
        "a gate without a limit": (
            {"spec__verify": {"dataset": DATASET}, "spec__gates": [{"name": "a"}]},
            "spec.gates[0].maxPerplexityIncreasePercent: Required value",
        ),
        "a negative limit": (
            {
                "spec__verify": {"dataset": DATASET},
                "spec__gates": [{"name": "a", "maxPerplexityIncreasePercent": "-1"}],
            },
            NOT_NEGATIVE,
        ),
        "calibration with a validation": (
            {"spec__calibration": {"dataset": DATASET | {"validation": {"fraction": "0.1"}}}},
            'unknown field "spec.calibration.dataset.validation"',
        ),
        "calibration by a method that we do not have": (
            {"spec__calibration": {"dataset": DATASET, "method": "HQQ"}},
            'spec.calibration.method: Unsupported value: "HQQ": supported values: "GPTQ", "None"',
        ),
        "no samples": (
            {"spec__verify": {"dataset": DATASET, "samples": 0}},
            "spec.verify.samples in body should be greater than or equal to 1",
        ),
        "its own output": (
            {"spec__model": {"jobRef": {"kind": "QuantizeJob", "name": "run7"}}},
            "spec.model.jobRef must name another job",
        ),
    },
}  # fmt: skip

FULL: dict[str, Changes] = {
    "EvalJob": GOOD["EvalJob"]["everything"] | gates({}) | {"spec__storage": {"s3": {"region": "r"}}},
    "QuantizeJob": GOOD["QuantizeJob"]["calibration, verification and gates"]
    | {
        "spec__compute": {"nodes": 1}, "spec__storage": {"s3": {"region": "r"}}, "spec__queue": {"name": "team-a"},
        "spec__after": [{"kind": "EvalJob", "name": "base"}],
    },
}  # fmt: skip
FROZEN: dict[str, dict[str, Changes]] = {
    "EvalJob": {
        "model": {"spec__model__uri__location": "s3://models/other"},
        "tasks": {"spec__tasks__0__limit": 7},
        "batchSize": {"spec__batchSize": 4},
        "applyChatTemplate": {"spec__applyChatTemplate": False},
        "seed": {"spec__seed": 1},
        "workspace": {"spec__workspace__uri": "s3://other"},
        "lifecycle.gracePeriodSeconds": {"spec__lifecycle": {"gracePeriodSeconds": 7}},
    },
    "QuantizeJob": {
        "model": {"spec__model__uri__location": "s3://models/other"},
        "outputs": {"spec__outputs__0__uri": "s3://models/out"},
        "calibration": {"spec__calibration__samples": 17},
        "workspace": {"spec__workspace__uri": "s3://other"},
    },
}
APPEAR: dict[str, tuple[str, ...]] = {
    "EvalJob": ("taskFiles", "maxSequenceLength", "systemInstruction", "gates", "compute", "storage", "queue", "after"),
    "QuantizeJob": ("calibration", "verify", "gates", "compute", "storage", "queue", "after"),
}


def manifest(kind: str, **changes: Any) -> dict[str, Any]:
    return changed(load_manifests(MINIMAL[kind], source=kind)[0], **changes)


def cases(table: dict[str, dict[str, Any]]) -> Any:
    """Each case of a table with its kind, and how it is called."""
    return [pytest.param(kind, case, id=f"{kind}: {name}") for kind in table for name, case in table[kind].items()]


@pytest.mark.parametrize(("kind", "changes"), cases(GOOD))
def test_a_good_manifest_is_accepted(kind: str, changes: Changes) -> None:
    assert parse_job(manifest(kind, **changes)).kind == kind


@pytest.mark.parametrize(("kind", "case"), cases(BAD))
def test_a_bad_manifest_is_refused_with_its_message(kind: str, case: tuple[Changes, str]) -> None:
    with pytest.raises(SpecError) as refused:
        parse_job(manifest(kind, **case[0]))
    assert case[1] in str(refused.value)
    assert str(refused.value).startswith(f"{kind} run")


@pytest.mark.control_plane
@pytest.mark.parametrize(("kind", "changes"), cases(GOOD))
def test_the_api_server_accepts_it_and_fills_in_the_same_defaults(
    kind: str, changes: Changes, control_plane: ControlPlane
) -> None:
    text = dump_manifests([manifest(kind, **changes)])
    stored = control_plane.kubectl("create", "--dry-run=server", "--output=json", "--filename=-", input=text).stdout
    assert json.loads(stored)["spec"] == parse_job(manifest(kind, **changes)).to_manifest()["spec"]


@pytest.mark.control_plane
@pytest.mark.parametrize(("kind", "case"), cases(BAD))
def test_the_api_server_refuses_it_with_the_same_message(
    kind: str, case: tuple[Changes, str], control_plane: ControlPlane
) -> None:
    text = dump_manifests([manifest(kind, **case[0])])
    refused = control_plane.kubectl("create", "--dry-run=server", "--filename=-", input=text, check=False)
    assert refused.returncode
    assert case[1] in refused.stderr
    with pytest.raises(SpecError) as ours:
        parse_job(manifest(kind, **case[0]))
    assert all(problem in refused.stderr for problem in ours.value.problems), "both say the whole sentence"


@pytest.mark.control_plane
@pytest.mark.parametrize("kind", FULL)
def test_what_is_frozen_may_not_change_appear_or_vanish_and_the_rest_may(
    kind: str, control_plane: ControlPlane, namespace: str
) -> None:
    where = f"--namespace={namespace}"
    full = manifest(kind, **FULL[kind])
    bare = manifest(kind, metadata__name="bare")
    control_plane.kubectl("create", where, "--filename=-", input=dump_manifests([full, bare]))

    def refused(changed_manifest: dict[str, Any], field: str) -> bool:
        text = dump_manifests([changed_manifest])
        said = control_plane.kubectl("replace", "--dry-run=server", where, "--filename=-", input=text, check=False)
        return f"spec.{field} is immutable; make a new job to change it" in said.stderr

    for field, changes in FROZEN[kind].items():
        assert refused(changed(full, **changes), field)
    for field in APPEAR[kind]:
        assert refused(changed(full, **{f"spec__{field}": ABSENT}), field)
        assert refused(changed(bare, **{f"spec__{field}": full["spec"][field]}), field)
    allowed = changed(full, spec__suspend=True, spec__lifecycle={"maxRestarts": 9, "ttlSecondsAfterFinished": 5})
    control_plane.kubectl("replace", where, "--filename=-", input=dump_manifests([allowed]))
