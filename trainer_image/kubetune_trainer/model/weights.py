"""Read a Hugging Face folder of safetensors straight into a model: each rank reads only the rows that it holds."""

import json
import math
import mmap
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.placement_types import _StridedShard
from torch.overrides import TorchFunctionMode

from kubetune_trainer.errors import DataError, listed
from kubetune_trainer.lora import is_adapter, is_packed, packed_layers
from kubetune_trainer.model.config import (
    QUANTIZATION_METHODS,
    ModelConfig,
    quantization_method,
    read_config,
    read_json,
)
from kubetune_trainer.model.decoder import Decoder
from kubetune_trainer.trained_tokens import token_adapters

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
GGUF_FILE = "model.gguf"
PROGRAM_FILE = "model.pte"
TIED_HEAD = "lm_head.weight"
NAMES_IN_MESSAGE = 5


def load_model(
    path: str | Path,
    *,
    dtype: torch.dtype = torch.bfloat16,
    device: str | torch.device = "cpu",
    adapter: str | Path | None = None,
) -> Decoder:
    """Load a model folder into memory, on one device.

    Args:
        path: Folder in Hugging Face format, whose weights may be quantized and stay so in memory; or a GGUF output of
            this package, whose weights become `dtype`.
        dtype: Type of all weights that are not quantized.
        device: Where they go.
        adapter: A PEFT folder that is merged into the weights; unset leaves them as they are.

    Returns:
        The model, in evaluation mode.

    Raises:
        DataError: The folder is incomplete, damaged, or describes a model that is not supported.
    """
    is_gguf = has_gguf_alone([file.name for file in Path(path).glob("*")])
    is_quantized = quantization_method(Path(path)) in QUANTIZATION_METHODS
    if adapter is not None and (is_gguf or is_quantized):
        form = "a GGUF output" if is_gguf else "quantized"
        raise DataError(f"Model folder {path} is {form}: no adapter can be merged into it")
    if is_gguf:
        from kubetune_trainer.export.gguf import load_gguf  # noqa: PLC0415 - it needs this module first

        return load_gguf(path, dtype=dtype, device=device)
    if is_quantized:
        from kubetune_trainer.quantize.load import load_quantized  # noqa: PLC0415 - it needs this module first

        return load_quantized(Path(path), dtype=dtype, device=device)
    model = build_model(read_config(Path(path)))
    _take_weights(model, Path(path), dtype=dtype, device=device)
    if adapter is not None:
        from kubetune_trainer.model.adapter import merge_adapter  # noqa: PLC0415 - it needs this module first

        merge_adapter(model, Path(adapter), source=Path(path))
    return model.eval()


def has_gguf_alone(names: Collection[str]) -> bool:
    """Whether a folder with these files has its weights in GGUF, and not in safetensors."""
    return GGUF_FILE in names and WEIGHTS_FILE not in names and INDEX_FILE not in names


def no_weights(folder: str, names: Collection[str]) -> DataError:
    """Return the error of a folder that has no safetensors, with these files instead."""
    if PROGRAM_FILE in names:
        return DataError(
            f"Model folder {folder}: {PROGRAM_FILE} is an ExecuTorch program, which `kubetune chat` and executorch's "
            f"runtime run, and nothing else",
            hint="Take an output of another type of the same model.",
        )
    if GGUF_FILE in names:
        return DataError(
            f"Model folder {folder}: {GGUF_FILE} can be evaluated and talked to, not trained or quantized",
            hint="Take the folder in Hugging Face format that it was made from.",
        )
    return DataError(
        f"Model folder {folder}: neither {WEIGHTS_FILE} nor {INDEX_FILE} is there",
        hint="Weights must be safetensors; convert other formats with transformers' save_pretrained.",
    )


def build_model(config: ModelConfig) -> Decoder:
    """Build a model without memory (on the meta device); `to_empty` and `load_weights` give it its weights."""
    with torch.device("meta"), _NoFirstValues():
        return Decoder(config)


class _NoFirstValues(TorchFunctionMode):
    """Passes over `torch.nn.init`: values without memory are none, and drawing them loads torch's compiler first."""

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = dict(kwargs or {})
        if getattr(function, "__module__", None) == "torch.nn.init":
            return args[0] if args else given["tensor"]
        return function(*args, **given)


def load_weights(model: Decoder, path: str | Path) -> None:
    """Fill a model's weights from a folder; weights in NF4 are packed one by one.

    Adapters are left as they are, but for trained rows of tokens, which begin as the folder's.

    Args:
        model: Its parameters have memory already, and may be shards over any mesh of ours.
        path: Folder in Hugging Face format.

    Raises:
        DataError: A tensor is missing, unexpected or of another shape, or a file is missing or damaged.
    """
    parameters, packed = model.named_parameters(), packed_layers(model)
    wanted = {name: parameter for name, parameter in parameters if not (is_adapter(name) or is_packed(name))}
    shapes = {name: tuple(parameter.shape) for name, parameter in wanted.items()}
    with WeightFiles(Path(path), tied_embeddings=model.config.tied_embeddings) as files, torch.no_grad():
        files.check(shapes | {name: (layer.out_features, layer.in_features) for name, layer in packed.items()})
        for name, parameter in wanted.items():
            local, place = local_place(parameter)
            local.copy_(files.read_part(name, place))
        for name, layer in packed.items():
            layer.load(files.read(name, rows=slice(None)))
        for name, adapter in token_adapters(model).items():
            local, held = local_rows(adapter.trainable_tokens_delta)
            for row, token in zip(local, adapter.ids[held], strict=True):
                row.copy_(files.read(f"{name}.weight", rows=slice(token, token + 1))[0])


def _take_weights(model: Decoder, path: Path, *, dtype: torch.dtype, device: str | torch.device) -> None:
    """Make a folder's tensors the weights of a model without memory; where nothing is to convert, the files' own pages.

    Pages that are written become this process's own: the files never change.
    """
    wanted = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    with WeightFiles(path, tied_embeddings=model.config.tied_embeddings) as files:
        files.check(wanted)
        for name in wanted:
            tensor = files.mapped(name) if files.dtype(name) == dtype else files.converted(name, dtype)
            layer, _, kind = name.rpartition(".")
            setattr(model.get_submodule(layer), kind, torch.nn.Parameter(tensor.to(device)))


def local_place(parameter: Tensor) -> tuple[Tensor, tuple[slice, ...]]:
    """Return this rank's part of a parameter, and where it lies in the whole: a slice for each dimension.

    The innermost dimension of a mesh divides first: FSDP shards what tensor parallelism has left.
    """
    begins, sizes = [0] * parameter.dim(), list(parameter.shape)
    if isinstance(parameter, DTensor):
        mesh = parameter.device_mesh
        for axis in reversed(range(mesh.ndim)):
            placement = parameter.placements[axis]
            if not isinstance(placement, Shard | _StridedShard):
                continue
            whole, each = sizes[placement.dim], -(-sizes[placement.dim] // mesh.size(axis))
            begin = min(mesh.get_local_rank(axis) * each, whole)
            begins[placement.dim] += begin
            sizes[placement.dim] = min(each, whole - begin)
        parameter = parameter.to_local()
    assert tuple(parameter.shape) == tuple(sizes), f"expected a part of {sizes}, got {tuple(parameter.shape)}"
    return parameter, tuple(slice(begin, begin + size) for begin, size in zip(begins, sizes, strict=True))


def local_rows(parameter: Tensor) -> tuple[Tensor, slice]:
    """Return this rank's part of a parameter of which it holds whole rows, and which of them."""
    local, place = local_place(parameter)
    assert local.shape[1:] == parameter.shape[1:], f"expected whole rows of {tuple(parameter.shape)}"
    return local, place[0]


class WeightFiles:
    """The safetensors of a model folder, open for reading.

    Args:
        folder: Folder in Hugging Face format.
        tied_embeddings: Whether a stored output head is a copy of the embedding, to be passed over.
    """

    def __init__(self, folder: Path, *, tied_embeddings: bool) -> None:
        self.folder = folder
        self._open_files = ExitStack()
        self._maps: dict[Path, tuple[mmap.mmap, int, dict[str, Any]]] = {}
        self._file_of = _index(folder)
        self._handles = {file: self._open(file) for file in sorted(set(self._file_of.values()))}
        for name, file in self._file_of.items():
            if name not in self._handles[file].keys():  # noqa: SIM118 - a safetensors handle is no mapping
                raise DataError(f"Model folder {folder}: {INDEX_FILE} puts {name} into {file}, which does not have it")
        self.names = [
            name
            for name in self._file_of
            if not name.endswith("rotary_emb.inv_freq") and not (tied_embeddings and name == TIED_HEAD)
        ]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open_files.close()

    def check(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Compare names and shapes with what the model needs.

        Raises:
            DataError: They differ.
        """
        for what, names in (
            ("is missing", [name for name in shapes if name not in self.names]),
            ("has unexpected", [name for name in self.names if name not in shapes]),
        ):
            if names:
                told = listed(names, most=NAMES_IN_MESSAGE)
                raise DataError(f"Model folder {self.folder} {what} tensors: {told}")
        for name, shape in shapes.items():
            found = self.shape(name)
            if found != shape:
                raise DataError(
                    f"Model folder {self.folder}: {name} in {self._file_of[name]} must have the shape {shape} "
                    f"that config.json asks for, got {found}"
                )

    def dtype(self, name: str) -> torch.dtype:
        """Return the stored type of a tensor."""
        return self._slice(name)[0:0].dtype

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor."""
        return tuple(self._slice(name).get_shape())

    def read(self, name: str, *, rows: slice) -> Tensor:
        """Read some rows of a tensor, in their stored type."""
        return self._slice(name)[rows]

    def read_part(self, name: str, place: tuple[slice, ...]) -> Tensor:
        """Read a part of a tensor, a slice for each dimension, in its stored type."""
        return self._slice(name)[place]

    def mapped(self, name: str) -> Tensor:
        """Return a tensor whose memory is the file's."""
        tensor: Tensor = self._handles[self._file_of[name]].get_tensor(name)
        return tensor

    def converted(self, name: str, dtype: torch.dtype) -> Tensor:
        """Read a tensor into another type; the pages read are let go at once, which would count as this process's."""
        file = self.folder / self._file_of[name]
        if file not in self._maps:
            with file.open("rb") as stream:
                self._maps[file] = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY), *_header(file)
        memory, begin, header = self._maps[file]
        first, end = (begin + offset for offset in header[name]["data_offsets"])
        shape = self.shape(name)
        stored = torch.frombuffer(memory, dtype=self.dtype(name), offset=first, count=math.prod(shape))
        made = stored.view(shape).to(dtype)
        page = first - first % mmap.PAGESIZE
        memory.madvise(mmap.MADV_DONTNEED, page, end - page)
        return made

    def items(self) -> Iterator[tuple[str, Tensor]]:
        """Yield every tensor whole, in the files' order."""
        for name in self.names:
            yield name, self.mapped(name)

    def _slice(self, name: str) -> Any:
        return self._handles[self._file_of[name]].get_slice(name)

    def _open(self, file: str) -> Any:
        try:
            return self._open_files.enter_context(safe_open(self.folder / file, framework="pt"))
        except FileNotFoundError as error:
            raise DataError(f"Model folder {self.folder}: {file} is missing, and {INDEX_FILE} names it") from error
        except SafetensorError as error:
            raise DataError(
                f"Model folder {self.folder}: {file} is not a whole safetensors file: {error}",
                hint="The file may have been cut off while it was copied; copy it again.",
            ) from error


def _index(folder: Path) -> dict[str, str]:
    """Map each tensor to its file."""
    if (folder / INDEX_FILE).is_file():
        index = read_json(folder / INDEX_FILE)
        if not isinstance(index.get("weight_map"), dict):
            raise DataError(f"Model folder {folder}: {INDEX_FILE} has no weight_map")
        return index["weight_map"]
    if not (folder / WEIGHTS_FILE).is_file():
        raise no_weights(str(folder), [file.name for file in folder.glob("*")])
    return dict.fromkeys(_names_in(folder / WEIGHTS_FILE), WEIGHTS_FILE)


def _names_in(file: Path) -> list[str]:
    """Read the names in a safetensors file in the order of its bytes."""
    return list(_header(file)[1])


def _header(file: Path) -> tuple[int, dict[str, Any]]:
    """Read where the tensors' bytes of a safetensors file begin, and what and where each tensor is, in their order."""
    try:
        with file.open("rb") as stream:
            size = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(size))
        header.pop("__metadata__", None)
        return 8 + size, dict(sorted(header.items(), key=lambda entry: entry[1]["data_offsets"]))
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, MemoryError) as error:
        raise DataError(
            f"Model folder {file.parent}: {file.name} is not a safetensors file: its header cannot be read"
        ) from error
