"""Which files an output may have, so that what one leaves behind is told from all else where another takes its place.

What is left over would win: we read an index of shards rather than a model.safetensors, transformers reads a
model.safetensors rather than shards, and adapters on top of either.
"""

import re
from typing import Final

from kubetune_trainer.export.huggingface import COMPANION_FILES
from kubetune_trainer.export.peft import ADAPTER_CONFIG_FILE, ADAPTER_WEIGHTS_FILE
from kubetune_trainer.model.weights import GGUF_FILE, INDEX_FILE, PROGRAM_FILE
from kubetune_trainer.model_json import CONFIG_FILE
from kubetune_trainer.names import LINEAGE_FILE

SHARD: Final = re.compile(r"model(-\d+-of-\d+)?\.safetensors")
SINGLE_FILES: Final = frozenset(
    {INDEX_FILE, GGUF_FILE, PROGRAM_FILE, ADAPTER_CONFIG_FILE, ADAPTER_WEIGHTS_FILE, LINEAGE_FILE}
)
LEGAL: Final = ("LICENSE", "NOTICE", "USE_POLICY")
"""How files begin that lie beside an output and are never deleted: a folder's own have the same names."""
FIRST_READ: Final = (CONFIG_FILE, ADAPTER_CONFIG_FILE)
"""Without them a folder is no model, and no adapters, to any loader."""


def is_output_file(path: str) -> bool:
    """Whether an output may have a file; one that lies there and that it does not have is another model's.

    Args:
        path: In the output's folder; what lies in folders there is never an output's.
    """
    is_companion = COMPANION_FILES.fullmatch(path) and not path.startswith(LEGAL)
    return bool(is_companion or SHARD.fullmatch(path) or path in SINGLE_FILES)
