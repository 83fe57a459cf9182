"""The one module that talks to the API server.

A thin asynchronous client: plain JSON in and out, a rate limit of its own, and errors that say what was tried.

Rights that it needs; the chart grants exactly these.

In every served namespace (a ClusterRole, or a Role per namespace in namespaced mode):

| group | resources | verbs |
|---|---|---|
| kubetune.dev | finetunejobs | get, list, watch, delete |
| kubetune.dev | evaljobs | get, list, watch, delete |
| kubetune.dev | quantizejobs | get, list, watch, delete |
| kubetune.dev | finetunejobs/status | patch |
| kubetune.dev | evaljobs/status | patch |
| kubetune.dev | quantizejobs/status | patch |
| batch | jobs | get, list, watch, create, patch, delete |
| "" | pods | get, list, watch |
| "" | pods/log | get |
| "" | services | create, delete |
| "" | configmaps | get, create |
| "" | events | list, create |

Where it may (a ClusterRole; without it, the memory of nodes counts as unknown):

| group | resources | verbs |
|---|---|---|
| "" | nodes | list |

In every served namespace, where jobs may stand in queues of Kueue:

| group | resources | verbs |
|---|---|---|
| batch | jobs/status | patch |
| kueue.x-k8s.io | workloads | list, patch |

In its own namespace (a Role):

| group | resources | verbs |
|---|---|---|
| coordination.k8s.io | leases | get, create, update |

It never reads Secrets: what is missing in them is read from the Events of the pods that wait for them.
"""

import asyncio
import json
import time
from collections.abc import Mapping, Sequence
from typing import Any, Final
from urllib.parse import quote

import aiohttp
import kopf

from kubetune_operator import metrics
from kubetune_operator.errors import ClusterError, ConflictError, NotFoundError, RefusedError
from kubetune_operator.names import API_GROUP, API_VERSION, KINDS

Json = dict[str, Any]

API_PATHS: Final[Mapping[str, tuple[str, str]]] = {
    **{name: (f"/apis/{API_GROUP}/{API_VERSION}", kind.plural) for name, kind in KINDS.items()},
    "Job": ("/apis/batch/v1", "jobs"),
    "Workload": ("/apis/kueue.x-k8s.io/v1beta2", "workloads"),
    "Pod": ("/api/v1", "pods"),
    "Service": ("/api/v1", "services"),
    "ConfigMap": ("/api/v1", "configmaps"),
    "Event": ("/api/v1", "events"),
    "Node": ("/api/v1", "nodes"),
    "Lease": ("/apis/coordination.k8s.io/v1", "leases"),
}
PAGE_SIZE: Final = 500
REQUEST_TIMEOUT_SECONDS: Final = 30.0
METADATA_ONLY: Final = "application/json;as=PartialObjectMetadataList;v=v1;g=meta.k8s.io"


def login() -> kopf.ConnectionInfo:
    """Find the API server and our credentials: those of the pod, otherwise those of the kubeconfig.

    Raises:
        ClusterError: There are neither.
    """
    settings = kopf.OperatorSettings()
    found = kopf.login_with_service_account(settings=settings) or kopf.login_with_kubeconfig(settings=settings)
    if not isinstance(found, kopf.ConnectionInfo):
        raise ClusterError(
            "no cluster: neither a service account nor a kubeconfig (KUBECONFIG, ~/.kube/config) was found"
        )
    return found


class TokenBucket:
    """A rate limit: `burst` requests at once, `rate` per second on average, first come first served."""

    def __init__(self, *, rate: float, burst: int) -> None:
        self._rate = rate
        self._burst = float(burst)
        self._tokens = float(burst)
        self._updated = time.monotonic()

    async def take(self) -> float:
        """Wait for a token.

        Returns:
            The seconds waited.
        """
        now = time.monotonic()
        self._tokens = min(self._burst, self._tokens + (now - self._updated) * self._rate)
        self._updated = now
        self._tokens -= 1.0
        if self._tokens >= 0:
            return 0.0
        wait = -self._tokens / self._rate
        await asyncio.sleep(wait)
        return wait


def object_path(kind: str, *, namespace: str | None, name: str = "", subresource: str = "") -> str:
    """Build the path of an object or, without a name, of a collection."""
    prefix, plural = API_PATHS[kind]
    parts = [prefix]
    if namespace:
        parts += ["namespaces", quote(namespace)]
    parts.append(plural)
    if name:
        parts.append(quote(name))
    if subresource:
        parts.append(subresource)
    return "/".join(parts)


class Cluster:
    """The API server, as the operator sees it.

    Args:
        qps: Requests per second, on average.
        burst: Requests at once.
    """

    def __init__(self, *, qps: float = 50.0, burst: int = 100) -> None:
        self._bucket = TokenBucket(rate=qps, burst=burst)
        self._session: aiohttp.ClientSession | None = None
        self._server = ""
        self._logged_in = 0.0

    async def close(self) -> None:
        """Close the connections."""
        if self._session is not None:
            await self._leave(self._session)

    async def _leave(self, session: aiohttp.ClientSession) -> None:
        """Close a session, unless another request did: nobody may find it as the current one while it closes."""
        if self._session is session:
            self._session = None
            await session.close()

    def _connected(self) -> aiohttp.ClientSession:
        """The current session, with the credentials as they are when it begins."""
        if self._session is None:
            self._session = self._connect()
        return self._session

    def _connect(self) -> aiohttp.ClientSession:
        info = login()
        self._server = info.server.rstrip("/")
        self._logged_in = time.monotonic()
        return aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(ssl=info.as_ssl_context(), limit=64),
            headers={**info.as_http_headers(), "User-Agent": "kubetune-operator"},
            timeout=aiohttp.ClientTimeout(total=REQUEST_TIMEOUT_SECONDS),
            json_serialize=json.dumps,
        )

    async def request(
        self,
        method: str,
        path: str,
        *,
        params: Mapping[str, str] | None = None,
        body: Json | None = None,
        content_type: str = "application/json",
        accept: str = "application/json",
    ) -> Any:
        """Send one request.

        Returns:
            The parsed JSON, or the text where the answer is none.

        Raises:
            NotFoundError: 404.
            ConflictError: 409.
            RefusedError: 400, 403, 405 and 422.
            ClusterError: Any other failure; worth another try.
        """
        metrics.API_THROTTLE_SECONDS.inc(await self._bucket.take())
        session, told = self._connected(), {"content_type": content_type, "accept": accept}
        status, answer = await self._send(session, method, path, params=params, body=body, **told)
        if status == 401:  # the token was rotated: the file has a new one
            await self._leave(session)
            status, answer = await self._send(self._connected(), method, path, params=params, body=body, **told)
        if status >= 300:
            raise _error(method, path, status=status, answer=answer)
        return answer

    async def _send(
        self,
        session: aiohttp.ClientSession,
        method: str,
        path: str,
        *,
        params: Mapping[str, str] | None,
        body: Json | None,
        content_type: str,
        accept: str,
    ) -> tuple[int, Any]:
        started = time.monotonic()
        code = "error"
        headers = {"Accept": accept} | ({"Content-Type": content_type} if body is not None else {})
        try:
            async with session.request(
                method,
                self._server + path,
                params=params,
                data=json.dumps(body) if body is not None else None,
                headers=headers,
            ) as response:
                code = str(response.status)
                raw = await response.read()
                if response.content_type == "application/json":
                    return response.status, json.loads(raw)
                return response.status, raw.decode(errors="replace")
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise ClusterError(
                f"{method} {path}: the API server does not answer: {error!r}", delay_seconds=2.0
            ) from error
        finally:
            metrics.API_SECONDS.labels(method, code).observe(time.monotonic() - started)

    async def serves(self, kind: str) -> bool:
        """Whether the API server knows a kind."""
        prefix, plural = API_PATHS[kind]
        try:
            found = await self.request("GET", prefix)
        except ClusterError:
            return False
        return any(resource["name"] == plural for resource in found.get("resources") or [])

    async def get(self, kind: str, *, namespace: str | None, name: str) -> Json | None:
        """Read an object, None if it is not there."""
        try:
            found: Json = await self.request("GET", object_path(kind, namespace=namespace, name=name))
        except NotFoundError:
            return None
        return found

    async def list_all(
        self,
        kind: str,
        *,
        namespace: str | None = None,
        labels: Mapping[str, str] | str = "",
        fields: str = "",
        metadata_only: bool = False,
    ) -> list[Json]:
        """Read all objects that match, page by page.

        Args:
            kind: What to list.
            namespace: None means all namespaces.
            labels: A label selector, or labels that must be equal.
            fields: A field selector.
            metadata_only: Read no more than the metadata, and from the API server's memory.
        """
        selector = labels if isinstance(labels, str) else ",".join(f"{key}={value}" for key, value in labels.items())
        params = {"labelSelector": selector} if selector else {}
        params |= {"fieldSelector": fields} if fields else {}
        params |= {"resourceVersion": "0"} if metadata_only else {"limit": str(PAGE_SIZE)}
        accept = METADATA_ONLY if metadata_only else "application/json"
        path = object_path(kind, namespace=namespace)
        items: list[Json] = []
        while True:
            page = await self.request("GET", path, params=params, accept=accept)
            items += page.get("items") or []
            more = page.get("metadata", {}).get("continue")
            if not more:
                return items
            params["continue"] = more

    async def create(self, manifest: Json) -> Json:
        """Create an object from its manifest.

        Raises:
            ConflictError: It exists already.
        """
        path = object_path(manifest["kind"], namespace=manifest["metadata"].get("namespace"))
        created: Json = await self.request("POST", path, body=manifest)
        return created

    async def update(self, manifest: Json) -> Json:
        """Replace an object; its resourceVersion must still be the current one."""
        metadata = manifest["metadata"]
        path = object_path(manifest["kind"], namespace=metadata.get("namespace"), name=metadata["name"])
        updated: Json = await self.request("PUT", path, body=manifest)
        return updated

    async def patch(self, kind: str, *, namespace: str, name: str, patch: Json, subresource: str = "") -> Json:
        """Merge a patch into an object."""
        path = object_path(kind, namespace=namespace, name=name, subresource=subresource)
        patched: Json = await self.request("PATCH", path, body=patch, content_type="application/merge-patch+json")
        return patched

    async def delete(self, kind: str, *, namespace: str, name: str, uid: str = "", foreground: bool = False) -> None:
        """Delete an object and what it owns; that it is gone already is success.

        Args:
            kind: Kind of the object.
            namespace: Where it is.
            name: Its name.
            uid: Delete only the object with this UID.
            foreground: Keep the object visible until what it owns is gone.
        """
        body: Json = {"propagationPolicy": "Foreground" if foreground else "Background"}
        if uid:
            body["preconditions"] = {"uid": uid}
        try:
            await self.request("DELETE", object_path(kind, namespace=namespace, name=name), body=body)
        except (NotFoundError, ConflictError):  # gone, or another object with that name
            return

    async def log_tail(self, *, namespace: str, pod: str, container: str, lines: int) -> str:
        """Read the last lines of a container's log; empty if there is none (yet, or any more)."""
        path = object_path("Pod", namespace=namespace, name=pod, subresource="log")
        try:
            text = await self.request(
                "GET", path, params={"container": container, "tailLines": str(lines)}, accept="*/*"
            )
        except (
            ClusterError
        ):  # no kubelet behind it, the container waits, or the pod is gone: there is no progress to read
            return ""
        return text if isinstance(text, str) else ""

    async def events_about(self, *, namespace: str, uids: Sequence[str]) -> list[Json]:
        """Read the Events about some objects, oldest first."""
        found: list[Json] = []
        for uid in uids:
            found += await self.list_all("Event", namespace=namespace, fields=f"involvedObject.uid={uid}")
        return sorted(found, key=lambda event: event.get("lastTimestamp") or event.get("eventTime") or "")

    async def nodes(self, *, name: str = "") -> list[Json] | None:
        """Read all nodes, or the one of a name; None where we may not."""
        try:
            return await self.list_all("Node", fields=f"metadata.name={name}" if name else "")
        except RefusedError:
            return None


def _error(method: str, path: str, *, status: int, answer: Any) -> ClusterError:
    """Translate an answer of the API server into an error of ours."""
    said = answer.get("message", "") if isinstance(answer, dict) else str(answer)[:500]
    message = f"{method} {path}: {status} {said}"
    if status == 404:
        return NotFoundError(message)
    if status == 409:
        return ConflictError(message, delay_seconds=0.1)
    if status in {400, 403, 405, 422}:
        return RefusedError(message, delay_seconds=15.0)
    details = answer.get("details") or {} if isinstance(answer, dict) else {}
    return ClusterError(message, delay_seconds=float(details.get("retryAfterSeconds", 2)))
