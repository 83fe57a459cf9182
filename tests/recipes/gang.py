"""Gangs of ranks for tests: started, watched, killed, and asked how they ended."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from tests.cluster.paths import ROOT
from tests.ports import free_ports

TIMEOUT_SECONDS = 120


class Zygote:
    """Starts ranks; see zygote.py."""

    def __init__(self) -> None:
        # The checkout's own code, whatever is installed beside it.
        path = os.pathsep.join(str(ROOT / folder) for folder in ("", "trainer_image"))
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("zygote.py"))],
            env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        self._read()

    def ask(self, **order: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        return self._read()

    def close(self) -> None:
        self._process.communicate()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, "the zygote ended"
        return json.loads(line)


@dataclass
class Gang:
    """The ranks of one attempt of a run."""

    zygote: Zygote
    folder: Path
    pids: list[int] = field(default_factory=list)
    codes: list[int] = field(default_factory=list)

    @classmethod
    def start(
        cls, zygote: Zygote, folder: Path, config: Path, *overrides: str, ranks: int = 1, recipe: str = "finetune",
        script: Path | None = None, environment: dict[str, str] | None = None, before: str = "",
    ) -> Self:  # fmt: skip
        folder.mkdir(parents=True, exist_ok=True)
        gang = cls(zygote, folder)
        [port] = free_ports(1)
        for rank in range(ranks):
            of_rank = {
                "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks),
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "KUBETUNE_SCRATCH": str(folder / "scratch"),
                "KUBETUNE_TERMINATION_LOG": str(folder / f"message-{rank}.json"), "GLOO_SOCKET_IFNAME": "lo",
            }  # fmt: skip
            started = zygote.ask(
                do="start", recipe=str(script or ROOT / "recipes" / f"{recipe}.py"),
                arguments=["--config", str(config), *overrides],
                environment={**of_rank, **(environment or {})}, folder=str(folder),
                stdout=str(folder / f"stdout-{rank}"), stderr=str(folder / f"stderr-{rank}"), before=before,
            )  # fmt: skip
            gang.pids.append(started["pid"])
        return gang

    def wait(self) -> list[int]:
        """The ranks' exit codes. A test that runs into its limit here takes its ranks with it."""
        try:
            while len(self.codes) < len(self.pids):
                code = self.zygote.ask(do="look", pid=self.pids[len(self.codes)])["code"]
                if code is None:
                    time.sleep(0.01)
                else:
                    self.codes.append(code)
        except BaseException:
            for rank in range(len(self.codes), len(self.pids)):
                self.kill(rank)
            raise
        return self.codes

    def succeed(self) -> "Gang":
        codes = self.wait()
        assert codes == [0] * len(codes), f"{codes}\n{self.stderr()}"
        return self

    def kill(self, rank: int, number: signal.Signals = signal.SIGKILL) -> None:
        os.kill(self.pids[rank], number)

    def wait_for(self, matches: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """Waits until rank 0 has reported a matching event."""
        deadline = time.monotonic() + TIMEOUT_SECONDS
        path, seen = self.folder / "stdout-0", 0
        while time.monotonic() < deadline:
            if path.exists() and path.stat().st_size > seen:
                seen = path.stat().st_size
                for event in self.events():
                    if matches(event):
                        return event
            time.sleep(0.01)
        raise AssertionError(f"no such event:\n{self.stderr()}")

    def events(self, kind: str | None = None) -> list[dict[str, Any]]:
        path = self.folder / "stdout-0"
        lines = path.read_text().split("\n")[:-1] if path.exists() else []
        events = [json.loads(line) for line in lines]
        return [event for event in events if kind in (None, event["event"])]

    def losses(self) -> dict[int, float]:
        return {event["step"]: event["loss"] for event in self.events("step")}

    def message(self, rank: int = 0) -> dict[str, Any]:
        return json.loads((self.folder / f"message-{rank}.json").read_bytes())

    def stderr(self) -> str:
        return "\n".join(path.read_text() for path in sorted(self.folder.glob("stderr-*")))


def steps(gangs: Sequence[Gang]) -> dict[int, set[float]]:
    """Every loss that any attempt reported, by step."""
    found: dict[int, set[float]] = {}
    for gang in gangs:
        for step, loss in gang.losses().items():
            found.setdefault(step, set()).add(loss)
    return found
