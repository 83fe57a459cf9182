"""The real model that tests compare on: SmolLM2-135M-Instruct, made once and kept in the cache."""

import subprocess
import sys
from pathlib import Path

from tests.cluster.paths import CACHE, ROOT


def smollm2_folder() -> Path:
    """Return its folder; making it takes about 20 seconds the first time."""
    folder = CACHE / "models" / "smollm2-135m-instruct"
    subprocess.run([sys.executable, ROOT / "examples" / "fetch_smollm2.py", folder], check=True)
    return folder
