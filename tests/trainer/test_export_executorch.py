"""ExecuTorch programs are run by executorch's own runtime, token by token and prompt at once."""

from pathlib import Path
from typing import Any

import pytest
import torch

from kubetune_trainer import generate, load_model
from kubetune_trainer.errors import ConfigError, DataError
from kubetune_trainer.export.executorch import (
    PROGRAM_FILE,
    QUANTIZED,
    ExecuTorchModel,
    _CachedDecoder,
    _quantize,
    save_executorch,
)
from tests.recipes.tiny import write_tokenizer
from tests.trainer.tiny import make_folder

SHAPE: dict[str, Any] = {
    "vocab_size": 320, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "tie_word_embeddings": True,
}  # fmt: skip
PROMPT = [17, 200, 31, 8, 99]


def tiny_folder(folder: Path, **changes: Any) -> Path:
    make_folder(folder, **(SHAPE | changes))
    write_tokenizer(folder)
    return folder


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


def greedy(program: ExecuTorchModel, prompt: list[int], *, num_tokens: int) -> list[int]:
    answer, fed = [], prompt
    for _ in range(num_tokens):
        start = len(prompt) + len(answer) - len(fed)
        fed = [int(program.step(fed, start=start).argmax())]
        answer += fed
    return answer


def test_the_runtime_answers_token_for_token_as_we_do(tmp_path: Path) -> None:
    source = tiny_folder(tmp_path / "source")
    model = load_model(source, dtype=torch.float32)
    save_executorch(source, tmp_path / "target", max_sequence_length=32)
    program = ExecuTorchModel(tmp_path / "target")
    assert greedy(program, PROMPT, num_tokens=20) == generate(model, [PROMPT], max_new_tokens=20, stop_ids=[])[0]
    other = PROMPT[::-1]
    assert greedy(program, other, num_tokens=20) == generate(model, [other], max_new_tokens=20, stop_ids=[])[0]
    tokens = torch.tensor([PROMPT, other])
    with torch.no_grad():
        torch.testing.assert_close(program.logits(tokens), model(tokens), atol=1e-4, rtol=1e-4)
    assert (program.max_length, program.fact("get_vocab_size"), program.fact("use_kv_cache")) == (32, 320, True)
    assert program.fact("get_eos_ids") == [2, 0]
    assert {"model.pte", "config.json", "tokenizer.json"} <= {path.name for path in (tmp_path / "target").iterdir()}
    with pytest.raises(ValueError, match="the cache holds 32 tokens, got 33"):
        program.step([5] * 2, start=31)


def test_a_quantized_program_is_smaller_and_stays_near(tmp_path: Path) -> None:
    source = tiny_folder(tmp_path / "source", hidden_size=128, intermediate_size=256, initializer_range=0.05)
    model = load_model(source, dtype=torch.float32)
    save_executorch(source, tmp_path / "target", max_sequence_length=16, scheme=QUANTIZED, group_size=32)
    weights = sum(parameter.nbytes for parameter in model.parameters())
    assert (tmp_path / "target" / PROGRAM_FILE).stat().st_size < 0.6 * weights
    tokens = torch.tensor([PROMPT * 3])
    with torch.no_grad():
        wanted = model(tokens)
        module = _CachedDecoder(model, max_length=16)
        _quantize(module, group_size=32)
        in_torch = module(tokens, torch.tensor([0]))[0]
    program = ExecuTorchModel(tmp_path / "target")
    assert relative(program.step(tokens[0].tolist(), start=0), in_torch) < 0.02, "only rounding of activations differs"
    assert 0.001 < relative(program.logits(tokens), wanted) < 0.25, "4-bit weights carry about 20 dB each"


@pytest.mark.parametrize(
    ("changes", "options", "error", "words"),
    [
        ({}, {"max_sequence_length": 65}, ConfigError, "max_sequence_length must be at most the model's 64, got 65"),
        (
            {}, {"max_sequence_length": 32, "scheme": "NF4"}, ConfigError,
            "scheme must be Int8DynamicActivationInt4Weight or none .* got NF4",
        ),
        (
            {}, {"max_sequence_length": 32, "scheme": QUANTIZED, "group_size": 64}, ConfigError,
            r"group_size must divide the widths of the model's layers \(64, 96\), got 64",
        ),
        (
            {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}},
            {"max_sequence_length": 65}, ConfigError, "max_sequence_length must be at most the model's 64, got 65",
        ),
    ],
)  # fmt: skip
def test_what_a_program_cannot_be_is_refused_before_anything_is_written(
    tmp_path: Path, changes: dict[str, Any], options: dict[str, Any], error: type[Exception], words: str
) -> None:
    source = tiny_folder(tmp_path / "source", **changes)
    with pytest.raises(error, match=words):
        save_executorch(source, tmp_path / "target", **options)
    assert not (tmp_path / "target").exists()


def test_a_missing_program_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"model.pte is missing"):
        ExecuTorchModel(tmp_path)
