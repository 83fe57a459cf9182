"""A whole cluster for the end-to-end tests: node, images from the checkout, S3 server, chart installed with Helm."""

import secrets
from collections.abc import Iterator

import pytest

from tests.cluster import local
from tests.cluster.local import Cluster
from tests.e2e import material


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """The cluster with kubetune in it; taken down at the end unless it was up before."""
    with local.whole(values=["settings.progressIntervalSeconds=2"]) as running:
        material.put(running)
        yield running


@pytest.fixture
def namespace(cluster: Cluster) -> Iterator[str]:
    """A fresh namespace that admits restricted pods only, with the S3 server's credentials in the Secret `s3`."""
    name = f"e2e-{secrets.token_hex(3)}"
    cluster.kubectl("create", "namespace", name)
    cluster.kubectl("label", "namespace", name, "pod-security.kubernetes.io/enforce=restricted")
    cluster.kubectl("apply", "-f", "-", input=local.s3_secret(name))
    yield name
    cluster.kubectl("delete", "namespace", name, "--wait=false")
