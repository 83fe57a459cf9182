"""Which files of tests begin first, where several processes share them, so that all end at about the same time.

Files that wait for a cluster stand before those that compute: a process beside them has the CPU then.
"""

from collections import defaultdict
from collections.abc import Iterable
from typing import Final

import pytest

from tests.cluster.paths import ROOT

LONGEST_FIRST: Final = (
    "trainer/test_families_executorch.py",
    "controller/test_kueue.py",
    "recipes/test_eval_model.py",
    "test_benchmarks.py",
    "controller/test_crashes.py",
    "trainer/test_export_gguf.py",
    "controller/test_evaljob.py",
    "cli/test_run_for_real.py",
    "recipes/test_memory_and_speed.py",
    "trainer/test_parallel.py",
    "controller/test_restarts.py",
    "controller/test_suspend.py",
    "controller/test_lost_node.py",
    "trainer/test_estimate_measured.py",
    "cli/test_estimate.py",
    "trainer/test_generation.py",
    "controller/test_pipeline.py",
    "recipes/test_dpo.py",
    "recipes/test_kto.py",
    "recipes/test_distill.py",
    "recipes/test_custom.py",
    "recipes/test_finetune.py",
    "controller/test_rest.py",
    "recipes/test_quantize.py",
    "trainer/test_export_executorch.py",
    "recipes/test_train_tokens.py",
    "recipes/test_resume.py",
    "recipes/test_tracking.py",
    "recipes/test_push.py",
    "trainer/test_tracking.py",
    "trainer/test_families_outputs.py",
    "trainer/test_families_gguf.py",
    "trainer/test_families.py",
    "trainer/test_quantize_qat.py",
    "trainer/test_qlora.py",
    "recipes/test_invariance.py",
    "chart/test_rights.py",
    "trainer/test_model_smollm2.py",
    "controller/test_pending.py",
    "controller/test_quantizejob.py",
    "controller/test_progress.py",
    "controller/test_freshness.py",
    "controller/test_upstream.py",
    "controller/test_leader.py",
    "controller/test_life.py",
    "trainer/test_launch.py",
    "cli/test_validate.py",
)
"""What takes ten seconds and more; the summary of a run names the files that took longest."""
SHOWN: Final = 15


def in_order(items: Iterable[pytest.Item]) -> list[pytest.Item]:
    """The longest files first, everything else as it was collected."""
    places = {ROOT / "tests" / name: place for place, name in enumerate(LONGEST_FIRST)}
    return sorted(items, key=lambda item: places.get(item.path, len(places)))


def longest_files(reports: Iterable[pytest.TestReport]) -> list[tuple[str, float]]:
    """The files that took longest, and their seconds, set-up and tear-down included."""
    seconds: defaultdict[str, float] = defaultdict(float)
    for report in reports:
        seconds[report.nodeid.partition("::")[0]] += report.duration
    return sorted(seconds.items(), key=lambda item: -item[1])[:SHOWN]
