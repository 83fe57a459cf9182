"""Text to token ids and back, by a model folder's `tokenizer.json` and what its configs say about special tokens."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers

from kubetune_trainer.errors import DataError
from kubetune_trainer.model_json import CONFIG_FILE, read_json

TOKENIZER_FILE = "tokenizer.json"
TOKENIZER_CONFIG_FILE = "tokenizer_config.json"
GENERATION_CONFIG_FILE = "generation_config.json"
CHAT_TEMPLATE_FILE = "chat_template.jinja"
ADDED_TOKENS_FILE = "added_tokens.json"
SPECIAL_TOKENS_FILE = "special_tokens_map.json"
TOKENIZER_FILES = (
    TOKENIZER_FILE, TOKENIZER_CONFIG_FILE, SPECIAL_TOKENS_FILE, ADDED_TOKENS_FILE, CHAT_TEMPLATE_FILE
)  # fmt: skip
"""What a model folder says about its tokenizer alone."""


@dataclass(frozen=True, kw_only=True)
class Tokenizer:
    """A tokenizer and what goes with it."""

    backend: tokenizers.Tokenizer
    """The tokenizer itself."""
    special_tokens: Mapping[str, str]
    """What chat templates may name: bos_token, eos_token, pad_token, unk_token and so on, where the model has them."""
    chat_template: str | None
    """Jinja source, where the model brings one."""
    bos_id: int | None
    """Begins a text; None where the model has no such token."""
    eos_id: int
    """Ends a text."""
    pad_id: int
    """Fills rows; eos_id where the model has none."""
    stop_ids: tuple[int, ...]
    """Each of these ends generation."""

    @property
    def vocab_size(self) -> int:
        """Number of tokens, added ones included."""
        return self.backend.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        """Return the token ids of a text; special tokens written out in it are recognised.

        Args:
            text: Any text.
            add_special_tokens: Whether the model's own beginning and end are put around it.
        """
        return self.backend.encode(text, add_special_tokens=add_special_tokens).ids

    def differs_from(self, other: "Tokenizer") -> str:
        """Say in which token another tokenizer differs; empty if the same ids mean the same to both."""
        mine, theirs = self.backend.get_vocab(), other.backend.get_vocab()
        for token in sorted(mine.keys() | theirs.keys()):
            if mine.get(token) != theirs.get(token):
                return f"{token!r} as id {theirs.get(token)} in place of {mine.get(token)}"
        return ""

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Return the text of token ids."""
        return self.backend.decode(list(ids), skip_special_tokens=skip_special_tokens)


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Load the tokenizer of a model folder.

    Raises:
        DataError: `tokenizer.json` is missing or damaged, or no file says which token ends a text.
    """
    folder = Path(path)
    backend = _load_backend(folder)
    config = _read_if_there(folder / TOKENIZER_CONFIG_FILE)
    ids = _read_if_there(folder / CONFIG_FILE) | _read_if_there(folder / GENERATION_CONFIG_FILE)
    special_tokens = _special_tokens(_read_if_there(folder / SPECIAL_TOKENS_FILE) | config)
    stop_ids = _as_ids(ids.get("eos_token_id"))
    eos_id = _id_of(backend, special_tokens.get("eos_token"), default=stop_ids[0] if stop_ids else None)
    if eos_id is None:
        raise DataError(
            f"Model folder {folder}: no file says which token ends a text",
            hint=f"Set eos_token in {TOKENIZER_CONFIG_FILE} or eos_token_id in {GENERATION_CONFIG_FILE}.",
        )
    pad_id = _id_of(backend, special_tokens.get("pad_token"), default=eos_id)
    return Tokenizer(
        backend=backend,
        special_tokens=special_tokens,
        chat_template=_chat_template(folder, config),
        bos_id=_id_of(backend, special_tokens.get("bos_token"), default=None),
        eos_id=eos_id,
        pad_id=eos_id if pad_id is None else pad_id,
        stop_ids=tuple(dict.fromkeys((*stop_ids, eos_id))),
    )


def read_chat_template(folder: Path) -> str | None:
    """Return the template of a model folder, None where it has none."""
    return _chat_template(folder, _read_if_there(folder / TOKENIZER_CONFIG_FILE))


def write_chat_template(folder: Path, template: str) -> None:
    """Make a template a folder's own: the file comes before what other files say, here and in transformers."""
    (folder / CHAT_TEMPLATE_FILE).write_text(template, encoding="utf-8")


def read_backend(folder: Path) -> tokenizers.Tokenizer:
    """Read `tokenizer.json` of a folder with all that it says.

    Raises:
        DataError: It is missing or damaged.
    """
    file = folder / TOKENIZER_FILE
    if not file.is_file():
        raise DataError(
            f"Model folder {folder}: {TOKENIZER_FILE} is missing",
            hint="Other tokenizer formats are converted by transformers' AutoTokenizer.save_pretrained.",
        )
    try:
        return tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises nothing narrower
        raise DataError(f"Model folder {folder}: {TOKENIZER_FILE} cannot be read: {error}") from error


def _load_backend(folder: Path) -> tokenizers.Tokenizer:
    backend = read_backend(folder)
    # The file may carry settings of the run that saved it; rows are cut and filled by the data store alone.
    backend.no_truncation()
    backend.no_padding()
    return backend


def _read_if_there(file: Path) -> dict[str, Any]:
    return read_json(file) if file.is_file() else {}


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """Collect `…_token` entries, which are strings or objects with the string in `content`."""
    tokens = {}
    for key, value in config.items():
        content = value.get("content") if isinstance(value, dict) else value
        if key.endswith("_token") and isinstance(content, str):
            tokens[key] = content
    return tokens


def _chat_template(folder: Path, config: Mapping[str, Any]) -> str | None:
    """Find the template: a file of its own first, then the config, where it may be one of several with names."""
    if (folder / CHAT_TEMPLATE_FILE).is_file():
        return (folder / CHAT_TEMPLATE_FILE).read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):
        named = {entry.get("name"): entry.get("template") for entry in template}
        return named.get("default")
    return template


def _as_ids(value: Any) -> list[int]:
    if value is None:
        return []
    return list(value) if isinstance(value, list) else [value]


def _id_of(backend: tokenizers.Tokenizer, token: str | None, *, default: int | None) -> int | None:
    found = backend.token_to_id(token) if token is not None else None
    return default if found is None else found
