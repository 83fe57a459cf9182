"""A Hugging Face Hub in this process: the part of its API that huggingface_hub uses to read repositories."""

import hashlib
import json
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Self
from urllib.parse import unquote, urlsplit


@dataclass
class Repo:
    """A repository with one commit, which the branch main means."""

    files: dict[str, bytes]
    card: Mapping[str, Any] = field(default_factory=dict)
    token: str | None = None
    gated: bool = False

    @property
    def commit(self) -> str:
        return hashlib.sha1(repr(sorted(self.files.items())).encode()).hexdigest()  # noqa: S324 (as git does)


class HubServer:
    """Serves `repos`, by kind and name as in `models/owner/name`; answers the next `failures` requests with 503."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.failures = 0
        self.requests: list[str] = []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path).strip("/")
        self.hub.requests.append(f"{self.command} /{path}")
        if self.hub.failures > 0:
            self.hub.failures -= 1
            return self.answer(503)
        if path.startswith("api/"):
            key, _, revision = path.removeprefix("api/").partition("/revision/")
            return self.in_repo(key, revision, None)
        key, _, rest = path.partition("/resolve/")
        revision, _, file = rest.partition("/")
        return self.in_repo(key if key.startswith("datasets/") else f"models/{key}", revision, file)

    def in_repo(self, key: str, revision: str, file: str | None) -> None:
        repo = self.hub.repos.get(key)
        if repo is None or (repo.token and self.headers.get("Authorization") != f"Bearer {repo.token}"):
            return self.answer(404, code="RepoNotFound")
        if repo.gated:
            return self.answer(403, code="GatedRepo")
        if revision not in {"main", repo.commit}:
            return self.answer(404, code="RevisionNotFound")
        if file is None:
            siblings = [{"rfilename": name} for name in repo.files]
            told = {"id": key.partition("/")[2], "sha": repo.commit, "siblings": siblings, "cardData": repo.card}
            return self.answer(200, json.dumps(told).encode())
        if file not in repo.files:
            return self.answer(404, code="EntryNotFound", commit=repo.commit)
        return self.answer(200, repo.files[file], commit=repo.commit)

    def answer(self, status: int, body: bytes = b"", *, code: str = "", commit: str = "") -> None:
        self.send_response(status)
        headers = {"X-Error-Code": code, "X-Repo-Commit": commit, "Content-Length": str(len(body))}
        headers["ETag"] = f'"{hashlib.sha256(body).hexdigest()}"'
        for name, value in headers.items():
            if value:
                self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 (the base's name)
        pass
