"""A look into some steps of a run: where their time goes, and their memory.

`Progress` drives it, so that recipes need not know. Rank 0 alone is profiled, and what is found lies in the run's
folder: a trace that chrome://tracing, Perfetto and TensorBoard show, and a snapshot of CUDA's memory for
pytorch.org/memory_viz. The memory snapshot needs an NVIDIA GPU; it was not run by us.
"""

from pathlib import Path
from typing import Final

import torch
from torch.profiler import ProfilerActivity, profile

from kubetune_trainer.config import FineTuneConfig, Profile
from kubetune_trainer.distributed import World
from kubetune_trainer.errors import TrainerError
from kubetune_trainer.heartbeat import unwatched
from kubetune_trainer.names import PROFILE_DIR
from kubetune_trainer.report import report
from kubetune_trainer.storage import open_store, scratch_dir

MEMORY_EVENTS: Final = 100_000
"""Allocations that a memory snapshot remembers."""


class StepProfiler:
    """Watches the steps that the config names, up to the run's last."""

    def __init__(self, config: FineTuneConfig, world: World, *, last_step: int) -> None:
        """Begins without watching; warns where there will be nothing to see.

        Args:
            config: The run.
            world: This rank; any but the first watches nothing.
            last_step: With which the run ends.
        """
        self._config, self._device = config, world.device
        self._settings: Profile | None = config.training.profile if world.is_first else None
        self._running: profile | None = None
        self._first, self._last_step = 0, last_step
        if self._settings is not None and self._settings.start_step > last_step:
            report(
                "warning",
                message=f"training.profile.start_step must be at most the run's {last_step} steps for a profile, "
                f"got {self._settings.start_step}",
            )

    def after(self, step: int) -> None:
        """Begin or end as the next step asks; call it before the first step with the number before, then after each."""
        if self._settings is None:
            return
        first = self._settings.start_step
        last = min(first + self._settings.num_steps - 1, self._last_step)
        if self._running is None and first - 1 <= step < last:
            self._begin(self._settings, step + 1)
        elif self._running is not None and step >= last:
            self._end(self._running, step, memory=self._settings.memory)

    def _begin(self, settings: Profile, step: int) -> None:
        on_cuda = self._device.type == "cuda"
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_cuda else [])]
        if settings.memory and on_cuda:
            torch.cuda.memory._record_memory_history(max_entries=MEMORY_EVENTS)  # noqa: SLF001 (the documented call)
        elif settings.memory:
            report("warning", message="training.profile.memory needs CUDA; the trace has the CPU's allocations instead")
        self._first = step
        self._running = profile(activities=activities, record_shapes=True, profile_memory=settings.memory)
        self._running.start()

    @unwatched()
    def _end(self, running: profile, last: int, *, memory: bool) -> None:
        running.stop()
        self._running = self._settings = None
        folder = scratch_dir() / PROFILE_DIR
        folder.mkdir(parents=True, exist_ok=True)
        steps = f"steps-{self._first}-{last}"
        files = [folder / f"{steps}.pt.trace.json.gz"]
        running.export_chrome_trace(str(files[0]))
        if memory and self._device.type == "cuda":
            files.append(folder / f"{steps}.memory.pickle")
            torch.cuda.memory._dump_snapshot(str(files[-1]))  # noqa: SLF001 (as above)
            torch.cuda.memory._record_memory_history(enabled=None)  # noqa: SLF001
        self._keep(files, last)

    def _keep(self, files: list[Path], step: int) -> None:
        """Bring the files into the run's folder; a store that fails now must not end the run."""
        store = open_store(f"{self._config.run.directory}/{PROFILE_DIR}", s3=self._config.storage.s3)
        for file in files:
            try:
                store.upload(file, file.name)
            except TrainerError as error:
                report("warning", message=f"{file.name} could not be kept: {error}")
            else:
                report("profile", step=step, first_step=self._first, uri=store.uri(file.name))
            file.unlink()
