"""Write a complete model in another program's format, as an output asks for; refuse what cannot be, before training.

Each format is a module of its own with libraries of its own, which are imported only where they are asked for.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from kubetune_trainer.config import OutputBase
from kubetune_trainer.config.outputs import GROUP_SIZE
from kubetune_trainer.errors import ConfigError, DataError
from kubetune_trainer.model.config import read_config
from kubetune_trainer.quantize.rounding import Rounded


def convert(
    output: OutputBase,
    source: Path,
    target: Path,
    *,
    rounded: Mapping[str, Rounded] | None = None,
    done: Callable[[], object] = lambda: None,
) -> None:
    """Write a model folder in the format of an output of type CompressedTensors, TorchAO, GGUF or ExecuTorch.

    Args:
        output: Says the format and its options.
        source: Complete model in Hugging Face format.
        target: Made if it is not there.
        rounded: Layers that are rounded already, by name; CompressedTensors alone can have them.
        done: Called after each tensor, where the format is written tensor by tensor.
    """
    group_size = output.group_size or GROUP_SIZE
    if output.type == "GGUF" and output.gguf is not None:
        from kubetune_trainer.export.gguf import save_gguf  # noqa: PLC0415

        save_gguf(source, target, type=output.gguf.type, name=output.name)
    elif output.type == "ExecuTorch":
        from kubetune_trainer.export.executorch import save_executorch  # noqa: PLC0415

        options = output.execu_torch.model_dump() if output.execu_torch else {}
        save_executorch(source, target, scheme=output.scheme, group_size=group_size, **options)
    elif output.type == "TorchAO":
        from kubetune_trainer.export.torchao import save_torchao  # noqa: PLC0415

        save_torchao(source, target, scheme=output.scheme, group_size=group_size, done=done)
    else:
        from kubetune_trainer.export.compressed_tensors import save_compressed_tensors  # noqa: PLC0415

        save_compressed_tensors(source, target, scheme=output.scheme, group_size=group_size, rounded=rounded, done=done)


def check_outputs(outputs: Iterable[OutputBase], folder: Path, *, title: str) -> list[str]:
    """Refuse outputs in formats that have no word for a model, long before there is anything to write.

    Args:
        outputs: Of a run.
        folder: The model folder; its weights need not be there.
        title: How messages name the run.

    Returns:
        Sentences about what a format carries in part only, of which its user must know.

    Raises:
        DataError: The model or its tokenizer has something that the format cannot carry.
        ConfigError: An option of the output does not fit the model.
    """
    limits = []
    for output in outputs:
        try:
            limits += [f"{title}: output {output.name}: {limit}" for limit in _check(output, folder)]
        except (ConfigError, DataError) as error:
            raise type(error)(f"{title}: output {output.name}: {error}", hint=error.hint) from error
    return limits


def _check(output: OutputBase, folder: Path) -> Sequence[str]:
    if output.type == "GGUF" and output.gguf is not None:
        from kubetune_trainer.export.gguf import check_gguf  # noqa: PLC0415
        from kubetune_trainer.export.gguf_tokenizer import tokenizer_limits  # noqa: PLC0415

        check_gguf(folder, type=output.gguf.type)
        return tokenizer_limits(folder, vocab_size=read_config(folder).vocab_size)
    if output.type == "ExecuTorch":
        from kubetune_trainer.export.executorch import check_executorch  # noqa: PLC0415

        options = output.execu_torch.model_dump() if output.execu_torch else {}
        check_executorch(folder, scheme=output.scheme, group_size=output.group_size or GROUP_SIZE, **options)
    elif output.type == "CompressedTensors":
        from kubetune_trainer.export.compressed_tensors import check_compressed_tensors  # noqa: PLC0415

        check_compressed_tensors(folder, scheme=output.scheme, group_size=output.group_size or GROUP_SIZE)
    elif output.type == "TorchAO":
        from kubetune_trainer.export.torchao import check_torchao  # noqa: PLC0415

        check_torchao(folder, scheme=output.scheme, group_size=output.group_size or GROUP_SIZE)
    return ()
