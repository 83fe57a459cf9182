"""A gate on an output passes when its rule holds, and never when it cannot be judged."""

import math

import pytest

from kubetune_trainer.config import QuantizeGate
from kubetune_trainer.quantize.gates import judge
from kubetune_trainer.quantize.verify import Comparison


def compared(source: float, perplexity: float) -> Comparison:
    return Comparison(
        tokens=8,
        source_perplexity=source,
        perplexity=perplexity,
        mean_kl=0.1,
        top_token_agreement_percent=90.0,
        max_logit_difference=1.0,
    )


@pytest.mark.parametrize(
    ("limit", "source", "perplexity", "passed"),
    [
        (2.0, 10.0, 10.1, True),
        (2.0, 10.0, 10.2, True),
        (2.0, 10.0, 10.3, False),
        (0.0, 10.0, 10.0, True),
        (0.0, 10.0, 9.0, True),
        (0.0, 10.0, 10.0 + 1e-7, False),
        (10.0, 3.0, 3.3, True),
        (1e6, 10.0, math.inf, False),
        (1e6, math.inf, 10.0, True),
        (1e6, math.inf, math.inf, False),
        (1e6, 10.0, math.nan, False),
    ],
)
def test_the_limit_is_part_of_what_passes(limit: float, source: float, perplexity: float, passed: bool) -> None:
    gate = QuantizeGate(name="g", max_perplexity_increase_percent=limit)
    assert judge(gate, output="int4", comparison=compared(source, perplexity)).passed is passed


def test_the_verdict_says_rule_value_and_reason_as_the_status_has_them() -> None:
    gate = QuantizeGate(name="close", max_perplexity_increase_percent=2.5)
    assert judge(gate, output="int4", comparison=compared(10.0, 10.5)).told() == {
        "name": "close",
        "output": "int4",
        "rule": "maxPerplexityIncreasePercent 2.5",
        "value": "5",
        "passed": False,
        "message": "perplexity went from 10 to 10.5, by +5 %; 2.5 % is allowed",
    }


def test_an_increase_that_is_no_number_has_no_value() -> None:
    gate = QuantizeGate(name="close", max_perplexity_increase_percent=2.5)
    told = judge(gate, output="int4", comparison=compared(10.0, math.inf)).told()
    assert "value" not in told
    assert not told["passed"]
    assert "to inf" in told["message"]
