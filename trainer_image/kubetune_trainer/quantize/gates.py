"""The verdict of a gate on an output. Pure: numbers in, a verdict out. What cannot be judged does not pass."""

import math
from typing import Any, Final

from pydantic import BaseModel, ConfigDict

from kubetune_trainer.config import QuantizeGate
from kubetune_trainer.evaluate.gates import decimal
from kubetune_trainer.quantize.verify import Comparison

TOLERANCE: Final = 1e-9
"""A difference that is nothing but rounding decides no gate."""


class QuantizeVerdict(BaseModel):
    """What became of a gate on one output."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    """The gate's name."""
    output: str
    """The output that was judged."""
    rule: str
    """The gate's rule in words, as in maxPerplexityIncreasePercent 2."""
    value: float | None
    """The increase in percent; None where it is no number."""
    passed: bool
    """Whether the rule holds."""
    message: str
    """One sentence for people."""

    def told(self) -> dict[str, Any]:
        """Return it as the status has it: numbers are decimal strings, and what is not there is left out."""
        value = {} if self.value is None else {"value": decimal(self.value)}
        return self.model_dump(exclude={"value"}) | value


def judge(gate: QuantizeGate, *, output: str, comparison: Comparison) -> QuantizeVerdict:
    """Judge one output.

    Args:
        gate: What it must hold.
        output: Its name.
        comparison: What was found when it was compared with its source.
    """
    limit, increase = gate.max_perplexity_increase_percent, comparison.perplexity_increase_percent
    known = math.isfinite(increase)
    passed = known and increase <= limit + TOLERANCE
    message = (
        f"perplexity went from {comparison.source_perplexity:.4g} to {comparison.perplexity:.4g}, "
        f"by {increase:+.3g} %; {limit:g} % is allowed"
    )
    return QuantizeVerdict(
        name=gate.name,
        output=output,
        rule=f"maxPerplexityIncreasePercent {limit:g}",
        value=increase if known else None,
        passed=passed,
        message=message,
    )
