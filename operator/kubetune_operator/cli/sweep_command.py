"""The course of `kubetune sweep`: plan, run, rank, write."""

from collections.abc import Sequence
from pathlib import Path

import typer
from rich.console import Console

from kubetune_operator.cli.bundle import load_bundle
from kubetune_operator.cli.sweep import plan
from kubetune_operator.cli.sweep_follow import in_cluster, on_this_machine, showing
from kubetune_operator.cli.sweep_report import draw, metric_for, page
from kubetune_operator.errors import SpecError


def sweep(
    file: Path,
    *,
    settings: Sequence[str],
    name: str | None,
    namespace: str | None,
    metric: str | None,
    parallel: int | None,
    here: bool,
    folder: Path,
) -> int:
    """Run a sweep and write what it found out; returns the exit code, 1 when a job has failed.

    Args:
        file: The manifest.
        settings: What stood after each `--set`.
        name: Which FineTuneJob, where the file holds several.
        namespace: Where the jobs are made; None is the manifest's, or the kubeconfig's.
        metric: What to rank by; None is the loss on the validation data, where there is any.
        parallel: At most so many unfinished jobs at once.
        here: Run on this machine, without a cluster.
        folder: Where the page and the plot go.

    Raises:
        SpecError: The user's fault.
        ClusterError: The cluster's.
    """
    if here and (parallel is not None or namespace is not None):
        raise SpecError("kubetune sweep", problems=["--local runs one job after the other, in no namespace"])
    bundle = load_bundle(file, name=name)
    runs = plan(bundle, settings=settings)
    chosen = metric_for(runs[0], wanted=metric)
    if not folder.is_dir():
        raise SpecError("kubetune sweep", problems=[f"--output {folder}: is no folder"])
    base = folder / f"{bundle.job.metadata.name}-sweep"
    with showing(Console(), metric=chosen, table=not here) as show:
        if here:
            results = on_this_machine(runs, bundle, memory=base.with_suffix(".json"), show=show)
        else:
            results = in_cluster(runs, namespace=namespace, parallel=parallel, show=show)
    text = page(results, metric=chosen)
    base.with_suffix(".md").write_text(text, encoding="utf-8")
    typer.echo(f"\n{text}\nwrote {base.with_suffix('.md')}")
    try:
        draw(results, metric=chosen, path=base.with_suffix(".svg"))
    except SpecError as error:
        typer.echo(f"note: {error}", err=True)
    else:
        typer.echo(f"wrote {base.with_suffix('.svg')}")
    return int(any(result.state != "Complete" for result in results))
