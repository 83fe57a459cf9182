"""Memory and speed of preparing many short samples.

    python benchmarks/prepare_memory.py --samples 200000 1000000

Every size runs in a process of its own, with a tokenizer of single bytes, one chat of two short messages per sample
(some 60 tokens) and packing. What is measured is anonymous memory (RssAnon) above what it was when everything was
imported, of the process alone and of it with those that it starts; pages of mapped files are the kernel's to drop.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Self

GIB, MIB = 2**30, 2**20
TEN_MILLION = 10_000_000


def main() -> None:
    """Measures every size, and says what ten million samples would take."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--samples", type=int, nargs="+", default=[200_000, 1_000_000])
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.one)))
        return
    results = []
    for number in options.samples:
        command = [sys.executable, __file__, "--one", str(number)]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        results.append(json.loads(done.stdout.splitlines()[-1]))
        print(tell(results[-1]))
    if len(results) > 1:
        first, last = results[0], results[-1]
        more = last["samples"] - first["samples"]
        for name in ("alone", "together"):
            each = (last[name] - first[name]) / more
            total = first[name] + each * (TEN_MILLION - first["samples"])
            print(f"{name}: {each:.0f} bytes per sample; ten million: {total / GIB:.2f} GiB")


def tell(result: dict[str, float]) -> str:
    """One line for people."""
    return (
        f"{result['samples']:,} samples: peak {result['alone'] / MIB:.0f} MiB in this process, "
        f"{result['together'] / MIB:.0f} MiB with those it started; {result['seconds']:.1f} s, "
        f"{result['samples'] / result['seconds']:,.0f} samples/s"
    )


def measure(number: int) -> dict[str, float]:
    """Prepares so many samples."""
    from kubetune_trainer.config import load_config
    from kubetune_trainer.data.prepare import prepare
    from tests.trainer.tiny_model import write_model

    with tempfile.TemporaryDirectory() as folder:
        os.environ["KUBETUNE_SCRATCH"] = f"{folder}/scratch"
        write_model(Path(folder) / "model")
        write_chats(Path(folder) / "chats.jsonl", number)
        config = Path(folder) / "run.yaml"
        config.write_text(
            f"model: {{uri: {{location: 'file://{folder}/model'}}}}\n"
            f"dataset: {{sources: [{{name: chats, uri: {{location: 'file://{folder}/chats.jsonl'}}}}]}}\n"
            "training: {epochs: 1}\n"
            f"workspace: {{uri: 'file://{folder}/runs'}}\n"
        )
        loaded, began = load_config(config), time.monotonic()
        with Peak() as peak:
            prepare(loaded, report=lambda *_, **__: None)
        return {
            "samples": number,
            "seconds": time.monotonic() - began,
            "alone": peak.alone,
            "together": peak.together,
        }


def write_chats(path: Path, number: int) -> None:
    """Writes chats that differ."""
    with path.open("w") as file:
        for index in range(number):
            question = {"role": "user", "content": f"What is {index}?"}
            answer = {"role": "assistant", "content": "One more." * (index % 4 + 1)}
            file.write(json.dumps({"messages": [question, answer]}) + "\n")


class Peak:
    """Watches anonymous memory, twenty times a second."""

    def __enter__(self) -> Self:
        self.base = anonymous_bytes(os.getpid())
        self.alone = self.together = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(0.05):
            alone = anonymous_bytes(os.getpid()) - self.base
            children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
            self.alone = max(self.alone, alone)
            self.together = max(self.together, alone + sum(anonymous_bytes(int(child)) for child in children))


def anonymous_bytes(pid: int) -> int:
    """Anonymous memory of a process, 0 if it is gone."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("RssAnon")), 0)


if __name__ == "__main__":
    main()
