"""What the tables share: a process per side and round, in turn, calibrated, in an environment of its own if need be.

A table is one file here. It defines sides, rows and targets and ends in `run_table(TABLE)`:

    python benchmarks/lora.py               every row, all sides in turn (A B A B), then RESULTS.md and one JSON line
    python benchmarks/lora.py --side NAME   one side once, its settings on stdin, one JSON line

On a machine that is never quiet, `--drift 0.25` counts rounds that differ by more, and `--clock cpu --threads 1`
measures the time that the process had a core instead of the time on the wall; the section says so. Only the standard
library is imported at the top: peers' environments read this file too.
"""

import argparse
import contextlib
import datetime as dt
import hashlib
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

ROOT: Final = Path(__file__).parent.parent
CLOCK_VARIABLE: Final = "KUBETUNE_BENCH_CLOCK"
CACHE: Final = Path(os.environ.get("KUBETUNE_CACHE") or Path.home() / ".cache" / "kubetune")
RESULTS: Final = Path(__file__).parent / "RESULTS.md"
DRIFT_ALLOWED: Final = 0.10
"""A round is void if the calibration matmul's time differs by more than this between its processes."""
VOID_ALLOWED: Final = 4
"""So many rounds of a row may be void."""
LOSS_TOLERANCE: Final = 2e-4
"""By how much the sides' first losses may differ, relative: sides that do other work are not compared."""
BF16_LOSS_TOLERANCE: Final = 1e-2
"""The same in bf16, of which each side rounds other numbers."""
WITHOUT_BF16: Final = (
    " The same on a CPU without bf16 arithmetic: all is computed in fp32, whatever a row is named. What is equal on "
    "all sides stands with the table above. Targets were set for bf16: in fp32 weights and activations, which every "
    "side needs alike, are twice the bytes (of sft, by the estimator, 275 and 690 MiB become 531 and 1,381), so that "
    "ratios of memory come closer to 1; and products of matrices, which all sides leave to the same library, take more "
    "of a step, so that ratios of speed do too."
)

Settings = dict[str, Any]
Measures = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Side:
    """One of those compared."""

    run: Callable[[Settings], Measures]
    """Does the work once and returns what it measured; imports its libraries itself."""
    environment: str | None = None
    """A file in peers/ (without .txt) whose packages it runs with; unset is this project's environment."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One setting, the same for all its sides."""

    name: str
    settings: Settings
    sides: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Ratio:
    """Ours divided by a peer's, and what it should be."""

    name: str
    row: int
    """Number of the row."""
    measure: str
    peer: str
    """The side to divide by."""
    target: str
    """As in `>= 1.3`."""
    side: str = "ours"
    """The side that is divided."""


@dataclass(frozen=True, kw_only=True)
class Table:
    """One benchmark."""

    name: str
    file: str
    """`__file__` of the table."""
    title: str
    notes: str
    """What a reader must know: what is equal, what is not, which limits there are."""
    sides: Mapping[str, Side]
    rows: Sequence[Row]
    ratios: Sequence[Ratio]
    rounds: int = 3
    drift_allowed: float = DRIFT_ALLOWED
    """More where a round has so many processes that no machine stays the same for all of them."""
    derive: Callable[[Row, Mapping[str, Measures]], dict[str, Measures]] = field(default=lambda _, best: dict(best))
    """Adds measures that follow from several sides."""
    same_without_bf16: bool = False
    """Whether a CPU without bf16 arithmetic does the same work, so that the notes hold there too."""
    clocks: tuple[str, ...] = ("wall", "cpu")
    """Those that it can be measured by."""


def run_table(table: Table) -> None:
    """Runs a table, or one side of it, as the command line says."""
    parser = argparse.ArgumentParser(description=table.title)
    parser.add_argument("--side", choices=table.sides, help="run one side once, with the settings on stdin")
    parser.add_argument("--rounds", type=int, default=table.rounds)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--clock", choices=table.clocks, default="wall", help="cpu: on a machine that is not quiet")
    parser.add_argument("--drift", type=float, default=table.drift_allowed, help="of calibrations that counts")
    options = parser.parse_args()
    if options.side:
        print(json.dumps(run_side(table.sides[options.side], json.load(sys.stdin))))
        return
    os.environ[CLOCK_VARIABLE] = options.clock
    best = [
        run_row(table, row, rounds=options.rounds, threads=options.threads, drift_allowed=options.drift)
        for row in table.rows
    ]
    ratios = find_ratios(table, best)
    write_section(table, best, ratios, options)
    print(json.dumps({"table": table.name, **ratios}))


def run_side(side: Side, settings: Settings) -> Measures:
    """Runs a side in this process; whatever it prints goes to stderr."""
    import torch

    torch.set_num_threads(settings["threads"])
    with contextlib.redirect_stdout(sys.stderr):
        before = calibrate()
        measures = side.run(settings)
        return {**measures, "calibration": [before, calibrate()], "torch": torch.__version__}


def stored_dtype(settings: Settings) -> Any:
    """Returns the type of the weights that a setting's precision leaves frozen."""
    import torch

    return torch.float32 if settings["precision"] == "FP32" else torch.bfloat16


def precision(wanted: str) -> str:
    """Returns the precision that a row is measured in: fp32 on a CPU without bf16 arithmetic, where bf16 is slow."""
    return wanted if has_bf16() else "FP32"


def has_bf16() -> bool:
    """Whether this CPU has bf16 arithmetic."""
    return bool({"avx512_bf16", "amx_bf16", "bf16"} & set(Path("/proc/cpuinfo").read_text().split()))


def now() -> float:
    """Returns the seconds of the clock that is measured by."""
    return time.process_time() if os.environ.get(CLOCK_VARIABLE) == "cpu" else time.perf_counter()


def calibrate() -> float:
    """Returns the seconds of a matmul that every process does the same."""
    import torch

    matrix = torch.ones(768, 768)
    times = []
    for _ in range(100):
        began = now()
        torch.mm(matrix, matrix)
        times.append(now() - began)
    return min(times)


def run_row(table: Table, row: Row, *, rounds: int, threads: int, drift_allowed: float) -> dict[str, Measures]:
    """Runs all sides in turn until enough rounds count, and returns each side's best."""
    counted: list[dict[str, Measures]] = []
    for number in range(rounds + VOID_ALLOWED):
        found = {name: start_side(table, name, {**row.settings, "threads": threads}) for name in row.sides}
        drift = drift_of(found.values())
        void = drift > drift_allowed
        print(f"{row.name}: round {number + 1}, drift {drift:.0%}{', void' if void else ''}: {found}", file=sys.stderr)
        if not void:
            counted.append(found)
        if len(counted) == rounds:
            break
    if not counted:
        raise SystemExit(f"{table.name}, {row.name}: every round is void; the machine is too busy to measure")
    check_losses(row, counted[0])
    best = {name: best_of([found[name] for found in counted]) for name in row.sides}
    return table.derive(row, best)


def start_side(table: Table, name: str, settings: Settings) -> Measures:
    """Runs one side in a process of its own."""
    threads = str(settings["threads"])
    environment = {**os.environ, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "HF_HUB_OFFLINE": "1"}
    environment |= {"TQDM_DISABLE": "1", "TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [python_of(table.sides[name].environment), table.file, "--side", name],
        input=json.dumps(settings),
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise SystemExit(f"{table.name}: side {name} failed with exit code {done.returncode}:\n{done.stderr[-4000:]}")
    measures: Measures = json.loads(done.stdout.splitlines()[-1])
    return measures


def python_of(environment: str | None) -> str:
    """Returns the interpreter of a peer's environment, which is made the first time."""
    if environment is None:
        return sys.executable
    requirements = Path(__file__).parent / "peers" / f"{environment}.txt"
    key = hashlib.sha256(requirements.read_bytes()).hexdigest()[:12]
    folder = CACHE / "bench" / key
    python = folder / "bin" / "python"
    if not (folder / ".complete").exists():
        print(f"== environment of {environment} into {folder}", file=sys.stderr)
        uv = str(CACHE / "uv" / "bin" / "uv")
        subprocess.run([uv, "venv", "--quiet", "--clear", "--python", "3.11", folder], check=True)
        install = [uv, "pip", "install", "--quiet", "--compile-bytecode", "--python", python]
        subprocess.run([*install, "--requirement", requirements], check=True)
        (folder / ".complete").touch()
    return str(python)


def drift_of(found: Any) -> float:
    """Returns by how much the slowest calibration of a round took longer than the fastest."""
    times = [seconds for measures in found for seconds in measures["calibration"]]
    return max(times) / min(times) - 1


def check_losses(row: Row, found: Mapping[str, Measures]) -> None:
    """Refuses to compare sides whose first loss differs."""
    losses = {name: measures["loss"] for name, measures in found.items() if "loss" in measures}
    tolerance = LOSS_TOLERANCE if row.settings.get("precision", "FP32") == "FP32" else BF16_LOSS_TOLERANCE
    if losses and max(losses.values()) - min(losses.values()) > tolerance * max(losses.values()):
        raise SystemExit(f"{row.name}: the sides do not compute the same loss: {losses}")


def best_of(rounds: Sequence[Measures]) -> Measures:
    """Returns the best of each number and, under `spread`, by how much the worst was worse."""
    best: Measures = {"spread": {}}
    for name, value in rounds[0].items():
        if not isinstance(value, float | int):
            continue
        values = [measures[name] for measures in rounds]
        best[name] = max(values) if name.endswith("PerSecond") else min(values)
        best["spread"][name] = (max(values) - min(values)) / best[name] if best[name] else 0.0
    return {**best, "rounds": len(rounds)}


def find_ratios(table: Table, best: Sequence[Mapping[str, Measures]]) -> dict[str, float]:
    """Returns all ratios of a table."""
    return {
        ratio.name: round(best[ratio.row][ratio.side][ratio.measure] / best[ratio.row][ratio.peer][ratio.measure], 3)
        for ratio in table.ratios
    }


def write_section(
    table: Table, best: Sequence[Mapping[str, Measures]], ratios: Mapping[str, float], options: argparse.Namespace
) -> None:
    """Puts a table's section into RESULTS.md, in the place of an older one from a CPU of the same kind."""
    text = RESULTS.read_text() if RESULTS.exists() else "# Results\n"
    head, *sections = text.split("\n## ")
    kept = {section.split("\n")[0]: section.rstrip() for section in sections}
    kept[section_name(table)] = section_of(table, best, ratios, options)
    RESULTS.write_text("\n\n## ".join([head.rstrip(), *(kept[name] for name in sorted(kept))]) + "\n")


def section_name(table: Table) -> str:
    """Returns a section's title: where bf16 has to be left out other work is done, so that it has one of its own."""
    return table.name if has_bf16() else f"{table.name}, without bf16 arithmetic"


def section_of(
    table: Table, best: Sequence[Mapping[str, Measures]], ratios: Mapping[str, float], options: argparse.Namespace
) -> str:
    """Returns a table as Markdown."""
    lines = [
        section_name(table),
        "",
        table.title + (f" {table.notes}" if has_bf16() or table.same_without_bf16 else WITHOUT_BF16),
        "",
        f"`make bench TABLE={table.name}`; {machine(options)}; calibration within {options.drift:.0%}.",
        "",
    ]
    for row, found in zip(table.rows, best, strict=True):
        names = [name for name in next(iter(found.values())) if name not in {"spread", "rounds"}]
        lines += [f"**{row.name}**, best of {next(iter(found.values()))['rounds']} (spread)", ""]
        lines += [f"| side | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
        lines += [
            f"| {side} | {' | '.join(shown(measures, name) for name in names)} |" for side, measures in found.items()
        ]
        lines += [""]
    lines += ["| ratio | found | target | |", "|---|---|---|---|"]
    for ratio in table.ratios:
        value = ratios[ratio.name]
        lines.append(
            f"| {ratio.name} | {value} | {ratio.target} | {'met' if meets(value, ratio.target) else 'missed'} |"
        )
    return "\n".join(lines)


def shown(measures: Measures, name: str) -> str:
    """Returns a measure with its spread."""
    value, spread = measures.get(name), measures["spread"].get(name)
    if value is None:
        return ""
    number = f"{value / 2**20:.0f} MiB" if name.endswith("Bytes") else f"{value:.4g}"
    return f"{number} ({spread:.0%})" if spread is not None else number


def meets(value: float, target: str) -> bool:
    """Whether a ratio is what was wanted."""
    sign, bound = target.split()
    return value >= float(bound) if sign == ">=" else value <= float(bound)


def machine(options: argparse.Namespace) -> str:
    """Returns where and when this was measured."""
    import torch

    lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.split(": ")[1] for line in lines if line.startswith("model name")), platform.machine())
    today = dt.datetime.now(tz=dt.UTC).date().isoformat()
    capability = torch.backends.cpu.get_cpu_capability()
    clock = "wall clock" if options.clock == "wall" else "clock of the process's CPU time, since the machine was busy"
    cores = len(os.sched_getaffinity(0))
    return f"{cpu}, {cores} cores, {capability}; {options.threads} threads, {clock}; torch {torch.__version__}, {today}"


def resident_bytes() -> int:
    """Returns what this process holds in memory now; taken after the imports it is the baseline."""
    return _status("VmRSS")


def peak_bytes() -> int:
    """Returns the most that this process has held in memory, or since `forget_peak`."""
    return _status("VmHWM")


def forget_peak() -> None:
    """Makes the peak what is held now."""
    Path("/proc/self/clear_refs").write_text("5")


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def reference_pages() -> dict[str, str]:
    """Texts that stay the same from one tree to the next: Python's own reference by topic, as `help` shows it."""
    from pydoc_data.topics import topics

    return dict(sorted(topics.items()))


def smollm2() -> str:
    """Returns the folder of SmolLM2-135M-Instruct, which is made the first time."""
    folder = CACHE / "models" / "smollm2-135m-instruct"
    if not (folder / "model.safetensors").exists():
        subprocess.run([sys.executable, ROOT / "examples" / "fetch_smollm2.py", folder], check=True)
    return str(folder)
