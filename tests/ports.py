"""Ports for the servers that tests start."""

import random
import socket

_reserved: list[socket.socket] = []


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on, kept for this process until it ends.

    Below those that the kernel gives to connections, so that none of these can take a port before its server does;
    and each is reserved by a UDP socket, so that no other process of the tests is given it meanwhile.
    """
    ports: list[int] = []
    for port in random.sample(range(10_000, 30_000), k=1000):
        if len(ports) == count:
            return ports
        reservation = socket.socket(type=socket.SOCK_DGRAM)
        try:
            with socket.socket() as probe:
                probe.bind(("0.0.0.0", port))
            reservation.bind(("127.0.0.1", port))
        except OSError:
            reservation.close()
            continue
        _reserved.append(reservation)
        ports.append(port)
    raise RuntimeError(f"found {len(ports)} of {count} free ports between 10000 and 30000")
