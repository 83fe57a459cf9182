"""The verdict of a gate: one value against a bound, or two evaluations of the same samples against each other.

Pure: numbers in, a verdict out. A gate that cannot be judged does not pass, and says why.
"""

import math
import random
import reprlib
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, Final

from pydantic import BaseModel, ConfigDict

from kubetune_trainer.config import ComparedTo, Gate

TOLERANCE: Final = 1e-9
"""A difference that is nothing but rounding decides no gate: 0.41 - 0.40 is more than 0.01 in binary."""
MESSAGE_LENGTH: Final = 1024
"""What a status takes of a sentence."""
DRAWS: Final = 200
"""Samples are drawn again so many times for the error of what is no mean."""

_SHORT: Final = reprlib.Repr()
_SHORT.maxstring = 200

SampleKey = tuple[int, str, str]
"""Number of the sample in its task, and digests of its question and of its right answer."""
Aggregate = Callable[[Sequence[Any]], float]


class Verdict(BaseModel):
    """What became of a gate."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    """The gate's name."""
    task: str
    """As in the gate."""
    metric: str
    """As in the gate."""
    filter: str
    """As in the gate."""
    rule: str
    """The gate's rule in words, as in atLeast 0.4."""
    value: float | None
    """The metric; None where there is no such result."""
    passed: bool
    """Whether the rule holds."""
    difference: float | None = None
    """The value minus that of the other evaluation."""
    stderr: float | None = None
    """Standard error of the difference, the samples taken in pairs."""
    message: str
    """One sentence for people."""

    def told(self) -> dict[str, Any]:
        """Return it as the status has it: numbers are decimal strings, and what is not there is left out."""
        numbers = {name: getattr(self, name) for name in ("value", "difference", "stderr")}
        return self.model_dump(exclude=set(numbers)) | {
            name: decimal(number) for name, number in numbers.items() if number is not None
        }


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One metric of one evaluation, with what it was computed from."""

    value: float
    """The metric."""
    settings: Mapping[str, Any]
    """What decides the numbers beside the model."""
    samples: Mapping[SampleKey, Any]
    """Each sample's own value: a number, or what the aggregation takes."""
    aggregate: Aggregate | None
    """Makes the metric of the samples' values; None is their mean."""


def decimal(value: float) -> str:
    """Return six significant digits, without an exponent where that stays readable."""
    readable = math.isfinite(value) and 1e-9 < abs(value) < 1e15
    return format(Decimal(f"{value:.6g}"), "f") if readable else f"{value:.6g}"


def rule_of(gate: Gate) -> str:
    """Return a gate's rule in words."""
    if gate.at_least is not None:
        return f"atLeast {gate.at_least:g}"
    if gate.at_most is not None:
        return f"atMost {gate.at_most:g}"
    other = _other(gate)
    bound = f"maxDrop {other.max_drop:g}" if other.max_drop is not None else f"maxIncrease {other.max_increase:g}"
    return f"comparedTo {other.name} {bound}"


def judge_value(gate: Gate, value: float | None, *, known: Sequence[str] = ()) -> Verdict:
    """Judge a gate with a fixed bound.

    Args:
        gate: With at_least or at_most.
        value: The metric; None where there is no such result.
        known: The results that there are, for the message.
    """
    if value is None:
        return unjudged(gate, f"there is no {_what(gate)}; there are {', '.join(known) or 'no results'}")
    if gate.at_least is not None:
        passed = value >= gate.at_least - TOLERANCE
    else:
        passed = gate.at_most is not None and value <= gate.at_most + TOLERANCE
    verb = "is" if passed else "is not"
    bound = f"at least {gate.at_least:g}" if gate.at_least is not None else f"at most {gate.at_most:g}"
    return _verdict(gate, value=value, passed=passed, message=f"{_what(gate)} is {value:.6g}, which {verb} {bound}")


def judge_pair(gate: Gate, ours: Measured, theirs: Measured) -> Verdict:
    """Judge a gate against another evaluation, sample by sample; different samples or settings do not pass."""
    other = _other(gate)
    if unlike := differences(ours, theirs):
        message = f"{_what(gate)} cannot be compared with EvalJob {other.name}: {'; '.join(unlike)}"
        return unjudged(gate, message, value=ours.value)
    difference = ours.value - theirs.value
    stderr = paired_error(ours, theirs)
    if other.max_drop is not None:
        passed, allowed = -difference <= other.max_drop + TOLERANCE, f"may drop by {other.max_drop:g}"
    else:
        passed = other.max_increase is not None and difference <= other.max_increase + TOLERANCE
        allowed = f"may rise by {other.max_increase:g}"
    if not math.isfinite(difference):
        passed = False
    error = "" if stderr is None else f" (standard error {stderr:.4g})"
    message = (
        f"{_what(gate)} is {ours.value:.6g}, that of EvalJob {other.name} {theirs.value:.6g}: "
        f"a difference of {difference:+.6g}{error}, and it {allowed}"
    )
    return _verdict(gate, value=ours.value, passed=passed, difference=difference, stderr=stderr, message=message)


def unjudged(gate: Gate, message: str, *, value: float | None = None) -> Verdict:
    """Return the verdict of a gate that cannot be judged: it does not pass."""
    return _verdict(gate, value=value, passed=False, message=message)


def differences(ours: Measured, theirs: Measured) -> list[str]:
    """Return what keeps two evaluations from being compared, in words; empty when nothing does."""
    found = [
        f"{name} is {_SHORT.repr(ours.settings.get(name))} here and {_SHORT.repr(theirs.settings.get(name))} there"
        for name in sorted(ours.settings.keys() | theirs.settings.keys())
        if ours.settings.get(name) != theirs.settings.get(name)
    ]
    if len(ours.samples) != len(theirs.samples):
        found.append(f"there are {len(ours.samples)} samples here and {len(theirs.samples)} there")
    elif ours.samples.keys() != theirs.samples.keys():
        number = len(ours.samples.keys() - theirs.samples.keys())
        found.append(f"{number} of {len(ours.samples)} samples are others")
    return found


def paired_error(ours: Measured, theirs: Measured) -> float | None:
    """Return the standard error of the difference between two metrics of the same samples; None where it is unknown.

    Of means it is that of the mean of the samples' differences; of anything else it is found by drawing samples again
    (Efron 1979), the same ones for both.
    """
    keys = sorted(ours.samples)
    if len(keys) < 2:
        return None
    pairs = [(ours.samples[key], theirs.samples[key]) for key in keys]
    if ours.aggregate is None or theirs.aggregate is None:
        try:
            return statistics.stdev(float(one) - float(other) for one, other in pairs) / math.sqrt(len(pairs))
        except TypeError:  # values of a task's own aggregation, of which the record has the source alone
            return None
    generator = random.Random(0)  # noqa: S311 (statistics)
    found = []
    for _ in range(DRAWS):
        drawn = generator.choices(pairs, k=len(pairs))
        found.append(ours.aggregate([one for one, _ in drawn]) - theirs.aggregate([other for _, other in drawn]))
    return statistics.stdev(found) if all(map(math.isfinite, found)) else None


def _other(gate: Gate) -> ComparedTo:
    assert gate.compared_to is not None
    return gate.compared_to


def _what(gate: Gate) -> str:
    return f"{gate.metric} of {gate.task}" + ("" if gate.filter == "none" else f" with filter {gate.filter}")


def _verdict(gate: Gate, **found: Any) -> Verdict:
    said: str = found.pop("message")
    message = said if len(said) <= MESSAGE_LENGTH else f"{said[: MESSAGE_LENGTH - 1]}…"
    return Verdict(
        name=gate.name,
        task=gate.task,
        metric=gate.metric,
        filter=gate.filter,
        rule=rule_of(gate),
        message=message,
        **found,
    )
