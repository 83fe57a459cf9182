"""The Hub, in this process, as far as models and datasets are read and models are written."""

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

COMMIT = "0123456789abcdef0123456789abcdef01234567"
TOKEN = "hf_secret"


class HubServer:
    """The Hub: main points to the last commit that was pushed, or else to the one that all repositories have."""

    def __init__(self) -> None:
        self.repos: dict[str, dict[str, bytes]] = {}
        self.cards: dict[str, dict[str, Any]] = {}
        self.private: set[str] = set()
        self.failures = 0
        self.downloads: list[str] = []
        self.objects: dict[str, bytes] = {}
        self.uploads: list[str] = []
        self.commits: list[dict[str, Any]] = []
        self.refused_owners: set[str] = set()
        self.failing_uploads = 0
        self.card_errors: list[str] = []
        server = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_: object) -> None:
                """Stays silent."""

            def do_GET(self) -> None:
                server.answer(self)

            def do_POST(self) -> None:
                server.take(self)

            do_HEAD = do_GET  # noqa: N815 (the name that http.server looks for)
            do_PUT = do_POST  # noqa: N815

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._http.serve_forever, daemon=True)
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"

    def stop(self) -> None:
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        if self.failures:
            self.failures -= 1
            self.send(request, 503, {})
            return
        parts = request.path.partition("?")[0].strip("/").split("/")
        if parts[0] == "api" and parts[4:5] == ["tree"]:
            self.answer_tree(request, repo="/".join(parts[1:4]))
            return
        if parts[0] == "api":
            self.answer_info(request, repo="/".join(parts[1:4]), revision="/".join(parts[5:]) or "main")
            return
        kind = parts.pop(0) if parts[0] == "datasets" else "models"
        repo, revision, path = f"{kind}/{parts[0]}/{parts[1]}", parts[3], "/".join(parts[4:])
        self.answer_file(request, repo=repo, revision=revision, path=path)

    def answer_info(self, request: BaseHTTPRequestHandler, *, repo: str, revision: str) -> None:
        if self.is_hidden(request, repo):
            self.send(request, 401, {"X-Error-Code": "RepoNotFound"})
        elif revision not in {"main", COMMIT}:
            self.send(request, 404, {"X-Error-Code": "RevisionNotFound"})
        else:
            files = [{"rfilename": path} for path in self.repos[repo]]
            info = {
                "id": repo.partition("/")[2],
                "sha": self.head(),
                "siblings": files,
                "cardData": self.cards.get(repo),
            }
            self.send(request, 200, {}, json.dumps(info).encode())

    def answer_tree(self, request: BaseHTTPRequestHandler, *, repo: str) -> None:
        """All files, or those at the top and its folders."""
        if self.is_hidden(request, repo):
            self.send(request, 401, {"X-Error-Code": "RepoNotFound"})
            return
        is_whole = "recursive=true" in request.path.lower()
        files = {path: content for path, content in self.repos[repo].items() if is_whole or "/" not in path}
        told = [
            {"type": "file", "path": path, "size": len(content), "oid": git_oid(content)}
            for path, content in files.items()
        ]
        folders = sorted({path.partition("/")[0] for path in self.repos[repo].keys() - files.keys()})
        told += [{"type": "directory", "path": folder, "oid": "0" * 40} for folder in folders]
        self.send(request, 200, {"Content-Type": "application/json"}, json.dumps(told).encode())

    def answer_file(self, request: BaseHTTPRequestHandler, *, repo: str, revision: str, path: str) -> None:
        if self.is_hidden(request, repo):
            self.send(request, 401, {"X-Error-Code": "RepoNotFound"})
        elif revision != COMMIT or path not in self.repos[repo]:
            self.send(request, 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
        else:
            content = self.repos[repo][path]
            if request.command == "GET":
                self.downloads.append(path)
            headers = {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Repo-Commit": COMMIT}
            self.send(request, 200, headers, content)

    def is_hidden(self, request: BaseHTTPRequestHandler, repo: str) -> bool:
        authorized = request.headers.get("Authorization") == f"Bearer {TOKEN}"
        return repo not in self.repos or (repo in self.private and not authorized)

    @staticmethod
    def send(request: BaseHTTPRequestHandler, status: int, headers: dict[str, str], body: bytes = b"") -> None:
        request.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            request.send_header(name, value)
        request.end_headers()
        if request.command != "HEAD":
            request.wfile.write(body)

    def head(self) -> str:
        return self.commits[-1]["oid"] if self.commits else COMMIT

    def take(self, request: BaseHTTPRequestHandler) -> None:
        """What a client sends: repositories, large files and commits."""
        body = body_of(request)
        parts = request.path.partition("?")[0].strip("/").split("/")
        if self.failures:
            self.failures -= 1
            self.send(request, 503, {})
        elif parts[0] == "lfs":
            self.take_object(request, oid=parts[1], content=body)
        elif request.headers.get("Authorization") != f"Bearer {TOKEN}":
            self.send(request, 401, {"X-Error-Message": "Invalid credentials"})
        elif parts == ["api", "validate-yaml"]:
            told = {"errors": [{"message": text} for text in self.card_errors], "warnings": []}
            self.reply(request, told, status=400 if self.card_errors else 200)
        elif parts == ["api", "repos", "create"]:
            self.create(request, json.loads(body))
        elif parts[-1] == "batch":
            self.reply(request, self.batch(json.loads(body)))
        elif parts[4] == "preupload":
            self.reply(request, self.preupload(json.loads(body), repo=f"models/{parts[2]}/{parts[3]}"))
        else:
            self.commit(request, body, repo=f"models/{parts[2]}/{parts[3]}")

    def create(self, request: BaseHTTPRequestHandler, asked: dict[str, Any]) -> None:
        owner, repo = asked["organization"], f"models/{asked['organization']}/{asked['name']}"
        if owner in self.refused_owners:
            self.send(request, 403, {"X-Error-Message": f"You have no rights to create a model under {owner}"})
            return
        status = 409 if repo in self.repos else 200
        if repo not in self.repos:
            self.repos[repo] = {}
            self.private |= {repo} if asked.get("visibility") == "private" else set()
        self.reply(request, {"url": f"{self.url}/{owner}/{asked['name']}"}, status=status)

    def preupload(self, asked: dict[str, Any], *, repo: str) -> dict[str, Any]:
        files = []
        for file in asked["files"]:
            mode = "lfs" if file["path"].endswith(".safetensors") else "regular"
            known = self.repos[repo].get(file["path"])
            oid = None if known is None else hashlib.sha256(known).hexdigest() if mode == "lfs" else git_oid(known)
            files.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return {"files": files}

    def batch(self, asked: dict[str, Any]) -> dict[str, Any]:
        """Where large files go; nothing for those that are here already."""
        objects = []
        for item in asked["objects"]:
            upload = {"href": f"{self.url}/lfs/{item['oid']}", "header": {}}
            actions = {} if item["oid"] in self.objects else {"actions": {"upload": upload}}
            objects.append({"oid": item["oid"], "size": item["size"], **actions})
        return {"transfer": "basic", "objects": objects}

    def take_object(self, request: BaseHTTPRequestHandler, *, oid: str, content: bytes) -> None:
        if self.failing_uploads:
            self.failing_uploads -= 1
            self.send(request, 507, {})  # huggingface_hub itself tries 500 and the like again, for half a minute
            return
        assert hashlib.sha256(content).hexdigest() == oid
        self.uploads.append(oid)
        self.objects[oid] = content
        self.send(request, 200, {})

    def commit(self, request: BaseHTTPRequestHandler, body: bytes, *, repo: str) -> None:
        lines = [json.loads(line) for line in body.splitlines()]
        [header] = [line["value"] for line in lines if line["key"] == "header"]
        for value in (line["value"] for line in lines if line["key"] == "deletedFile"):
            del self.repos[repo][value["path"]]
        for value in (line["value"] for line in lines if line["key"] == "file"):
            assert value["encoding"] == "base64"
            self.repos[repo][value["path"]] = base64.b64decode(value["content"])
        for value in (line["value"] for line in lines if line["key"] == "lfsFile"):
            self.repos[repo][value["path"]] = self.objects[value["oid"]]
        oid = hashlib.sha1(body).hexdigest()  # noqa: S324 (as git names commits)
        self.commits.append({"oid": oid, "repo": repo, "summary": header["summary"]})
        self.reply(request, {"commitUrl": f"{self.url}/{repo}/commit/{oid}", "commitOid": oid})

    def reply(self, request: BaseHTTPRequestHandler, told: Any, *, status: int = 200) -> None:
        self.send(request, status, {"Content-Type": "application/json"}, json.dumps(told).encode())


def body_of(request: BaseHTTPRequestHandler) -> bytes:
    """What a client sends, in one piece or in chunks."""
    if request.headers.get("Transfer-Encoding") != "chunked":
        return request.rfile.read(int(request.headers.get("Content-Length") or 0))
    body = b""
    while size := int(request.rfile.readline(), 16):
        body += request.rfile.read(size)
        request.rfile.readline()
    request.rfile.readline()
    return body


def git_oid(content: bytes) -> str:
    """The name of a small file in git."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()  # noqa: S324 (git's own)
