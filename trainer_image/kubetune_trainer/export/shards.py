"""Write safetensors one tensor at a time: names, types and shapes are planned first, so no shard is held in memory.

The format (https://huggingface.co/docs/safetensors) is an 8-byte length, a JSON header with every tensor's place, and
the bytes. Since the header comes first, the plan does too; tensors may then come in any order.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO, Final, Self

import torch
from torch import Tensor

from kubetune_trainer.model.weights import INDEX_FILE, WEIGHTS_FILE

MAX_SHARD_BYTES: Final = 5_000_000_000
DTYPE_NAMES: Final[Mapping[torch.dtype, str]] = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2", torch.int64: "I64", torch.int32: "I32",
    torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
ALIGNMENT_BYTES: Final = 8


@dataclass(frozen=True)
class Planned:
    """A tensor that is yet to be written."""

    name: str
    """Its name in the file."""
    dtype: torch.dtype
    """Its type."""
    shape: tuple[int, ...]
    """Its shape."""

    @property
    def nbytes(self) -> int:
        """Bytes that it takes."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


@dataclass
class _Shard:
    tensors: list[Planned] = field(default_factory=list)
    nbytes: int = 0


class ShardWriter:
    """A folder of safetensors in the making.

    Args:
        folder: Where the files go; it must be there.
        planned: All tensors; neighbours come into the same file.
        metadata: Goes into each file's header beside the format.
        max_shard_bytes: A new file is begun before this is exceeded.
    """

    def __init__(
        self,
        folder: Path,
        planned: Sequence[Planned],
        *,
        metadata: Mapping[str, str] | None = None,
        max_shard_bytes: int = MAX_SHARD_BYTES,
    ) -> None:
        shards = _divide(planned, max_shard_bytes=max_shard_bytes)
        self._planned = {tensor.name: tensor for tensor in planned}
        self._places: dict[str, tuple[IO[bytes], int]] = {}
        self._left_bytes = {tensor.name: tensor.nbytes for tensor in planned}
        self._files: list[IO[bytes]] = []
        weight_map: dict[str, str] = {}
        for number, shard in enumerate(shards):
            name = WEIGHTS_FILE if len(shards) == 1 else f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
            self._files.append((folder / name).open("wb"))
            self._lay_out(shard.tensors, self._files[-1], metadata={"format": "pt", **(metadata or {})})
            weight_map |= {tensor.name: name for tensor in shard.tensors}
        if len(shards) > 1:
            total_bytes = sum(shard.nbytes for shard in shards)
            index = {"metadata": {"total_size": total_bytes}, "weight_map": dict(sorted(weight_map.items()))}
            (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for file in self._files:
            file.close()
        missing = sorted(name for name, left in self._left_bytes.items() if left)
        assert error is not None or not missing, f"planned and not wholly written: {missing}"

    def write(self, name: str, tensor: Tensor, *, first_row: int = 0) -> None:
        """Put a planned tensor, or some rows of it, where it belongs."""
        planned, (file, offset) = self._planned[name], self._places[name]
        assert (tensor.dtype, tuple(tensor.shape[1:])) == (planned.dtype, planned.shape[1:]), (
            f"{name} must be {planned}"
        )
        dense = tensor.detach().cpu().contiguous()
        row_bytes = dense.nbytes // len(dense)
        file.seek(offset + first_row * row_bytes)
        # Of one element any stride counts as contiguous, but not as one that can be looked at as bytes.
        file.write(dense.as_strided((dense.numel(),), (1,)).view(torch.uint8).numpy().data)
        self._left_bytes[name] -= dense.nbytes

    def _lay_out(self, tensors: Sequence[Planned], file: IO[bytes], *, metadata: Mapping[str, str]) -> None:
        """Give each tensor its place: wide types first, so that every one begins at a multiple of its width."""
        header: dict[str, object] = {"__metadata__": dict(metadata)}
        offset, places = 0, {}
        for tensor in sorted(tensors, key=lambda each: -each.dtype.itemsize):
            end = offset + tensor.nbytes
            entry = {"dtype": DTYPE_NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
            header[tensor.name] = entry
            places[tensor.name] = offset
            offset = end
        encoded = json.dumps(header).encode()
        encoded += b" " * (-len(encoded) % ALIGNMENT_BYTES)
        begin = file.write(len(encoded).to_bytes(8, "little")) + file.write(encoded)
        file.truncate(begin + offset)
        self._places |= {name: (file, begin + place) for name, place in places.items()}


def _divide(planned: Sequence[Planned], *, max_shard_bytes: int) -> list[_Shard]:
    shards = [_Shard()]
    for tensor in planned:
        if shards[-1].tensors and shards[-1].nbytes + tensor.nbytes > max_shard_bytes:
            shards.append(_Shard())
        shards[-1].tensors.append(tensor)
        shards[-1].nbytes += tensor.nbytes
    return shards
