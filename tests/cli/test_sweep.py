"""`kubetune sweep`: the jobs that a sweep is, their ranking, and following them in a cluster and on this machine."""

import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Self

import pytest

from kubetune_operator.api.manifest import dump_manifests
from kubetune_operator.cli import sweep_follow
from kubetune_operator.cli.bundle import load_bundle
from kubetune_operator.cli.sweep import Run, parse_setting, plan
from kubetune_operator.cli.sweep_report import Result, draw, metric_for, page, ranked
from tests.api.test_finetunejob import manifest
from tests.cluster.controlplane import ControlPlane

RATES = "training.learningRate=1e-4,2e-4"
RANKS = "lora.rank=8,16"


def write(folder: Path, **changes: Any) -> Path:
    path = folder / "job.yaml"
    path.write_text(dump_manifests([manifest(**changes)]))
    return path


@pytest.fixture
def runs(tmp_path: Path) -> list[Run]:
    return plan(load_bundle(write(tmp_path)), settings=[RATES, RANKS])


# ------------------------------------------------------------------------------------------------------- plan


def test_every_combination_is_a_job_with_its_own_name_and_values(runs: list[Run]) -> None:
    assert [(run.name, dict(run.values)) for run in runs] == [
        ("run7-1", {"training.learningRate": "1e-4", "lora.rank": 8}),
        ("run7-2", {"training.learningRate": "1e-4", "lora.rank": 16}),
        ("run7-3", {"training.learningRate": "2e-4", "lora.rank": 8}),
        ("run7-4", {"training.learningRate": "2e-4", "lora.rank": 16}),
    ]
    last = runs[3].job
    assert last.spec.training.learning_rate == "2e-4"
    assert last.spec.lora is not None
    assert last.spec.lora.rank == 16
    assert last.metadata.labels["kubetune.dev/sweep"] == "run7"


@pytest.mark.parametrize(
    ("setting", "parts"),
    [
        ("spec.lora.rank=8, 16", ("lora.rank", ["8", "16"])),
        ("lora.targetModules=[q_proj],[q_proj,v_proj]", ("lora.targetModules", ["[q_proj]", "[q_proj,v_proj]"])),
    ],
)
def test_a_setting_is_a_field_and_its_values(setting: str, parts: tuple[str, list[str]]) -> None:
    assert parse_setting(setting) == parts


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        (["lora.rank"], "--set lora.rank: must be FIELD=VALUE,VALUE,… with values that differ"),
        (["lora.rank=8,"], "with values that differ"),
        (["lora.rank=8,8"], "with values that differ"),
        (["training.learningRate=[1"], "training.learningRate: "),
        (["lora.rank=8", "spec.lora.rank=16"], "--set lora.rank stands twice"),
        (["lora.rank=eight"], "spec.lora.rank"),
        (["lora.rnk=8"], 'unknown field "spec.lora.rnk"'),
        (["training.learningRate=1e-4,fast"], "spec.training.learningRate"),
        (["workspace.uri.deep=1"], "spec.workspace.uri.deep is no field of a block"),
        (["training.globalBatchSize=8,9", "training.microBatchSize=4"], "nearest: 8 or 12"),
        ([f"training.seed={','.join(map(str, range(300)))}"], "these are 300 jobs; at most 256 are made"),
    ],
)
def test_a_bad_setting_is_refused_before_anything_is_made(
    kubetune: Any, tmp_path: Path, settings: list[str], problem: str
) -> None:
    ran = kubetune("sweep", write(tmp_path), *[f"--set={setting}" for setting in settings])
    assert (ran.code, ran.out) == (1, "")
    assert problem in ran.err


def test_a_name_without_room_for_a_number_is_refused(kubetune: Any, tmp_path: Path) -> None:
    ran = kubetune("sweep", write(tmp_path, metadata__name="a" * 40), "--set", RANKS)
    assert "metadata.name must have at most 38 characters in this sweep" in ran.err


def test_jobs_do_not_write_over_each_others_outputs(tmp_path: Path) -> None:
    outputs = [{"name": "merged", "type": "HuggingFace", "uri": "s3://models/bot/"}]
    jobs = plan(load_bundle(write(tmp_path, spec__outputs=outputs)), settings=[RANKS])
    assert [run.job.spec.outputs[0].uri for run in jobs] == ["s3://models/bot/run7-1", "s3://models/bot/run7-2"]


def test_jobs_do_not_push_over_each_other(tmp_path: Path) -> None:
    outputs = [{"name": "merged", "type": "HuggingFace"}]
    push = {"repo": "team/bot", "output": "merged"}
    jobs = plan(load_bundle(write(tmp_path, spec__outputs=outputs, spec__pushToHub=push)), settings=[RANKS])
    assert [run.job.spec.push_to_hub.repo for run in jobs if run.job.spec.push_to_hub] == ["team/bot-1", "team/bot-2"]


# ----------------------------------------------------------------------------------------------------- ranking


def results_of(runs: list[Run], losses: list[str | None]) -> list[Result]:
    return [
        Result(run=run, state="Complete" if loss else "Failed", progress={"loss": loss} if loss else {})
        for run, loss in zip(runs, losses, strict=True)
    ]


def test_jobs_are_ranked_and_those_that_failed_come_last(runs: list[Run]) -> None:
    results = results_of(runs, ["1.5", None, "0.25", "10.0"])
    assert [result.run.name for result in ranked(results, metric="loss")] == ["run7-3", "run7-1", "run7-4", "run7-2"]
    speeds = ({"tokensPerSecond": str(speed)} for speed in range(4))
    fast = [Result(run=run, state="Complete", progress=speed) for run, speed in zip(runs, speeds, strict=True)]
    assert ranked(fast, metric="tokensPerSecond")[0].run.name == "run7-4"


def test_a_job_that_stops_early_is_ranked_by_its_best_validation_whose_weights_it_leaves(runs: list[Run]) -> None:
    measured = ({"validationLoss": "1.5"}, {"validationLoss": "2.0", "bestValidationLoss": "1.25"})
    results = [Result(run=run, state="Complete", progress=told) for run, told in zip(runs, measured, strict=False)]
    assert [result.run.name for result in ranked(results, metric="validationLoss")] == ["run7-2", "run7-1"]
    assert "Best validationLoss: 1.25, by run7-2" in page(results, metric="validationLoss")


def test_the_page_names_the_best_and_has_all(runs: list[Run]) -> None:
    text = page(results_of(runs, ["1.5", None, "0.25", "10.0"]), metric="loss")
    assert "Best loss: 0.25, by run7-3 (training.learningRate=2e-4, lora.rank=8)." in text
    assert "| run7-2 | 1e-4 | 16 | Failed |  |  |" in text
    assert "No job is complete with a loss." in page(results_of(runs, [None] * 4), metric="loss")


def test_the_plot_shows_the_values_on_a_scale_that_fits(runs: list[Run], tmp_path: Path) -> None:
    draw(results_of(runs, ["1.5", None, "0.25", "10.0"]), metric="loss", path=tmp_path / "a.svg")
    text = (tmp_path / "a.svg").read_text()
    assert text.startswith("<?xml")
    assert len(text) > 5000


def test_without_matplotlib_the_table_is_written_all_the_same(
    kubetune: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    monkeypatch.setattr(
        "kubetune_operator.cli.sweep_command.in_cluster", lambda runs, **_: results_of(runs, ["1.0", "2.0"])
    )
    ran = kubetune("sweep", write(tmp_path), "--set", RANKS, "--output", tmp_path)
    assert ran.code == 0
    assert "the plot needs matplotlib: pip install 'kubetune[plot]'" in ran.err
    assert (tmp_path / "run7-sweep.md").exists()
    assert not (tmp_path / "run7-sweep.svg").exists()


@pytest.mark.parametrize(
    ("metric", "problem"),
    [
        ("accuracy", "--metric accuracy: must be one of validationLoss"),
        ("validationLoss", "needs spec.dataset.validation"),
    ],
)
def test_a_metric_that_the_jobs_will_not_have_is_refused(
    kubetune: Any, tmp_path: Path, metric: str, problem: str
) -> None:
    assert problem in kubetune("sweep", write(tmp_path), "--set", RANKS, "--metric", metric).err


def test_the_metric_is_the_validation_loss_where_there_is_one(tmp_path: Path, runs: list[Run]) -> None:
    assert metric_for(runs[0], wanted=None) == "loss"
    sources = manifest()["spec"]["dataset"]["sources"]
    validating = write(tmp_path, spec__dataset={"sources": sources, "validation": {"fraction": "0.1"}})
    assert metric_for(plan(load_bundle(validating), settings=[RANKS])[0], wanted=None) == "validationLoss"


# --------------------------------------------------------------------------------------------------- a cluster


class Hand:
    """Completes the jobs of a namespace, as an operator would, and notes how many were unfinished at once.

    With `forgets` it deletes them a moment later, as after ttlSecondsAfterFinished; those in `deletes` before that.
    """

    def __init__(self, control_plane: ControlPlane, namespace: str) -> None:
        self.most_at_once = 0
        self.forgets = False
        self.deletes: set[str] = set()
        self.completed: list[str] = []
        self.loss = {"run7-1": "2.0", "run7-2": "1.0"}
        self._control_plane = control_plane
        self._namespace = namespace
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._stop.set()
        self._thread.join()

    def _kubectl(self, *arguments: str) -> str:
        return self._control_plane.kubectl(f"--namespace={self._namespace}", *arguments).stdout

    def _work(self) -> None:
        while not self._stop.is_set():
            items = json.loads(self._kubectl("get", "ftj", "--output=json"))["items"]
            open_jobs = [item for item in items if (item.get("status") or {}).get("state") != "Complete"]
            self.most_at_once = max(self.most_at_once, len(open_jobs))
            for item in items if self.forgets else ():
                if item not in open_jobs:
                    time.sleep(3)  # so that it was seen
                    self._kubectl("delete", "ftj", item["metadata"]["name"])
            for item in open_jobs[:1]:
                name = item["metadata"]["name"]
                if name in self.deletes:
                    time.sleep(3)
                    self._kubectl("delete", "ftj", name)
                    continue
                self.completed.append(name)
                status = {"state": "Complete", "progress": {"step": 1, "loss": self.loss[name]}}
                patch = json.dumps({"status": status})
                self._kubectl("patch", "ftj", name, "--subresource=status", "--type=merge", f"--patch={patch}")
            time.sleep(0.2)


@pytest.fixture
def cluster(control_plane: ControlPlane, namespace: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hand]:
    monkeypatch.setenv("KUBECONFIG", str(control_plane.kubeconfig))
    monkeypatch.setattr(sweep_follow, "POLL_SECONDS", 0.2)
    with Hand(control_plane, namespace) as hand:
        yield hand


@pytest.mark.control_plane
def test_a_sweep_makes_its_jobs_follows_them_and_writes_what_it_found(
    kubetune: Any, cluster: Hand, namespace: str, tmp_path: Path
) -> None:
    path = write(tmp_path)
    ran = kubetune("sweep", path, "--set", RANKS, "--parallel", 1, "-n", namespace, "--output", tmp_path)
    assert (ran.code, ran.err) == (0, "")
    assert "run7-2 (lora.rank=16): Complete" in ran.out
    assert "Best loss: 1.0, by run7-2 (lora.rank=16)." in (tmp_path / "run7-sweep.md").read_text()
    assert (tmp_path / "run7-sweep.svg").exists()
    assert cluster.most_at_once == 1

    again = kubetune("sweep", path, "--set", RANKS, "-n", namespace, "--output", tmp_path)
    assert "Best loss: 1.0, by run7-2" in again.out
    other = kubetune("sweep", path, "--set", "lora.rank=4,16", "-n", namespace, "--output", tmp_path)
    assert other.code == 1
    assert f"FineTuneJob {namespace}/run7-1: exists and is not of this sweep (lora.rank=4)" in other.err
    changed = write(tmp_path, spec__training__learningRate="3e-4")
    stale = kubetune("sweep", changed, "--set", RANKS, "-n", namespace, "--output", tmp_path)
    assert "run7-1: exists and is not of this sweep (lora.rank=8) and manifest" in stale.err


@pytest.mark.control_plane
def test_a_job_that_is_gone_once_it_is_done_is_not_made_again(
    kubetune: Any, cluster: Hand, namespace: str, tmp_path: Path
) -> None:
    cluster.forgets = True
    command = ("sweep", write(tmp_path), "--set", RANKS, "--parallel", 1, "-n", namespace, "--output", tmp_path)
    ran = kubetune(*command)
    assert (ran.code, ran.err) == (0, "")
    assert "Best loss: 1.0, by run7-2" in ran.out
    assert cluster.completed == ["run7-1", "run7-2"]


@pytest.mark.control_plane
def test_a_job_that_is_deleted_before_its_end_has_failed(
    kubetune: Any, cluster: Hand, namespace: str, tmp_path: Path
) -> None:
    cluster.deletes = {"run7-1"}
    ran = kubetune("sweep", write(tmp_path), "--set", RANKS, "-n", namespace, "--output", tmp_path)
    assert ran.code == 1
    assert "run7-1 (lora.rank=8): Failed: it was deleted" in ran.out
    assert cluster.completed == ["run7-2"]


@pytest.mark.control_plane
@pytest.mark.usefixtures("cluster")
def test_a_sweep_that_the_cluster_refuses_is_told_at_once(kubetune: Any, tmp_path: Path) -> None:
    ran = kubetune("sweep", write(tmp_path), "--set", RANKS, "-n", "nowhere", "--output", tmp_path)
    assert (ran.code, ran.err) == (1, 'error: FineTuneJob nowhere/run7-1: namespaces "nowhere" not found\n')


# ------------------------------------------------------------------------------------------------ this machine


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Runs nothing: `calls` has what was to run, `codes` has how it ends, and what is in `stopped` was stopped."""
    here = SimpleNamespace(calls=[], codes={}, stopped=set())

    def outcome_of(bundle: Any) -> Any:
        name = bundle.job.metadata.name
        here.calls.append(name)
        record = {"progress": {"step": 4}, "outputs": [{"uri": f"file:///{name}"}]}
        return sweep_follow.local.Outcome(
            code=here.codes.get(name, 0), record=record, tail="", measured={"loss": len(here.calls)},
            is_stopped=name in here.stopped,
        )  # fmt: skip

    monkeypatch.setattr(sweep_follow.local, "outcome_of", outcome_of)
    return here


def test_a_local_sweep_goes_on_where_it_was_interrupted(kubetune: Any, tmp_path: Path, here: SimpleNamespace) -> None:
    here.codes["run7-2"] = 75
    command = ("sweep", write(tmp_path), "--set", "lora.rank=4,8,16", "--local", "--output", tmp_path)
    stopped = kubetune(*command)
    assert stopped.code == 1
    assert "stopped during run7-2; the same command goes on from there" in stopped.err
    here.codes.clear()
    ran = kubetune(*command)
    assert ran.code == 0
    assert here.calls == ["run7-1", "run7-2", "run7-2", "run7-3"]
    assert "Best loss: 1, by run7-1" in ran.out
    assert "file:///run7-1" in (tmp_path / "run7-sweep.md").read_text(), "remembered too"


@pytest.mark.parametrize("code", [0, 71, 137])
def test_a_local_sweep_that_is_stopped_begins_no_other_job(
    kubetune: Any, tmp_path: Path, here: SimpleNamespace, code: int
) -> None:
    here.codes["run7-1"], here.stopped = code, {"run7-1"}
    command = ("sweep", write(tmp_path), "--set", RANKS, "--local", "--output", tmp_path)
    ran = kubetune(*command)
    assert ran.code == 1
    assert f"stopped {'during' if code else 'after'} run7-1; the same command goes on from there" in ran.err
    here.codes.clear()
    here.stopped.clear()
    assert kubetune(*command).code == 0
    assert here.calls == (["run7-1", "run7-1", "run7-2"] if code else ["run7-1", "run7-2"])


def test_a_local_sweep_takes_no_old_result_for_another_manifest_or_number(
    kubetune: Any, tmp_path: Path, here: SimpleNamespace
) -> None:
    def sweep(ranks: str, **changes: Any) -> Any:
        command = ("sweep", write(tmp_path, **changes), "--set", f"lora.rank={ranks}", "--local", "--output", tmp_path)
        return kubetune(*command)

    assert sweep("8,16").code == 0
    for refused in (sweep("16,8"), sweep("8,16", spec__training__learningRate="3e-4")):
        assert refused.code == 1
        assert "FineTuneJob run7-1: was run here with other values or another manifest (lora.rank=8)" in refused.err
        assert f"remove {tmp_path}/run7-sweep.json and the jobs' folders in s3://team/runs" in refused.err
    assert sweep("8,16").code == 0
    assert here.calls == ["run7-1", "run7-2"], "nothing ran again, and nothing was forgotten"


def test_a_local_sweep_over_lists(kubetune: Any, tmp_path: Path, here: SimpleNamespace) -> None:
    setting = "lora.targetModules=[q_proj],[q_proj,v_proj]"
    ran = kubetune("sweep", write(tmp_path), "--set", setting, "--local", "--output", tmp_path)
    assert (ran.code, ran.err) == (0, "")
    assert here.calls == ["run7-1", "run7-2"]


def test_a_local_sweep_takes_no_cluster_options(kubetune: Any, tmp_path: Path) -> None:
    ran = kubetune("sweep", write(tmp_path), "--set", RANKS, "--local", "--parallel", 2)
    assert ran.err == "error: kubetune sweep: --local runs one job after the other, in no namespace\n"
