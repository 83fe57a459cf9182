"""What a run has finished: outputs that are stored and measured, so that a killed run need not make them again."""

from typing import Any, Final

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic.alias_generators import to_camel

from kubetune_trainer.config import QuantizeConfig, QuantizedOutput
from kubetune_trainer.export.store import StoredOutput
from kubetune_trainer.quantize.verify import Comparison
from kubetune_trainer.storage import Store, open_store

FINISHED_DIR: Final = "finished"


class PeakMemory(BaseModel):
    """The most memory that each part of an output's work had in use at once, in bytes; None where none is known."""

    model_config = ConfigDict(frozen=True, extra="forbid", alias_generator=to_camel, populate_by_name=True)

    calibration_bytes: int | None = None
    """While the model looked at data for rounding."""
    conversion_bytes: int | None = None
    """While the output was written."""
    verification_bytes: int | None = None
    """While it was compared with the model that it was made from."""


class FinishedOutput(BaseModel):
    """One output, stored and measured; a file of the run's folder, written after everything else of it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    prepared: str
    """Digest of what was prepared when it was made: an output of another model is none of this run's."""
    stored: StoredOutput
    """Where it is."""
    scheme: str | None
    """How it is quantized."""
    source_bytes: int
    """Size of the model that it was made from."""
    comparison: Comparison | None
    """How far it is from that model; None where nothing was compared."""
    peak_memory: PeakMemory
    """What its parts needed."""

    def told(self) -> dict[str, Any]:
        """Return what the status says of it."""
        told = {**self.stored.told(), "scheme": self.scheme, "source_bytes": self.source_bytes}
        told["peak_memory"] = self.peak_memory.model_dump(by_alias=True, exclude_none=True) or None
        if self.comparison is not None:
            found = self.comparison
            told |= {
                "perplexity": found.perplexity,
                "source_perplexity": found.source_perplexity,
                "divergence": {
                    "meanKl": found.mean_kl,
                    "topTokenAgreementPercent": found.top_token_agreement_percent,
                    "maxLogitDifference": found.max_logit_difference,
                },
            }
        return {name: value for name, value in told.items() if value is not None}

    def save(self, store: Store) -> None:
        """Write it into the run's folder."""
        store.write_bytes(_path(self.stored.name), self.model_dump_json(indent=2).encode())


def forget_finished(output: QuantizedOutput, *, store: Store) -> None:
    """Let an output count as unfinished, before its files are written over.

    Args:
        output: The output.
        store: The run's folder.
    """
    store.delete_tree(_path(output.name))


def find_finished(
    output: QuantizedOutput, *, config: QuantizeConfig, store: Store, prepared: str
) -> FinishedOutput | None:
    """Return an output that an earlier attempt finished; None where there is none, or not this one, or not all of it.

    Args:
        output: The output.
        config: The run.
        store: The run's folder.
        prepared: Digest of what is prepared.
    """
    if not store.exists(_path(output.name)):
        return None
    try:
        found = FinishedOutput.model_validate_json(store.read_bytes(_path(output.name)))
    except ValidationError:
        return None
    there = {info.path for info in open_store(found.stored.uri, s3=config.storage.s3).list()}
    return found if found.prepared == prepared and there.issuperset(found.stored.files) else None


def _path(name: str) -> str:
    return f"{FINISHED_DIR}/{name}.json"
