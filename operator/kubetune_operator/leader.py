"""Leader election with a Lease: of several operators one is active, and one that lost its Lease stops at once."""

import asyncio
import logging
import time
from datetime import UTC, datetime
from typing import Any

from kubetune_operator import metrics
from kubetune_operator.cluster import Cluster
from kubetune_operator.errors import ClusterError, ConflictError
from kubetune_operator.settings import Settings

Json = dict[str, Any]

logger = logging.getLogger(__name__)


class Leadership:
    """Our claim on the Lease.

    As with Kubernetes' own controllers, whether another holder is alive is judged by our clock alone: from when we saw
    its last renewal, never by the times that it wrote.
    """

    def __init__(self, cluster: Cluster, *, settings: Settings) -> None:
        self._cluster = cluster
        self._settings = settings
        self._seen: tuple[str, str] = ("", "")
        self._seen_at = 0.0
        self._renewed_at = 0.0

    async def acquire(self) -> None:
        """Wait until the Lease is ours."""
        while not await self._try():  # noqa: ASYNC110 (what it waits for happens in another process)
            await asyncio.sleep(self._settings.lease_seconds / 6)
        metrics.LEADER.set(1)
        logger.info("%s holds the Lease %s", self._settings.identity, self._settings.lease_name)

    async def hold(self) -> None:
        """Renew the Lease; return when it is lost."""
        is_ours = True
        while True:
            await asyncio.sleep(self._settings.lease_seconds / (3 if is_ours else 12))
            left = self._renewed_at + self._settings.lease_seconds * 2 / 3 - time.monotonic()
            try:
                async with asyncio.timeout(max(0.0, left)):
                    is_ours = await self._try()
            except TimeoutError:
                is_ours = False
            if not is_ours and time.monotonic() - self._renewed_at > self._settings.lease_seconds * 2 / 3:
                logger.error("the Lease %s is lost", self._settings.lease_name)
                return

    async def release(self) -> None:
        """Let the next one begin at once, if the Lease is still ours and the API server answers."""
        metrics.LEADER.set(0)
        try:
            lease = await self._read()
            if lease is not None and lease["spec"].get("holderIdentity") == self._settings.identity:
                lease["spec"] |= {"holderIdentity": "", "leaseDurationSeconds": 1}
                await self._cluster.update(lease)
        except ClusterError as error:
            logger.warning("the Lease was not released: %s", error)

    async def _read(self) -> Json | None:
        return await self._cluster.get("Lease", namespace=self._settings.namespace, name=self._settings.lease_name)

    async def _try(self) -> bool:
        """Take or renew the Lease, if it is free or ours."""
        began = time.monotonic()  # nobody knows when in between the API server wrote it
        try:
            lease = await self._read()
            if lease is None:
                await self._cluster.create(self._claim({}))
            elif self._is_taken(lease):
                return False
            else:
                await self._cluster.update(self._claim(lease))
        except ConflictError:  # somebody else was faster
            return False
        except ClusterError as error:
            logger.warning("the Lease was not renewed: %s", error)
            return False
        self._renewed_at = began
        return True

    def _is_taken(self, lease: Json) -> bool:
        """Whether another holder renewed the Lease within its duration."""
        spec = lease["spec"]
        holder = spec.get("holderIdentity") or ""
        if holder in {"", self._settings.identity}:
            return False
        seen = (holder, str(spec.get("renewTime")))
        if seen != self._seen:
            self._seen, self._seen_at = seen, time.monotonic()
        return time.monotonic() - self._seen_at < float(
            spec.get("leaseDurationSeconds") or self._settings.lease_seconds
        )

    def _claim(self, lease: Json) -> Json:
        """The Lease as we want it, over the version that was read."""
        spec = dict(lease.get("spec") or {})
        now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        if spec.get("holderIdentity") != self._settings.identity:
            spec |= {"acquireTime": now, "leaseTransitions": int(spec.get("leaseTransitions") or 0) + bool(lease)}
        spec |= {
            "holderIdentity": self._settings.identity,
            "leaseDurationSeconds": max(1, round(self._settings.lease_seconds)),
            "renewTime": now,
        }
        metadata = lease.get("metadata") or {"name": self._settings.lease_name, "namespace": self._settings.namespace}
        return {"apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "metadata": metadata, "spec": spec}
