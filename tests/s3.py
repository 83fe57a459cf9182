"""An S3 server inside the test's process, for code that reads and writes buckets."""

import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager

from moto.server import ThreadedMotoServer


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
