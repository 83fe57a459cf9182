"""What an output needs beside its format: layers rounded by data before it is written, its logits afterwards."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from kubetune_trainer.config import QuantizedOutput
from kubetune_trainer.config.outputs import GROUP_SIZE
from kubetune_trainer.data.sampler import Batch
from kubetune_trainer.export.compressed_tensors import SCHEMES
from kubetune_trainer.model.decoder import Decoder
from kubetune_trainer.model.weights import load_model
from kubetune_trainer.quantize.calibrate import RoundedFiles, calibrate
from kubetune_trainer.quantize.verify import Logits


def round_by_data(
    output: QuantizedOutput,
    source: Path,
    batches: Sequence[Batch],
    *,
    scratch: Path,
    device: torch.device,
    done: Callable[[], object],
) -> RoundedFiles:
    """Round a model's layers as an output of type CompressedTensors asks, by what goes through them.

    Args:
        output: The output.
        source: Complete model in Hugging Face format.
        batches: The data.
        scratch: A folder for the rounded layers.
        device: Where it computes.
        done: Called after each layer.
    """
    scheme = SCHEMES[output.scheme]
    group_size = (output.group_size or GROUP_SIZE) if scheme.grouped else None
    return calibrate(source, batches, bits=scheme.bits, group_size=group_size, folder=scratch, device=device, done=done)


def logits_of(output: QuantizedOutput, folder: Path, *, device: torch.device) -> Logits:
    """Load what was written, and return what computes its logits for a batch."""
    if output.type == "ExecuTorch":
        return _logits_of_program(folder)
    return logits_of_model(load_model(folder, dtype=torch.float32, device=device))


def logits_of_model(model: Decoder) -> Logits:
    """Return what computes a model's logits for a batch."""

    def logits(batch: Batch) -> Tensor:
        on_device = batch.to(model.head.device)
        return model(on_device.tokens, positions_BT=on_device.positions, documents_BT=on_device.documents)

    return logits


def _logits_of_program(folder: Path) -> Logits:
    """Return what runs an ExecuTorch program; it knows one document at a time, from its beginning."""
    from kubetune_trainer.export.executorch import ExecuTorchModel  # noqa: PLC0415

    program = ExecuTorchModel(folder)

    def logits(batch: Batch) -> Tensor:
        rows = []
        for tokens_T, documents_T in zip(batch.tokens, batch.documents, strict=True):
            lengths = torch.unique_consecutive(documents_T, return_counts=True)
            parts = [
                program.logits(part[None])[0] if document >= 0 else torch.zeros(len(part), 0)
                for document, part in zip(lengths[0].tolist(), tokens_T.split(lengths[1].tolist()), strict=True)
            ]
            width = max(part.shape[1] for part in parts)
            rows.append(torch.cat([part if part.shape[1] else part.new_zeros(len(part), width) for part in parts]))
        return torch.stack(rows)

    return logits
