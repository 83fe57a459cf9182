"""`kubetune estimate`: what a manifest's training needs in memory, by part, and what would need less."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from kubetune_operator.api.finetunejob import FineTuneJob
from kubetune_operator.cli.bundle import Bundle
from kubetune_operator.cli.local import check_batch, local_config, local_environment, require_trainer
from kubetune_operator.errors import SpecError
from kubetune_operator.estimate import parse_quantity
from kubetune_operator.names import CONFIG_FILE
from kubetune_operator.render.config import dump_config

_PURPOSE = "kubetune estimate"
_GIB = 2**30


def estimate(bundle: Bundle, *, device_memory: str | None, suggest: bool) -> int:
    """Print what one process of a FineTuneJob needs; returns 0, or 1 where that is more than a device has.

    Raises:
        SpecError: The job trains nothing, the model's config.json cannot be read, or the size is none.
    """
    if not isinstance(bundle.job, FineTuneJob):
        raise SpecError(bundle.title, problems=[f"{_PURPOSE} needs a FineTuneJob, got {bundle.job.kind}"])
    check_batch(bundle)
    available = None if device_memory is None else _parse_size(device_memory)
    if suggest and available is None:
        raise SpecError(_PURPOSE, problems=["--suggest needs --device-memory, for example 24GiB"])
    require_trainer(_PURPOSE)
    own, *milder = _ask(bundle, suggest=suggest)
    console = Console()
    console.print(_parts(own), soft_wrap=True)
    if own["hostBytes"]:
        console.print(f"and in the host's memory {_gibibytes(own['hostBytes'])}", highlight=False, soft_wrap=True)
    if available is None:
        return 0
    fits = own["bytes"] <= available
    verdict = "fits" if fits else "does not fit"
    console.print(f"{bundle.title} {verdict} a device of {_gibibytes(available)}", highlight=False, soft_wrap=True)
    if suggest and not fits:
        console.print(_suggestions(milder, available=available), soft_wrap=True)
    return 0 if fits else 1


def _parse_size(text: str) -> int:
    """Read a size: 24GiB, 24Gi, 24GB, 24G or bytes."""
    try:
        size = parse_quantity(text.strip().removesuffix("B"))
    except (ArithmeticError, KeyError, ValueError):  # no number, no such unit, NaN or infinite
        size = 0
    if not 0 < size < 2**63:
        raise SpecError(_PURPOSE, problems=[f"--device-memory must be a size such as 24GiB or 80GB, got {text!r}"])
    return size


def _ask(bundle: Bundle, *, suggest: bool) -> list[dict[str, Any]]:
    """Have the trainer estimate: its process alone knows models and torch."""
    compute = bundle.job.spec.compute
    per_node = compute.accelerator.per_node if compute and compute.accelerator else 1
    config = local_config(bundle, processes=per_node)
    config["run"]["num_nodes"] = compute.nodes if compute else 1
    with tempfile.TemporaryDirectory(prefix="kubetune-estimate-") as folder:
        path = Path(folder) / CONFIG_FILE
        path.write_text(dump_config(config), encoding="utf-8")
        environment = os.environ | local_environment(bundle, os.environ, folder=Path(folder))
        wanted = [*["--suggest"] * suggest, *["--offload"] * (compute is not None and compute.accelerator is not None)]
        command = [sys.executable, "-P", "-m", "kubetune_trainer.fit", "--config", str(path), *wanted]
        ran = subprocess.run(command, env=environment, check=False, capture_output=True, text=True)
    if ran.returncode:
        said = ran.stderr.strip().splitlines()
        raise SpecError(bundle.title, problems=said[-2:] or [f"the trainer ended with exit code {ran.returncode}"])
    return [json.loads(line) for line in ran.stdout.splitlines()]


def _parts(found: Mapping[str, Any]) -> Table:
    """The parts at the moment of a step when most is held, and their sum."""
    table = Table("PART", "PER DEVICE", box=None, pad_edge=False)
    for name, size in found["parts"].items():
        table.add_row(name, _gibibytes(size))
    table.add_row("total", _gibibytes(found["bytes"]))
    return table


def _suggestions(found: Sequence[Mapping[str, Any]], *, available: int) -> Table:
    """What would need less, as fields of the manifest."""
    table = Table("CHANGE IN SPEC", "PER DEVICE", "IN THE HOST", "FITS", box=None, pad_edge=False)
    for each in found:
        changes = ", ".join(f"{_field(name)}: {value}" for name, value in each["changes"].items())
        host = _gibibytes(each["hostBytes"]) if each["hostBytes"] else ""
        table.add_row(changes, _gibibytes(each["bytes"]), host, "yes" if each["bytes"] <= available else "no")
    return table


def _field(name: str) -> str:
    """A config's field as the manifest spells it."""
    first, *rest = name.split("_")
    return first + "".join(part.capitalize() for part in rest)


def _gibibytes(size: int) -> str:
    return f"{size / _GIB:.2f} GiB"
