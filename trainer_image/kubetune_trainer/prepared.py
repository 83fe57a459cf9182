"""prepared.json, which prepare leaves in a run's folder and every attempt reads, whatever kind the job is."""

from typing import TypeVar

from pydantic import BaseModel, ValidationError

from kubetune_trainer.errors import DataError
from kubetune_trainer.names import PREPARED_FILE
from kubetune_trainer.storage import Store

Form = TypeVar("Form", bound=BaseModel)


def read_prepared(directory: Store, form: type[Form]) -> Form | None:
    """Return what was prepared before; None where that was nothing.

    Args:
        directory: The run's folder.
        form: What prepare of this kind of job leaves.

    Raises:
        DataError: The file is not of that form.
    """
    if not directory.exists(PREPARED_FILE):
        return None
    try:
        return form.model_validate_json(directory.read_bytes(PREPARED_FILE))
    except ValidationError as error:
        raise DataError(
            f"{directory.uri(PREPARED_FILE)} cannot be read: {error}", hint="Remove the file to prepare the run again."
        ) from error


def write_prepared(directory: Store, prepared: BaseModel) -> None:
    """Write what was prepared into the run's folder; it is the last thing that prepare does."""
    directory.write_bytes(PREPARED_FILE, prepared.model_dump_json(by_alias=True, indent=2).encode())
