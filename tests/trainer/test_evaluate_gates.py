"""A gate passes when its rule holds, and never when it cannot be judged."""

import math
from collections.abc import Sequence
from typing import Any

import pytest

from kubetune_trainer.config import ComparedTo, Gate
from kubetune_trainer.evaluate.gates import Measured, Verdict, decimal, judge_pair, judge_value, paired_error

SETTINGS = {"num_fewshot": 0, "seed": 1234, "apply_chat_template": False}


def gate(**rule: Any) -> Gate:
    return Gate(name="g", task="words", metric="acc", **rule)


def compared(**rule: float) -> Gate:
    return gate(compared_to=ComparedTo(name="base", directory="file://base", **rule))


def measured(values: Sequence[Any], *, settings: dict[str, Any] = SETTINGS, aggregate: Any = None) -> Measured:
    samples = {(number, f"doc-{number}", "target"): value for number, value in enumerate(values)}
    value = aggregate(list(values)) if aggregate else sum(values) / len(values)
    return Measured(value=value, settings=settings, samples=samples, aggregate=aggregate)


@pytest.mark.parametrize(
    ("rule", "value", "passed"),
    [
        ({"at_least": 0.4}, 0.41, True),
        ({"at_least": 0.4}, 0.4, True),
        ({"at_least": 0.3}, 0.1 + 0.2, True),
        ({"at_least": 0.3}, 0.3 - 1e-12, True),
        ({"at_least": 0.4}, 0.39, False),
        ({"at_least": -1.0}, -0.5, True),
        ({"at_most": 12.0}, 12.0, True),
        ({"at_most": 12.0}, 12.1, False),
        ({"at_most": 12.0}, math.inf, False),
        ({"at_least": 0.0}, math.nan, False),
        ({"at_most": 12.0}, math.nan, False),
    ],
)
def test_a_bound_is_part_of_what_passes(rule: dict[str, float], value: float, passed: bool) -> None:
    assert judge_value(gate(**rule), value).passed is passed


def test_the_verdict_says_rule_value_and_reason() -> None:
    verdict = judge_value(gate(at_least=0.4), 0.35)
    assert (verdict.rule, verdict.value) == ("atLeast 0.4", 0.35)
    assert verdict.message == "acc of words is 0.35, which is not at least 0.4"
    assert judge_value(gate(at_most=12), 3.0).rule == "atMost 12"
    assert (
        judge_pair(compared(max_drop=0.01), measured([1, 0]), measured([1, 0])).rule == "comparedTo base maxDrop 0.01"
    )


def test_without_a_result_nothing_passes_and_the_results_are_named() -> None:
    verdict = judge_value(gate(at_least=0.0), None, known=["acc_norm of words with filter none"])
    assert (verdict.passed, verdict.value) == (False, None)
    assert verdict.message == "there is no acc of words; there are acc_norm of words with filter none"


TENS = [1.0] * 50 + [0.0] * 50


@pytest.mark.parametrize(
    ("rule", "ours", "passed"),
    [
        ({"max_drop": 0.01}, [1.0] * 49 + [0.0] * 51, True),
        ({"max_drop": 0.01}, [1.0] * 48 + [0.0] * 52, False),
        ({"max_drop": 0.0}, TENS, True),
        ({"max_drop": 0.0}, [1.0] * 60 + [0.0] * 40, True),
        ({"max_increase": 0.01}, [1.0] * 51 + [0.0] * 49, True),
        ({"max_increase": 0.01}, [1.0] * 52 + [0.0] * 48, False),
        ({"max_increase": 0.0}, [0.0] * 100, True),
    ],
)
def test_a_comparison_allows_a_drop_or_an_increase(rule: dict[str, float], ours: list[float], passed: bool) -> None:
    verdict = judge_pair(compared(**rule), measured(ours), measured(TENS))
    assert verdict.passed is passed
    assert verdict.difference == pytest.approx(sum(ours) / 100 - 0.5)


def test_the_error_of_a_difference_is_that_of_pairs() -> None:
    ours, theirs = measured([1, 1, 0, 1]), measured([1, 0, 0, 1])
    assert paired_error(ours, theirs) == pytest.approx(0.5 / math.sqrt(4))
    assert paired_error(measured(TENS), measured(TENS)) == 0.0, "the same answers, however uncertain each value is"
    assert paired_error(measured([1]), measured([0])) is None
    pairs = Measured(value=0.5, settings=SETTINGS, samples={(n, "d", "t"): (n, 2) for n in range(3)}, aggregate=None)
    assert paired_error(pairs, pairs) is None, "nobody knows how these make a value"


def test_the_error_of_what_is_no_mean_comes_from_drawing_samples_again() -> None:
    perplexity = lambda items: math.exp(-sum(items) / len(items))  # noqa: E731
    scores = [-1.0 - 0.01 * number for number in range(100)]
    ours, theirs = (measured([one + shift for one in scores], aggregate=perplexity) for shift in (0.0, -0.1))
    exact = perplexity(scores) * (1 - math.exp(0.1)) * (0.29 / 10)  # by the delta method
    assert paired_error(ours, theirs) == pytest.approx(abs(exact), rel=0.2)
    assert paired_error(ours, ours) == 0.0


@pytest.mark.parametrize(
    ("theirs", "words"),
    [
        (measured(TENS, settings=SETTINGS | {"num_fewshot": 5}), "num_fewshot is 0 here and 5 there"),
        (measured(TENS, settings=SETTINGS | {"dtype": "float32"}), "dtype is None here and 'float32' there"),
        (measured(TENS[:99]), "there are 100 samples here and 99 there"),
        (
            Measured(value=0.5, settings=SETTINGS, samples={(n, "other", "x"): 1 for n in range(100)}, aggregate=None),
            "100 of 100 samples are others",
        ),
    ],
)
def test_unlike_evaluations_are_not_compared(theirs: Measured, words: str) -> None:
    verdict = judge_pair(compared(max_drop=1.0), measured(TENS), theirs)
    assert (verdict.passed, verdict.difference) == (False, None)
    assert verdict.message == f"acc of words cannot be compared with EvalJob base: {words}"


def test_a_verdict_is_no_longer_than_a_status_may_be() -> None:
    known = [f"acc of task mmlu_{number} with filter none" for number in range(200)]
    said = judge_value(gate(at_least=0.4), None, known=known).message
    assert said.startswith("there is no acc of words; there are acc of task mmlu_0")
    assert len(said) == 1024
    long = measured([1.0], settings=SETTINGS | {"systemInstruction": "Think. " * 1000})
    said = judge_pair(compared(max_drop=0.1), measured([1.0]), long).message
    assert "systemInstruction is None here and 'Think. " in said
    assert len(said) < 400


def test_infinite_values_do_not_pass() -> None:
    infinite = Measured(value=math.inf, settings=SETTINGS, samples=measured(TENS).samples, aggregate=None)
    assert not judge_pair(compared(max_drop=1.0), infinite, measured(TENS)).passed
    assert not judge_pair(compared(max_increase=1.0), infinite, infinite).passed


def test_the_status_gets_decimal_strings_and_nothing_that_is_not_there() -> None:
    told = judge_value(gate(at_least=0.4), 1 / 3).told()
    assert told["value"] == "0.333333"
    assert told.keys() == Verdict.model_fields.keys() - {"difference", "stderr"}


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.41, "0.41"), (1 / 3, "0.333333"), (1234567.0, "1234570"), (0.0, "0"), (0.00001234, "0.00001234"),
     (5.6479803e32, "5.64798e+32"), (math.inf, "inf"), (-0.5, "-0.5")],
)  # fmt: skip
def test_numbers_are_written_with_six_digits(value: float, text: str) -> None:
    assert decimal(value) == text
