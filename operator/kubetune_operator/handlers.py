"""kopf's side of the operator: events become keys on a queue, workers reconcile them, probes say whether it works.

Only `on.event` is used. It writes nothing to any object, and nothing that it tells is needed twice: a key that was lost
with the process comes back with the first list of the next one.
"""

import asyncio
import logging
import signal
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, Final

import kopf
from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from kubetune_operator import metrics
from kubetune_operator.cluster import Cluster, login
from kubetune_operator.errors import ClusterError, SpecError
from kubetune_operator.freshness import Census, Watched
from kubetune_operator.keyed_queue import KeyedQueue
from kubetune_operator.leader import Leadership
from kubetune_operator.names import (
    API_GROUP,
    API_VERSION,
    KINDS,
    LABEL_JOB_KIND,
    LABEL_JOB_NAME,
)
from kubetune_operator.reconcile import JobRef, Reconciler
from kubetune_operator.settings import Settings

Json = dict[str, Any]

logger = logging.getLogger(__name__)

OURS: Final = f"{LABEL_JOB_NAME},{LABEL_JOB_KIND}"
"""Label selector of what we create."""
MAX_LOOP_LAG_SECONDS: Final = 10.0
TICK_SECONDS: Final = 1.0


class Operator:
    """The running operator: queue, workers, watches and probes of one process."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.cluster = Cluster(qps=settings.api_qps, burst=settings.api_burst)
        self.queue: KeyedQueue[JobRef] = KeyedQueue()
        self.reconciler = Reconciler(cluster=self.cluster, settings=settings)
        self.census = Census()
        self.watched = {kind: Watched(kind) for kind in (*KINDS, "Job", "Pod")}
        self.leading = False
        self.tick = time.monotonic()

    async def run(self) -> None:
        """Wait for the Lease, then work until told to stop, or until the Lease is lost."""
        servers = [
            await serve({"/metrics": self.serve_metrics}, port=self.settings.metrics_port),
            await serve({"/healthz": self.serve_health, "/readyz": self.serve_ready}, port=self.settings.health_port),
        ]
        self._end_on_sigterm()
        ticking = asyncio.create_task(self._tick())
        lease = Leadership(self.cluster, settings=self.settings)
        try:
            await self._wait_for_api()
            await lease.acquire()
            await self._lead(lease)
        finally:
            await _cancel(ticking)
            for server in servers:
                await server.cleanup()
            await self.cluster.close()

    def _end_on_sigterm(self) -> None:
        """End this task on SIGTERM until kopf listens: a container's first process has no default to be ended by."""
        task = asyncio.current_task()
        if task is not None and threading.current_thread() is threading.main_thread():
            asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)

    async def _wait_for_api(self) -> None:
        """Wait until the API server knows our kinds: kopf looks only once."""
        said = ""
        while missing := ", ".join([kind for kind in KINDS if not await self.cluster.serves(kind)]):
            if missing != said:
                logger.warning("waiting for the CRD of %s to be installed", missing)
            said = missing
            await asyncio.sleep(TICK_SECONDS)

    async def _lead(self, lease: Leadership) -> None:
        """Work until told to stop.

        Raises:
            ClusterError: The Lease is lost.
        """
        self.leading = True
        holding = asyncio.create_task(lease.hold())
        jobs = (*(self._work() for _ in range(self.settings.workers)), self._resync(), self._compare())
        working = [asyncio.create_task(job) for job in jobs]
        watching = asyncio.create_task(self._watch())
        try:
            await asyncio.wait([holding, watching, *working], return_when=asyncio.FIRST_COMPLETED)
            if holding.done():
                raise ClusterError("the Lease is lost: another operator may be active")
            for task in working:  # none of them ends but by a bug, which must not go unnoticed
                if task.done():
                    await task
            await watching
        finally:
            self.leading = False
            await _cancel(watching, holding, *working)
            self.queue.close()
            await lease.release()

    async def _watch(self) -> None:
        """Run kopf until a signal, or the death of a watch, which is an error."""
        settings = kopf.OperatorSettings()
        settings.scanning.disabled = True
        settings.posting.enabled = False
        settings.watching.client_timeout = 600
        settings.watching.chunk_size = 500
        settings.watching.label_selectors["batch", "v1", "jobs"] = OURS
        settings.watching.label_selectors["", "v1", "pods"] = OURS
        settings.queueing.idle_timeout = 1.0
        settings.process.ultimate_exiting_timeout = 30
        namespaces = self.settings.namespaces
        await kopf.operator(
            registry=self._registry(),
            settings=settings,
            standalone=True,
            clusterwide=not namespaces,
            namespaces=namespaces,
        )

    def _registry(self) -> kopf.OperatorRegistry:
        """The handlers, all of which only put a key on the queue."""
        registry = kopf.OperatorRegistry()

        async def on_job(type: str | None, body: kopf.Body, **_: Any) -> None:  # noqa: A002 (kopf's name)
            self.watched[body["kind"]].note(type, body)
            self.census.note(type, body)
            self._wake(JobRef(body["kind"], body["metadata"]["namespace"], body["metadata"]["name"]))

        async def on_child(type: str | None, body: kopf.Body, **_: Any) -> None:  # noqa: A002 (kopf's name)
            self.watched[body["kind"]].note(type, body)
            labels: Mapping[str, str] = body["metadata"]["labels"]
            if labels[LABEL_JOB_KIND] in KINDS:
                self.queue.add(JobRef(labels[LABEL_JOB_KIND], body["metadata"]["namespace"], labels[LABEL_JOB_NAME]))

        async def log_in(**_: Any) -> kopf.ConnectionInfo:
            return login()

        kopf.on.login(registry=registry)(log_in)
        for kind in KINDS.values():
            kopf.on.event(API_GROUP, API_VERSION, kind.plural, registry=registry, id=kind.plural)(on_job)
        kopf.on.event("batch", "v1", "jobs", registry=registry, id="batch-job")(on_child)
        kopf.on.event("", "v1", "pods", registry=registry, id="pod")(on_child)
        return registry

    def _wake(self, ref: JobRef) -> None:
        self.queue.add(ref)
        for dependent in self.reconciler.dependents.get(ref, ()):
            self.queue.add(dependent)

    # ------------------------------------------------------------------------------------------------- workers

    async def _work(self) -> None:
        """Take keys off the queue and reconcile them, for ever."""
        while True:
            ref = await self.queue.get()
            started = time.monotonic()
            result = "error"
            try:
                result = await self._reconcile(ref)
            finally:
                self.queue.done(ref)
                metrics.RECONCILE_SECONDS.labels(ref.kind, result).observe(time.monotonic() - started)

    async def _reconcile(self, ref: JobRef) -> str:
        """Make a pass and say how it went; whatever happens, the next pass is arranged."""
        try:
            after = await self.reconciler.reconcile(ref)
        except SpecError as error:
            logger.error("%s", error)  # noqa: TRY400 (the message says all)
            return "invalid"
        except ClusterError as error:
            delay = self.queue.retry(ref, at_least=min(error.delay_seconds, 60.0))
            logger.warning("%s %s/%s: %s; again in %.1f s", *ref, error, delay)
            return "retry"
        except Exception:
            delay = self.queue.retry(ref, at_least=5.0)
            logger.exception("%s %s/%s: a bug; again in %.1f s", *ref, delay)
            return "error"
        self.queue.forget(ref)
        if after is not None:
            self.queue.add_after(ref, seconds=after)
        return "ok"

    async def _resync(self) -> None:
        """Look at every unfinished job from time to time, events or not."""
        while True:
            await asyncio.sleep(self.settings.resync_seconds)
            for kind in KINDS:
                for item in await self._list(kind, metadata_only=False):
                    if (item.get("status") or {}).get("state") not in {"Complete", "Failed"}:
                        self.queue.add(JobRef(kind, item["metadata"]["namespace"], item["metadata"]["name"]))

    async def _compare(self) -> None:
        """Hold every watch against a list from time to time."""
        while True:
            await asyncio.sleep(self.settings.freshness_seconds)
            for kind, watched in self.watched.items():
                if watched.compare(await self._list(kind, metadata_only=True)):
                    logger.error("the watch of %s does not tell what a list shows", kind)

    async def _list(self, kind: str, *, metadata_only: bool) -> list[Json]:
        """List a kind in all served namespaces; nothing where the API server does not answer."""
        labels = "" if kind in KINDS else OURS
        found: list[Json] = []
        for namespace in self.settings.namespaces or (None,):
            try:
                found += await self.cluster.list_all(
                    kind, namespace=namespace, labels=labels, metadata_only=metadata_only
                )
            except ClusterError as error:
                logger.warning("%s", error)
        return found

    async def _tick(self) -> None:
        """Measure how late the event loop is."""
        while True:
            self.tick = time.monotonic()
            await asyncio.sleep(TICK_SECONDS)
            metrics.LOOP_LAG_SECONDS.set(max(0.0, time.monotonic() - self.tick - TICK_SECONDS))

    # -------------------------------------------------------------------------------------------------- probes

    def problems(self) -> list[str]:
        """Why this process should be replaced; none if it should not."""
        lag = time.monotonic() - self.tick - TICK_SECONDS
        found = [f"the event loop is {lag:.0f} s late"] if lag > MAX_LOOP_LAG_SECONDS else []
        return found + [f"the watch of {kind} is stale" for kind, watched in self.watched.items() if watched.stale]

    async def serve_health(self, _request: web.Request) -> web.Response:
        """Answer the liveness probe."""
        problems = self.problems()
        return web.Response(text="\n".join(problems) or "ok", status=503 if problems else 200)

    async def serve_ready(self, _request: web.Request) -> web.Response:
        """Answer the readiness probe: a process that waits for the Lease is ready too."""
        return web.Response(text="leading" if self.leading else "waiting for the Lease")

    async def serve_metrics(self, _request: web.Request) -> web.Response:
        """Answer Prometheus."""
        self.census.publish()
        metrics.QUEUE_DEPTH.set(len(self.queue))
        for kind, watched in self.watched.items():
            metrics.WATCH_AGE_SECONDS.labels(kind).set(time.monotonic() - watched.last_event)
        return web.Response(body=generate_latest(), headers={"Content-Type": CONTENT_TYPE_LATEST})


async def _cancel(*tasks: asyncio.Task[None]) -> None:
    """End tasks and wait until they have ended."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def serve(routes: Mapping[str, Callable[[web.Request], Any]], *, port: int) -> web.AppRunner:
    """Serve some paths on a port of all interfaces."""
    app = web.Application()
    app.add_routes([web.get(path, handler) for path, handler in routes.items()])
    runner = web.AppRunner(app, handle_signals=False, access_log=None, shutdown_timeout=1.0)
    await runner.setup()
    await web.TCPSite(runner, "0.0.0.0", port).start()  # noqa: S104 (probes and Prometheus come from outside the pod)
    return runner
