"""Where the local cluster keeps things: the checkout it reads, and the cache it fills outside of it."""

import os
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parent.parent.parent
"""The checkout."""
HERE: Final = Path(__file__).resolve().parent
CACHE: Final = Path(os.environ.get("KUBETUNE_CACHE") or Path.home() / ".cache" / "kubetune")
"""Everything that may be made again; keyed by what made it, shared by all checkouts."""
BIN: Final = CACHE / "bin"
"""Built programs, one folder per group and version key."""
CLUSTER: Final = CACHE / "cluster"
"""The node: its configuration, its data and, from one `up` to the next, its images."""
LOGS: Final = CLUSTER / "log"
"""One file per component and, under `pods`, what containers wrote."""
