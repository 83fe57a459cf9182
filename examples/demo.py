"""`make demo`: a chain on a real cluster, the way a user of a GPU cluster would run it.

A Kubernetes node comes up, Helm installs the chart, kubectl applies examples/pipeline.yaml: two pods fine-tune a model,
its answers to tickets that it never saw are judged before and after, and what is good enough is quantized and judged
again. Each stage says what it took. A cluster that was up before stays up; otherwise it is taken down.
"""

import json
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Final, NamedTuple

import yaml

from tests.cluster import local
from tests.cluster.local import Cluster
from tests.cluster.paths import CACHE, ROOT
from tests.cluster.progress import stage

NAMESPACE: Final = "demo"
MANIFEST: Final = ROOT / "examples" / "pipeline.yaml"
DATA: Final = ROOT / "examples" / "data"
BASE_MODEL: Final = CACHE / "models" / "smollm2-135m-instruct"
TUNED_MODEL: Final = CACHE / "demo" / "tickets"
TIMEOUT_SECONDS: Final = 1800
SHOWN: Final = {
    "loss": "loss",
    "validationLoss": "validation loss",
    "tokensPerSecond": "tokens/s",
    "etaSeconds": "seconds left:",
}
"""What a line shows of a job's progress beside its steps, and what it calls it."""

Status = Mapping[str, Any]


class JobName(NamedTuple):
    """A job of the chain."""

    kind: str
    name: str


def main() -> None:
    """Everything, in order; exits with 1 and the job's own message when one fails."""
    began = time.monotonic()
    with local.whole() as cluster, a_namespace(cluster):
        bring_model_and_data(cluster)
        statuses = run_chain(cluster)
        print(cluster.kubectl("get", "kubetune", "--namespace", NAMESPACE).stdout, end="")
        with stage("fetching the tuned model from S3"):
            cluster.download(statuses["tickets"]["outputs"][0]["uri"], TUNED_MODEL)
    show(statuses)
    print(f"\nThe whole demo took {time.monotonic() - began:.0f} s. The tuned model is in {TUNED_MODEL}.")


@contextmanager
def a_namespace(cluster: Cluster) -> Iterator[None]:
    """A namespace for the jobs, with the S3 server's credentials."""
    cluster.kubectl("create", "namespace", NAMESPACE)
    try:
        cluster.kubectl("apply", "--filename", "-", input=local.s3_secret(NAMESPACE))
        yield
    finally:
        cluster.kubectl("delete", "namespace", NAMESPACE, "--timeout=120s")


def bring_model_and_data(cluster: Cluster) -> None:
    """Put the base model, the training data and the task where the manifests look for them."""
    with stage("model and data into S3"):
        subprocess.run([sys.executable, ROOT / "examples" / "fetch_smollm2.py", BASE_MODEL], check=True)
        cluster.make_bucket("runs")
        cluster.upload(BASE_MODEL, f"s3://models/{BASE_MODEL.name}")
        cluster.upload(DATA / "tickets-train.jsonl", "s3://data/tickets-train.jsonl")
        for name in ("tickets.yaml", "tickets-heldout.jsonl"):
            cluster.upload(DATA / name, f"s3://data/tickets/{name}")


def run_chain(cluster: Cluster) -> dict[str, Status]:
    """Apply the chain, show how it goes, and return the final status of each job by its name."""
    with stage(f"kubectl apply -f {MANIFEST.relative_to(ROOT)}"):
        cluster.kubectl("apply", "--namespace", NAMESPACE, "--filename", str(MANIFEST))
        manifests = list(yaml.safe_load_all(MANIFEST.read_text()))
        return follow(cluster, [JobName(each["kind"], each["metadata"]["name"]) for each in manifests])


def follow(cluster: Cluster, jobs: Sequence[JobName]) -> dict[str, Status]:
    """Print a line whenever the status of a job has something new, until all are complete.

    One that fails, or a gate that does, ends it.
    """
    lines: dict[JobName, str] = {}
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while time.monotonic() < deadline:
        statuses = read_statuses(cluster)
        for job in jobs:
            line = f"{job.kind} {job.name}: {describe(statuses.get(job, {}))}"
            if line != lines.get(job):
                lines[job] = line
                print(f"   {line}", file=sys.stderr, flush=True)
        states = [statuses.get(job, {}).get("state") for job in jobs]
        stopped = [job for job, state in zip(jobs, states, strict=True) if state == "Failed"]
        stopped += [job for job in jobs if any(not gate["passed"] for gate in statuses.get(job, {}).get("gates", []))]
        if stopped:
            raise SystemExit(lines[stopped[0]])
        if all(state == "Complete" for state in states):
            return {job.name: statuses[job] for job in jobs}
        time.sleep(1)
    raise SystemExit(f"the chain was not done in {TIMEOUT_SECONDS} s:\n" + "\n".join(lines.values()))


def read_statuses(cluster: Cluster) -> dict[JobName, Status]:
    """The status of each job of the demo."""
    listed = json.loads(cluster.kubectl("get", "kubetune", "--namespace", NAMESPACE, "--output", "json").stdout)
    return {JobName(each["kind"], each["metadata"]["name"]): each.get("status", {}) for each in listed["items"]}


def describe(status: Status) -> str:
    """A status in one line."""
    state, progress = status.get("state", "Pending"), status.get("progress", {})
    parts = [state]
    if state in {"Pending", "Failed"}:
        about = "Failed" if state == "Failed" else "Running"
        parts += [each["message"] for each in status.get("conditions", []) if each["type"] == about]
    elif "steps" in progress or "ofTotal" in progress:
        parts.append(progress.get("steps") or progress["ofTotal"])
    parts += [f"{label} {progress[key]}" for key, label in SHOWN.items() if state == "Running" and key in progress]
    parts += [f"gate: {each['message']}" for each in status.get("gates", [])]
    return "  ".join(parts)


def show(statuses: Mapping[str, Status]) -> None:
    """Print what the chain found."""
    progress = statuses["tickets"]["progress"]
    print(f"\nvalidation loss after {progress['totalSteps']} steps: {progress['validationLoss']}")
    print("held-out tickets answered exactly right")
    for label, name in (("before", "tickets-base"), ("after", "tickets-tuned"), ("as int8", "tickets-int8")):
        result = next(each for each in statuses[name]["results"] if each["metric"] == "exact_match")
        print(f"  {label:<10}{100 * float(result['value']):4.0f} % of {result['samples']}")
    print("\nquantized         MB   perplexity")
    for output in statuses["tickets-small"]["outputs"]:
        figures = f"{output['perplexity']}  (before: {output['sourcePerplexity']})"
        print(f"  {output['name']:<10}{output['bytes'] / 1e6:8.0f}   {figures}")


if __name__ == "__main__":
    main()
