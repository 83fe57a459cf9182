"""What `helm test` runs in a pod, with no more than the standard library."""

import json
import os
import ssl
import time
import urllib.request
from pathlib import Path

# ruff: noqa: INP001, S310, T201 (a script that prints, and whose addresses the chart writes)

ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
GROUP = "https://kubernetes.default.svc/apis/kubetune.dev/v1alpha1"


def served_resources() -> set[str]:
    """Names of the resources that the API server serves in our group."""
    request = urllib.request.Request(GROUP, headers={"Authorization": f"Bearer {(ACCOUNT / 'token').read_text()}"})
    context = ssl.create_default_context(cafile=str(ACCOUNT / "ca.crt"))
    with urllib.request.urlopen(request, context=context, timeout=10) as answer:
        return {resource["name"] for resource in json.load(answer)["resources"]}


def wait_for_leader(url: str, *, seconds: float) -> None:
    """Return when an operator says that it holds the Lease. With replicas, the Service asks one or the other."""
    deadline = time.monotonic() + seconds
    while (said := answer_of(url)) != "leading":
        if time.monotonic() > deadline:
            raise SystemExit(f"{url}: no operator is at work after {seconds:.0f} s; the last answer was: {said}")
        time.sleep(1)


def answer_of(url: str) -> str:
    """What the operator says, or why it says nothing."""
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return answer.read().decode()
    except OSError as error:
        return str(error)


jobs = ("finetunejobs", "evaljobs", "quantizejobs")
missing = {*jobs, *(f"{name}/status" for name in jobs)} - served_resources()
if missing:
    raise SystemExit(f"{GROUP} does not serve {', '.join(sorted(missing))}: are the CRDs of this version installed?")
print(f"{GROUP} is served")
wait_for_leader(os.environ["READYZ"], seconds=60)
print(f"{os.environ['READYZ']} is at work")
