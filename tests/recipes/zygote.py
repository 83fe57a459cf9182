"""A process that has torch loaded and forks a rank per order: importing torch takes seconds, and tests have many ranks.

The ranks are processes like any other: they have their own environment and arguments, can be killed, and end with their
own exit code. Orders are JSON lines on stdin, answers JSON lines on stdout.
"""

import importlib
import json
import os
import runpy
import sys
from typing import Any

PRELOADED = (
    "torch._dynamo",  # what an optimizer's first step imports
    "kubetune_trainer.checkpoint",
    "kubetune_trainer.data.prepare",
    "kubetune_trainer.evaluate.prepare",
    "kubetune_trainer.evaluate.run",
    "kubetune_trainer.export",
    "kubetune_trainer.parallel",
    "kubetune_trainer.tokenizer",
    "boto3",
)


def main() -> None:
    for name in PRELOADED:
        importlib.import_module(name)
    answer({"ready": True})
    for line in sys.stdin:
        order = json.loads(line)
        if order["do"] == "start":
            answer({"pid": start(order)})
        else:
            ended, status = os.waitpid(order["pid"], os.WNOHANG)
            answer({"code": os.waitstatus_to_exitcode(status) if ended else None})


def start(order: dict[str, Any]) -> int:
    pid = os.fork()
    if pid:
        return pid
    try:
        os.environ.update(order["environment"])
        os.chdir(order["folder"])
        for descriptor, path in ((0, os.devnull), (1, order["stdout"]), (2, order["stderr"])):
            os.dup2(os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND), descriptor)
        sys.argv = [order["recipe"], *order["arguments"]]
        if order.get("before"):
            importlib.import_module(order["before"]).before()
        runpy.run_path(order["recipe"], run_name="__main__")
        sys.stderr.flush()
    except SystemExit as stop:
        os._exit(stop.code if isinstance(stop.code, int) else 1)
    except BaseException:  # noqa: BLE001 (nothing may come back into the zygote's own loop)
        os._exit(1)
    os._exit(0)


def answer(words: dict[str, Any]) -> None:
    print(json.dumps(words), flush=True)


if __name__ == "__main__":
    main()
