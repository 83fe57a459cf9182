"""Lets no rank fork itself into a pool of processes; see `Gang.start(before=…)`."""

import multiprocessing


def before() -> None:
    def refused(*_: object, **__: object) -> None:
        raise AssertionError("a rank forked, with its threads and its handler of SIGTERM")

    multiprocessing.Pool = refused
