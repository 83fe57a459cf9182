"""`make demo`: fine-tune a real model on a real cluster, the way a user of a GPU cluster would.

A Kubernetes node comes up, Helm installs the chart, kubectl applies examples/tickets.yaml, two pods train,
the model comes back from object storage, and its answers on tickets that it never saw are compared with those of the
model it began as. Each stage says what it took. A cluster that was up before stays up; otherwise it is taken down.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from tests.cluster import local
from tests.cluster.local import Cluster
from tests.cluster.paths import CACHE, ROOT
from tests.cluster.progress import stage

NAMESPACE: Final = "demo"
MANIFEST: Final = ROOT / "examples" / "tickets.yaml"
TRAIN_DATA: Final = ROOT / "examples" / "data" / "tickets-train.jsonl"
HELDOUT_DATA: Final = ROOT / "examples" / "data" / "tickets-heldout.jsonl"
BASE_MODEL: Final = CACHE / "models" / "smollm2-135m-instruct"
TUNED_MODEL: Final = CACHE / "demo" / "tickets"
TIMEOUT_SECONDS: Final = 900


@dataclass(frozen=True)
class Score:
    """How answers compare with what they should be.

    Attributes:
        samples: How many were asked.
        formatted: Answers that are one JSON object with exactly the wanted keys.
        exact: Answers whose object is the wanted one.
    """

    samples: int
    formatted: int
    exact: int


def main() -> None:
    """Everything, in order; exits with 1 and the job's own message when it fails."""
    began = time.monotonic()
    with local.whole() as cluster, a_namespace(cluster):
        bring_model_and_data(cluster)
        status = fine_tune(cluster)
        with stage("fetching the tuned model from S3"):
            cluster.download(output_uri(status, "merged"), TUNED_MODEL)
    before = score("before", BASE_MODEL)
    after = score("after", TUNED_MODEL)
    show(status, before, after)
    print(f"\nThe whole demo took {time.monotonic() - began:.0f} s. The tuned model is in {TUNED_MODEL}.")


@contextmanager
def a_namespace(cluster: Cluster) -> Iterator[None]:
    """A namespace for the job, with the S3 server's credentials."""
    cluster.kubectl("create", "namespace", NAMESPACE)
    try:
        cluster.kubectl("apply", "--filename", "-", input=local.s3_secret(NAMESPACE))
        yield
    finally:
        cluster.kubectl("delete", "namespace", NAMESPACE, "--timeout=120s")


def bring_model_and_data(cluster: Cluster) -> None:
    """Put the base model and the training data where the manifest looks for them."""
    with stage("model and data into S3"):
        subprocess.run([sys.executable, ROOT / "examples" / "fetch_smollm2.py", BASE_MODEL], check=True)
        cluster.make_bucket("runs")
        cluster.upload(BASE_MODEL, f"s3://models/{BASE_MODEL.name}")
        cluster.upload(TRAIN_DATA, f"s3://data/{TRAIN_DATA.name}")


def fine_tune(cluster: Cluster) -> dict[str, Any]:
    """Apply the manifest, show how it goes, return its final status."""
    with stage(f"kubectl apply -f {MANIFEST.relative_to(ROOT)}"):
        cluster.kubectl("apply", "--namespace", NAMESPACE, "--filename", str(MANIFEST))
        status = follow(cluster, "tickets")
    if status["state"] != "Complete":
        failed = next(each for each in status["conditions"] if each["type"] == "Failed")
        sys.exit(f"the FineTuneJob failed: {failed['reason']}: {failed['message']}")
    print(cluster.kubectl("get", "finetunejobs", "--namespace", NAMESPACE, "--output", "wide").stdout, end="")
    return status


def follow(cluster: Cluster, name: str) -> dict[str, Any]:
    """Print a line whenever the job's status has something new, until it is over."""
    shown = ""
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while time.monotonic() < deadline:
        answer = cluster.kubectl("get", "finetunejob", name, "--namespace", NAMESPACE, "--output", "json")
        status: dict[str, Any] = json.loads(answer.stdout).get("status", {})
        if (line := describe(status)) != shown:
            shown = line
            print(f"   {line}", file=sys.stderr, flush=True)
        if status.get("state") in {"Complete", "Failed"}:
            return status
        time.sleep(1)
    raise SystemExit(f"the FineTuneJob was not done in {TIMEOUT_SECONDS} s; its status says: {shown}")


def describe(status: Mapping[str, Any]) -> str:
    """A status in one line."""
    progress = status.get("progress", {})
    parts = [status.get("state", "Pending")]
    if "step" in progress:
        parts.append(f"step {progress['step']}/{progress['totalSteps']}")
    parts += [f"{label} {progress[key]}" for key, label in LABELS.items() if key in progress]
    return "  ".join(parts)


LABELS: Final = {
    "loss": "loss",
    "validationLoss": "validation loss",
    "tokensPerSecond": "tokens/s",
    "etaSeconds": "seconds left:",
}
"""What `describe` shows of the progress, and what it calls it."""


def score(when: str, model: Path) -> Score:
    """Ask the model about every held-out ticket and compare."""
    answers_file = CACHE / "demo" / f"answers-{when}.jsonl"
    answers_file.parent.mkdir(parents=True, exist_ok=True)
    with stage(f"answers to {HELDOUT_DATA.name} {when} training"):
        command = [sys.executable, str(ROOT / "recipes" / "generate.py"), "--model", str(model)]
        command += ["--prompts", str(HELDOUT_DATA), "--output", str(answers_file), "--max-new-tokens", "64"]
        subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": str(os.cpu_count() or 1)})
    wanted = [json.loads(line)["messages"][-1]["content"] for line in HELDOUT_DATA.read_text().splitlines()]
    answers = [json.loads(line)["answer"] for line in answers_file.read_text().splitlines()]
    return compare(answers, wanted)


def compare(answers: list[str], wanted: list[str]) -> Score:
    """Score answers; an answer that is no JSON object has no keys at all."""
    pairs = [(as_object(answer), as_object(target)) for answer, target in zip(answers, wanted, strict=True)]
    formatted = sum(answer is not None and answer.keys() == target.keys() for answer, target in pairs if target)
    return Score(samples=len(pairs), formatted=formatted, exact=sum(answer == target for answer, target in pairs))


def as_object(text: str) -> dict[str, Any] | None:
    """The JSON object that the text is, or None."""
    try:
        found = json.loads(text)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def show(status: Mapping[str, Any], before: Score, after: Score) -> None:
    """Print what training changed."""
    progress = status["progress"]
    print(f"\nvalidation loss after {progress['totalSteps']} steps: {progress['validationLoss']}")
    print(f"{before.samples} held-out tickets        before   after")
    for label, key in (("in the wanted form", "formatted"), ("exactly right", "exact")):
        rates = [f"{100 * getattr(score, key) / score.samples:6.0f} %" for score in (before, after)]
        print(f"  {label:<26}{rates[0]}{rates[1]}")


def output_uri(status: Mapping[str, Any], name: str) -> str:
    """Where the output of that name lies."""
    found: str = next(output["uri"] for output in status["outputs"] if output["name"] == name)
    return found


if __name__ == "__main__":
    main()
