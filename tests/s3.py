"""S3 servers for code that reads and writes buckets: one inside the test's process, and one that checks credentials."""

import subprocess
import threading
import time
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from moto.server import ThreadedMotoServer
from werkzeug.serving import make_server

from tests.cluster.binaries import ensure
from tests.cluster.node import answers
from tests.ports import free_ports


@contextmanager
def s3_server() -> Iterator[ThreadedMotoServer]:
    """A server without a bucket: moto keeps what is stored for the whole process, so what an earlier one held goes."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    reset = urllib.request.Request(f"{endpoint_of(server)}/moto-api/reset", method="POST")  # noqa: S310 (our own server)
    urllib.request.urlopen(reset).close()  # noqa: S310 (as above)
    yield server
    server.stop()


def endpoint_of(server: ThreadedMotoServer) -> str:
    """The server's URL."""
    host, port = server.get_host_and_port()
    return f"http://{host}:{port}"


Gate = Callable[[Mapping[str, Any]], tuple[str, str] | None]
"""Takes a request as WSGI has it; returns a status and a body in place of the server's, or None to let it pass."""


@contextmanager
def s3_server_behind(gate: Gate) -> Iterator[str]:
    """A second server on what the one in this process holds, with a gate before it; yields its URL."""
    moto = DomainDispatcherApplication(create_backend_app)

    def answer(environ: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
        if (instead := gate(environ)) is None:
            answered: Iterable[bytes] = moto(environ, start)
            return answered
        environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))  # or the client finds the line cut
        start(instead[0], [("Content-Type", "application/xml"), ("Content-Length", str(len(instead[1])))])
        return [instead[1].encode()]

    server = make_server("127.0.0.1", 0, answer, threaded=True)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


@contextmanager
def locked_s3_server(folder: Path, *, access_key: str, secret_key: str) -> Iterator[str]:
    """A real server (rclone) whose buckets are the folders of `folder`, for this key alone; yields its URL."""
    [port] = free_ports(1)
    command = [ensure("rclone")["rclone"], "serve", "s3", f"--addr=127.0.0.1:{port}", "--config="]
    command += [f"--auth-key={access_key},{secret_key}", folder]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 30
        while not answers("127.0.0.1", port):
            assert time.monotonic() < deadline, "the S3 server does not answer"
            time.sleep(0.05)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait(10)
