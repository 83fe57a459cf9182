"""The config of a QuantizeJob."""

from typing import Final, Literal, Self

from pydantic import Field, model_validator

from kubetune_trainer.config.blocks import JUDGED, Block, Dataset, JobConfig, ResourceName, check_unique_names
from kubetune_trainer.config.outputs import OutputBase

CALIBRATED: Final = ("CompressedTensors",)
"""Types of outputs whose weights can be rounded by data."""


class QuantizedOutput(OutputBase):
    """One form that the model is written in."""

    type: Literal["CompressedTensors", "TorchAO", "GGUF", "ExecuTorch"]
    """Its format."""


class RowsOf(Block):
    """The first rows of a dataset."""

    dataset: Dataset
    """Where the rows come from."""

    @model_validator(mode="after")
    def _nothing_is_held_out(self) -> Self:
        if self.dataset.validation is not None:
            raise ValueError("must have a dataset without validation: nothing is trained")
        for number, source in enumerate(self.dataset.sources):
            if source.format in JUDGED:
                raise ValueError(f"dataset.sources[{number}].format must not be of preferences, got {source.format}")
        return self


class Calibration(RowsOf):
    """Data by which weights are rounded with less harm."""

    samples: int = Field(default=128, ge=1)
    """Rows that are used, the first ones."""
    method: Literal["GPTQ", "None"] = "GPTQ"
    """How weights are rounded; None rounds each to the nearest value."""


class Verification(RowsOf):
    """Data on which each output is compared with the model that it was made from."""

    samples: int = Field(default=64, ge=1)
    """Rows that are used, the first ones."""


class QuantizeGate(Block):
    """What an output must hold."""

    name: ResourceName
    """Its name in the status."""
    output: ResourceName | None = None
    """The output that is judged; unset means each of them."""
    max_perplexity_increase_percent: float = Field(ge=0)
    """How much higher, in percent, its perplexity may be than that of the model that it was made from."""


class QuantizeConfig(JobConfig):
    """A whole quantization."""

    kind: Literal["QuantizeJob"] = "QuantizeJob"
    """Kind of the job."""
    outputs: tuple[QuantizedOutput, ...] = Field(min_length=1)
    """The forms that the model is written in."""
    calibration: Calibration | None = None
    """Data by which weights are rounded with less harm; unset rounds each to the nearest value."""
    verify: Verification | None = None
    """Data on which outputs are compared with the model; unset compares nothing."""
    gates: tuple[QuantizeGate, ...] = ()
    """What the outputs must hold; a gate that fails does not fail the job."""

    @property
    def rounds_by_data(self) -> bool:
        """Whether data is asked to decide how weights are rounded."""
        return self.calibration is not None and self.calibration.method != "None"

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        check_unique_names("outputs", self.outputs)
        check_unique_names("gates", self.gates)
        names = [output.name for output in self.outputs]
        if self.gates and self.verify is None:
            raise ValueError("gates need verify")
        for number, gate in enumerate(self.gates):
            if gate.output is not None and gate.output not in names:
                raise ValueError(f"gates[{number}].output must be one of {', '.join(names)}, got {gate.output}")
        return self
