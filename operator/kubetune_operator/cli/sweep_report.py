"""What a sweep found out: the jobs in the order of a metric, as a table, as a page and as a plot."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from kubetune_operator.cli.sweep import Run, told
from kubetune_operator.errors import SpecError

LOWER_IS_BETTER: Final = {"validationLoss": True, "loss": True, "peakMemoryBytes": True, "tokensPerSecond": False}
"""The metrics that a job's status has, and which way they are good."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """What became of a job.

    Attributes:
        run: The job.
        state: Its state; empty before it is created.
        progress: `status.progress`, as it stands there.
        message: Why it waits or has failed.
        output: URI of its first output.
    """

    run: Run
    state: str = ""
    progress: Mapping[str, Any]
    message: str = ""
    output: str = ""

    def value(self, metric: str) -> float | None:
        """The metric, None as long as there is none."""
        found = self.measured(metric)
        return float(found) if found is not None else None

    def measured(self, metric: str) -> Any:
        """The metric as the progress has it; a job that stops early leaves the weights of its best validation."""
        best = self.progress.get("bestValidationLoss") if metric == "validationLoss" else None
        return best if best is not None else self.progress.get(metric)


def metric_for(run: Run, *, wanted: str | None) -> str:
    """The metric to rank by: the one that is wanted, otherwise the best that a job of this kind has.

    Raises:
        SpecError: There is no such metric, or the jobs do not validate.
    """
    validates = run.job.spec.dataset.validation is not None
    if wanted is None:
        return "validationLoss" if validates else "loss"
    if wanted not in LOWER_IS_BETTER:
        raise SpecError("kubetune sweep", problems=[f"--metric {wanted}: must be one of {', '.join(LOWER_IS_BETTER)}"])
    if wanted == "validationLoss" and not validates:
        raise SpecError("kubetune sweep", problems=["--metric validationLoss needs spec.dataset.validation"])
    return wanted


def ranked(results: Sequence[Result], *, metric: str) -> list[Result]:
    """The jobs that are complete, best first; then the others in their order."""

    def place(result: Result) -> tuple[bool, float]:
        value = result.value(metric)
        if result.state != "Complete" or value is None:
            return True, 0.0
        return False, value if LOWER_IS_BETTER[metric] else -value

    return sorted(results, key=place)


def cells(result: Result, *, metric: str, fields: Sequence[str]) -> list[str]:
    """A job as a row: its name, its values, its state, the metric."""
    values = [str(result.run.values[field]) for field in fields]
    return [result.run.name, *values, result.state or "waiting", _shown(result.measured(metric))]


def _shown(value: Any) -> str:
    """A metric as people read it."""
    return f"{value:.6g}" if isinstance(value, float) else str(value if value is not None else "")


def page(results: Sequence[Result], *, metric: str) -> str:
    """The Markdown page of a sweep."""
    fields = list(results[0].run.values)
    rows = [[*cells(result, metric=metric, fields=fields), result.output] for result in ranked(results, metric=metric)]
    header = ["job", *fields, "state", metric, "output"]
    lines = [f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *rows)]
    best = ranked(results, metric=metric)[0]
    title = f"# Sweep of {', '.join(fields)}"
    found = (
        f"Best {metric}: {_shown(best.measured(metric))}, by {best.run.name} ({told(best.run.values)})."
        if best.state == "Complete" and best.value(metric) is not None
        else f"No job is complete with a {metric}."
    )
    return "\n".join([title, "", found, "", *lines, ""])


def draw(results: Sequence[Result], *, metric: str, path: Path) -> None:
    """Write the plot: the metric over the first field that was swept, a line for each combination of the others.

    Raises:
        SpecError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure  # noqa: PLC0415 (of the extra `plot`)
    except ImportError as error:
        raise SpecError(str(path), problems=["the plot needs matplotlib: pip install 'kubetune[plot]'"]) from error
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    first, *others = results[0].run.values
    lines: dict[str, list[tuple[Any, float]]] = {}
    for result in results:
        value = result.value(metric)
        if result.state == "Complete" and value is not None:
            label = told({field: result.run.values[field] for field in others})
            lines.setdefault(label, []).append((result.run.values[first], value))
    numeric = all(_is_number(x) for points in lines.values() for x, _ in points)
    for label, points in lines.items():
        xs = [float(x) if numeric else str(x) for x, _ in points]
        axes.plot(xs, [y for _, y in points], marker="o", label=label or None)
    if numeric and _spans_magnitudes([float(x) for points in lines.values() for x, _ in points]):
        axes.set_xscale("log")
    axes.set_xlabel(first)
    axes.set_ylabel(metric)
    axes.grid(visible=True, alpha=0.3)
    if others and lines:
        axes.legend()
    figure.savefig(path)


def _is_number(value: Any) -> bool:
    try:
        float(value)
    except (TypeError, ValueError):
        return False
    return True


def _spans_magnitudes(values: Sequence[float]) -> bool:
    return bool(values) and min(values) > 0 and max(values) / min(values) >= 10
