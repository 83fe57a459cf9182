"""Has a rank shard even the weights of a small model, block by block; see `Gang.start(before=…)`."""

from kubetune_trainer import parallel


def before() -> None:
    parallel.KEEP_WHOLE_BYTES = 0
