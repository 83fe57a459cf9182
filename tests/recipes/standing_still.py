"""finetune.py for the launcher, with rank 1 standing still in step TEST_STILL_AT before the others hear from it."""

import os
import runpy
import threading
from typing import Any

from kubetune_trainer import distributed
from tests.cluster.paths import ROOT

_exchange, _steps = distributed.exchange, iter(range(1, 1000))


def exchange_or_stand_still(**told: Any) -> distributed.StepTotals:
    if next(_steps) == int(os.environ["TEST_STILL_AT"]) and os.environ["RANK"] == "1":
        threading.Event().wait()
    return _exchange(**told)


distributed.exchange = exchange_or_stand_still
runpy.run_path(str(ROOT / "recipes" / "finetune.py"), run_name="__main__")
