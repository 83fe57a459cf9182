"""How much memory this process has needed, since it began or since some moment."""

import contextlib
import resource
from pathlib import Path
from typing import Final

import torch

CLEAR_REFS: Final = Path("/proc/self/clear_refs")
FORGET_PEAK: Final = "5"
"""What makes Linux set the peak back to what is in use, see proc_pid_clear_refs(5)."""


def peak_memory_bytes(device: torch.device) -> int:
    """Return the most that was in use at once: of the device, or of the process's memory where that is the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def forget_peak_memory(device: torch.device) -> bool:
    """Let the peak count from now on; return whether that can be done, which some sandboxes do not allow."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return True
    with contextlib.suppress(OSError):
        CLEAR_REFS.write_text(FORGET_PEAK)
        return True
    return False


def resident_bytes(field: str = "VmRSS") -> int:
    """Return the memory that this process has resident now, or its peak (VmHWM), see proc_pid_status(5)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(f"{field}:")).split()[1]) * 1024
