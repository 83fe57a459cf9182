"""The JSON files of a model folder, without what reading a model needs besides."""

import json
from pathlib import Path
from typing import Any

from kubetune_trainer.errors import DataError

CONFIG_FILE = "config.json"


def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON object of a model folder.

    Raises:
        DataError: The file is missing or is not a JSON object.
    """
    try:
        content = json.loads(file.read_bytes())
    except FileNotFoundError as error:
        raise DataError(
            f"Model folder {file.parent}: {file.name} is missing",
            hint="The model must be a folder in Hugging Face format: config.json, tokenizer.json and *.safetensors.",
        ) from error
    except ValueError as error:
        raise DataError(f"Model folder {file.parent}: {file.name} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise DataError(f"Model folder {file.parent}: {file.name} must hold an object, got {type(content).__name__}")
    return content
