"""QuantizeJobs: from a model to outputs with what they cost, and gates on it."""

import json
from typing import Any

import pytest

from tests.controller.world import QUANTIZED, World, condition_of, running_of

pytestmark = pytest.mark.control_plane

VERIFY = {"dataset": {"sources": [{"name": "held-out", "uri": {"location": "s3://data/v.jsonl"}, "weight": "2"}]}}
OUTPUTS = [
    {"name": "int8", "type": "CompressedTensors", "scheme": "Int8WeightOnly"},
    {"name": "int4", "type": "CompressedTensors", "scheme": "Int4WeightOnly", "groupSize": 64},
]


@pytest.fixture
def quantizes(world: World) -> World:
    return world.of("QuantizeJob")


def verdict(output: str, *, passed: bool) -> dict[str, Any]:
    value = 0.5 if passed else 7.25
    message = f"perplexity of {output} rose by {value} %"
    return {
        "name": "close", "output": output, "rule": "maxPerplexityIncreasePercent 2.0", "value": value,
        "passed": passed, "message": message,
    }  # fmt: skip


async def test_a_model_becomes_outputs_that_say_what_they_cost(quantizes: World) -> None:
    calibration = {"dataset": VERIFY["dataset"], "samples": 16}
    await quantizes.apply(outputs=OUTPUTS, calibration=calibration, verify=VERIFY)
    await quantizes.prepared(report={"result": "Prepared", "total": 60})
    [pod] = await quantizes.training()
    config = await quantizes.config()
    assert config["calibration"]["dataset"]["sources"][0]["weight"] == 2.0
    assert (config["calibration"]["method"], config["verify"]["samples"]) == ("GPTQ", 64)
    assert config["outputs"][1]["group_size"] == 64
    events = [
        {"event": "phase", "phase": "Calibrating"},
        {"event": "progress", "done": 12, "total": 60, "etaSeconds": 9, "phase": "Calibrating"},
    ]
    quantizes.logs[pod["metadata"]["name"]] = "\n".join(json.dumps(event) for event in events)
    status = await quantizes.until(lambda status: status["progress"]["done"] == 12)
    assert (status["progress"]["phase"], status["progress"]["ofTotal"]) == ("Calibrating", "12/60")
    assert running_of(status)["reason"] == "Calibrating"
    status = await quantizes.complete([pod])
    told = QUANTIZED["outputs"][0]
    assert status["outputs"] == [
        told
        | {
            "perplexity": "12.3457",
            "sourcePerplexity": "12",
            "divergence": {"meanKl": "0.00123", "topTokenAgreementPercent": "98.7", "maxLogitDifference": "0.5"},
        }
    ]
    assert condition_of(status, "Complete")["message"] == "int8: s3://runs/q/int8"
    assert "gates" not in status


async def test_an_output_that_calibration_is_not_used_for_is_told(quantizes: World) -> None:
    outputs = [*OUTPUTS, {"name": "edge", "type": "GGUF", "gguf": {"type": "Q8_0"}}]
    await quantizes.apply(outputs=outputs, calibration={"dataset": VERIFY["dataset"]})
    await quantizes.live()
    fields = "involvedObject.kind=QuantizeJob,reason=CalibrationIgnored"
    [told] = await quantizes.cluster.list_all("Event", namespace=quantizes.namespace, fields=fields)
    assert told["type"] == "Warning"
    assert told["message"] == (
        "spec.outputs[2] (edge): spec.calibration is used for type CompressedTensors only, got GGUF: "
        "its weights go to the nearest value"
    )


async def test_one_gate_judges_every_output_and_one_that_fails_fails_it(quantizes: World) -> None:
    gates = [{"name": "close", "maxPerplexityIncreasePercent": "2.0"}]
    await quantizes.apply(outputs=OUTPUTS, verify=VERIFY, gates=gates)
    status = await quantizes.live(gates=[verdict("int8", passed=True), verdict("int4", passed=False)])
    assert [(gate["output"], gate["passed"]) for gate in status["gates"]] == [("int8", True), ("int4", False)]
    condition = condition_of(status, "GatePassed")
    assert (condition["status"], condition["reason"]) == ("False", "GateFailed")
    assert condition["message"] == "gate close: perplexity of int4 rose by 7.25 %"
    assert (await quantizes.config())["gates"][0]["max_perplexity_increase_percent"] == 2.0


async def test_a_killed_job_repeats_and_a_permanent_failure_ends_it(quantizes: World) -> None:
    await quantizes.apply()
    await quantizes.prepared()
    [pod] = await quantizes.training()
    await quantizes.end(pod, code=137)
    await quantizes.until(lambda status: status.get("restarts") == 1)
    [pod] = await quantizes.live_pods("quantize", count=1)
    await quantizes.run(pod)
    await quantizes.state("Running")
    report = {"result": "Failed", "exitCode": 65, "reason": "DataInvalid", "message": "no calibration rows"}
    await quantizes.end(pod, code=65, report=report)
    status = await quantizes.state("Failed")
    assert (status["restarts"], status["lastFailure"]["message"]) == (1, "no calibration rows")
    assert "outputs" not in status
