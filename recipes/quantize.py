"""Quantize a language model: write it in smaller forms, load each again, and measure what it costs.

    python recipes/quantize.py --config recipes/configs/smollm2_int8.yaml verify.samples=8
    kubetune run FILE     # a QuantizeJob, as in examples/quantize.yaml

Features: CompressedTensors, GGUF, TorchAO and ExecuTorch; weights rounded by data (GPTQ); an adapter merged first; each
output loaded again and compared with the model; gates on what it costs.

The script reads from top to bottom: `main` reads the config, `quantize` is the run (get the model, make and measure
each output, judge them, say where they come from), and what follows are its parts. Clone it and change it: `kubetune
recipes cp quantize my_quantize.py`.

It is one process. A run can be killed at any moment and started again with the same command: outputs that are finished
are kept, the others are made again.
"""

import argparse
import contextlib
import json
import shutil
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from kubetune_trainer.config import QuantizeConfig, QuantizedOutput, load_config
from kubetune_trainer.config.quantize import CALIBRATED
from kubetune_trainer.distributed import StopSignal
from kubetune_trainer.errors import PreemptedError
from kubetune_trainer.export.convert import convert
from kubetune_trainer.export.store import store_output
from kubetune_trainer.export.torchao import check_device
from kubetune_trainer.lineage import lineage_sources, record_lineage
from kubetune_trainer.logs import keep_log
from kubetune_trainer.memory import forget_peak_memory, peak_memory_bytes
from kubetune_trainer.model.blockwise import BlockwiseLogits
from kubetune_trainer.model_files import is_small
from kubetune_trainer.names import OUTPUTS_DIR, TERMINATION_MESSAGE_BYTES
from kubetune_trainer.quantize.artifact import logits_of, round_by_data
from kubetune_trainer.quantize.finished import FinishedOutput, PeakMemory, find_finished, forget_finished
from kubetune_trainer.quantize.gates import QuantizeVerdict, judge
from kubetune_trainer.quantize.prepare import LocalQuantization, PreparedQuantization, fetch, prepare
from kubetune_trainer.quantize.verify import Comparison, Logits, compare
from kubetune_trainer.report import (
    attempt,
    end_with,
    open_log,
    report,
    run,
    serve_metrics,
    write_termination_message,
)
from kubetune_trainer.storage import open_store, scratch_dir

MESSAGE_FRAME_BYTES = 512
"""What a termination message may need beside outputs and gates."""
SECONDS_BETWEEN_REPORTS = 1.0


def main(arguments: Sequence[str]) -> None:
    """Reads the config, and keeps the log however the run ends."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--config", required=True, help="a complete YAML file, as those in recipes/configs")
    parser.add_argument("overrides", nargs="*", help="field=value each, as in verify.samples=8")
    options = parser.parse_args(arguments)
    config = load_config(options.config, expect=QuantizeConfig, overrides=options.overrides)
    StopSignal(leave=lambda: end_with(PreemptedError("stopped; finished outputs are stored")))
    serve_metrics()
    log = scratch_dir() / f"attempt-{attempt()}.jsonl"
    open_log(log)
    try:
        quantize(config)
    finally:
        keep_log(config, log)


def quantize(config: QuantizeConfig) -> None:
    """The whole run, from nothing or from where the last attempt stopped, to its last output."""
    for output in config.outputs:
        check_device(output.scheme)
        warn_of_calibration(output, config)
    report("phase", phase="Downloading")
    prepared = prepare(config, report=report)
    local = fetch(prepared, config)
    store = open_store(config.run.directory, s3=config.storage.s3)
    report("start", attempt=attempt(), total=prepared.total)
    progress = Progress(prepared.total, tensors=prepared.total // len(config.outputs))
    work = Work(config, prepared, local, progress)

    finished: list[FinishedOutput] = []
    for output in config.outputs:
        made = find_finished(output, config=config, store=store, prepared=prepared.digest)
        if made is None:
            forget_finished(output, store=store)  # another config may have left one, whose files are written over now
            made = work.make(output)
            made.save(store)
        progress.finish_output()
        report("output", **made.told())
        finished.append(made)

    verdicts = judge_all(config, finished)
    record_lineage(
        config,
        model=prepared.model,
        model_dir=local.base_dir,
        adapter=prepared.adapter,
        adapter_dir=local.adapter_dir,
        sources=lineage_sources(all_sources(config), prepared.sources),
        outputs=[made.stored for made in finished],
    )
    report("done")
    told = final_message(finished, verdicts, progress=progress)
    write_termination_message("Complete", exit_code=0, **told)


def warn_of_calibration(output: QuantizedOutput, config: QuantizeConfig) -> None:
    """Says which outputs are not rounded by data, though the config has data for it."""
    if config.rounds_by_data and output.type not in CALIBRATED:
        told = f"calibration is used for type {' or '.join(CALIBRATED)} only, got {output.type}"
        report("warning", message=f"{config.title}: output {output.name}: {told}: its weights go to the nearest value")


class Work:
    """What making each output needs: the model, its data, and the model's own logits, which are computed once."""

    def __init__(
        self, config: QuantizeConfig, prepared: PreparedQuantization, local: LocalQuantization, progress: "Progress"
    ) -> None:
        self._config, self._prepared, self._local, self._progress = config, prepared, local, progress
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._source_logits: Logits | None = None

    def make(self, output: QuantizedOutput) -> FinishedOutput:
        """Writes an output, loads it again and compares it, and brings it to its place."""
        folder, scratch = (scratch_dir() / kind / output.name for kind in (OUTPUTS_DIR, "rounded"))
        for each in (folder, scratch):
            shutil.rmtree(each, ignore_errors=True)  # an attempt before this one may have left its part
        peaks: dict[str, int] = {}
        rounded = None
        if self._config.rounds_by_data and output.type in CALIBRATED:
            with self._phase("Calibrating", peaks, "calibration_bytes"):
                rounded = round_by_data(
                    output,
                    self._local.model_dir,
                    self._local.calibration,
                    scratch=scratch,
                    device=self._device,
                    done=self._progress.step,
                )
        with self._phase("Quantizing", peaks, "conversion_bytes"):
            convert(output, self._local.model_dir, folder, rounded=rounded, done=self._progress.step)
        comparison = None
        if self._local.verify:
            with self._phase("Verifying", peaks, "verification_bytes"):
                comparison = self._compare(output, folder)
        self._progress.phase("Storing")
        made = FinishedOutput(
            prepared=self._prepared.digest,
            stored=store_output(output, folder, config=self._config),
            scheme=output.scheme,
            source_bytes=model_bytes(self._local.model_dir),
            comparison=comparison,
            peak_memory=PeakMemory(**peaks),
        )
        for each in (folder, scratch):
            shutil.rmtree(each, ignore_errors=True)
        return made

    @contextlib.contextmanager
    def _phase(self, name: str, peaks: dict[str, int], field: str) -> Iterator[None]:
        """Says what the run is at, and notes how much memory that took at its peak."""
        self._progress.phase(name)
        counts_from_now = forget_peak_memory(self._device)
        yield
        if counts_from_now:
            peaks[field] = peak_memory_bytes(self._device)

    def _compare(self, output: QuantizedOutput, folder: Path) -> Comparison:
        """Compares an output, as it is loaded from its files, with the model that it was made from."""
        if self._source_logits is None:
            self._source_logits = BlockwiseLogits(self._local.model_dir, self._local.verify, device=self._device)
        return compare(self._source_logits, logits_of(output, folder, device=self._device), self._local.verify)


class Progress:
    """Counts tensors over all outputs, and reports now and then."""

    def __init__(self, total: int, *, tensors: int) -> None:
        self.done, self.total, self._tensors = 0, total, tensors
        self._before_output, self._phase = 0, ""
        self._began = self._reported = time.monotonic()

    def phase(self, name: str) -> None:
        """Says what the run is at now."""
        self._phase = name
        report("phase", phase=name)

    def step(self) -> None:
        """Counts one tensor."""
        self.done = min(self.done + 1, self._before_output + self._tensors)
        if time.monotonic() - self._reported > SECONDS_BETWEEN_REPORTS:
            self.tell()

    def finish_output(self) -> None:
        """Counts what is left of an output."""
        self.done = self._before_output = self._before_output + self._tensors
        self.tell()

    def tell(self) -> None:
        """Reports how far the run is; the time that is left follows from the time so far."""
        self._reported = time.monotonic()
        seconds = (self._reported - self._began) / max(1, self.done) * (self.total - self.done)
        report("progress", done=self.done, total=self.total, eta_seconds=round(seconds), phase=self._phase)


def judge_all(config: QuantizeConfig, finished: Sequence[FinishedOutput]) -> list[QuantizeVerdict]:
    """Judges every output that a gate speaks of."""
    verdicts = [
        judge(gate, output=made.stored.name, comparison=made.comparison)
        for gate in config.gates
        for made in finished
        if gate.output in (None, made.stored.name) and made.comparison is not None
    ]
    for verdict in verdicts:
        report("gate", **verdict.model_dump())
    return verdicts


def final_message(
    finished: Sequence[FinishedOutput], verdicts: Sequence[QuantizeVerdict], *, progress: Progress
) -> dict[str, Any]:
    """What the status gets; where a termination message has no room for it, the operator reads the log's events."""
    told: dict[str, Any] = {
        "outputs": [camel(made.told()) for made in finished],
        "gates": [verdict.told() for verdict in verdicts] or None,
        "progress": {"done": progress.done, "total": progress.total},
    }
    for left_out in ("gates", "outputs"):
        if len(json.dumps(told)) > TERMINATION_MESSAGE_BYTES - MESSAGE_FRAME_BYTES:
            del told[left_out]
            told["see_log"] = True
    return told


def camel(told: dict[str, Any]) -> dict[str, Any]:
    """Spells the fields of one output as the status does."""
    words = {"source_bytes": "sourceBytes", "source_perplexity": "sourcePerplexity", "peak_memory": "peakMemory"}
    return {words.get(name, name): value for name, value in told.items()}


def all_sources(config: QuantizeConfig) -> list[Any]:
    """The datasets of calibration and verification."""
    return [source for block in (config.calibration, config.verify) if block for source in block.dataset.sources]


def model_bytes(folder: Path) -> int:
    """Size of a model folder's own files."""
    files = [path for path in folder.iterdir() if path.is_file()]
    return sum(path.stat().st_size for path in files if is_small(path.name) or path.suffix == ".safetensors")


if __name__ == "__main__":
    run(main)
