"""Rows of the embedding that are trained while all others are frozen, with peft's names (its trainable tokens).

The embedding keeps its weight; beside it comes `embed_tokens.token_adapter.trainable_tokens_delta` (tokens, D).
Whatever that name says, these rows are no differences: they stand in the place of the embedding's own. An output head
that is the embedding has the same rows; one of its own has rows of its own,
`lm_head.token_adapter.trainable_tokens_delta`.

Shapes: B batch, T tokens, N trained tokens, D hidden_size, V vocab_size.
"""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

ROWS_SUFFIX = ".token_adapter.trainable_tokens_delta"
IDS_SUFFIX = ".token_adapter.token_indices"
"""Beside rows that are gathered: whose they are. peft keeps that in adapter_config.json."""
TABLES = ("model.embed_tokens", "lm_head")
"""What has a row for each token."""


class TokenAdapter(nn.Module):
    """Trained rows of a table beside it, fp32.

    Args:
        table: Where the rows belong; they begin as its own, or without values where it has no memory yet.
        ids: Whose rows they are.
    """

    def __init__(self, table: Tensor, *, ids: Sequence[int]) -> None:
        super().__init__()
        self.ids = tuple(ids)
        self.enabled = True
        """Whether the rows are used; see `without_adapters`."""
        self.trainable_tokens_delta = nn.Parameter(table.detach()[list(ids)].float())

    def looked_up(self, x_BTD: Tensor, tokens_BT: Tensor) -> Tensor:
        """Put the trained rows where their tokens were looked up."""
        if not self.enabled:
            return x_BTD
        # A product with ones and zeros: exact, and its gradient is summed in the same order every time.
        is_id_BTN = tokens_BT[..., None] == self._ids_on(tokens_BT.device)
        rows_BTD = is_id_BTN.to(x_BTD.dtype) @ self.trainable_tokens_delta.to(x_BTD.dtype)
        return torch.where(is_id_BTN.any(dim=-1, keepdim=True), rows_BTD, x_BTD)

    def replaced(self, table_VD: Tensor) -> Tensor:
        """Return the table with the trained rows in it."""
        if not self.enabled:
            return table_VD
        return table_VD.index_copy(0, self._ids_on(table_VD.device), self.trainable_tokens_delta.to(table_VD.dtype))

    def _ids_on(self, device: torch.device) -> Tensor:
        return torch.tensor(self.ids, device=device)


def train_tokens(model: nn.Module, ids: Sequence[int]) -> None:
    """Put trained rows for these tokens beside a model's embedding, and beside an output head of its own, in place."""
    for name in TABLES:
        if hasattr(model, name.partition(".")[0]):
            table = model.get_submodule(name)
            table.token_adapter = TokenAdapter(table.weight, ids=ids)


def token_adapters(model: nn.Module) -> dict[str, TokenAdapter]:
    """Return a model's trained rows by the name of the table that they belong to."""
    found = ((name, module) for name, module in model.named_modules() if isinstance(module, TokenAdapter))
    return {name.removesuffix(".token_adapter"): module for name, module in found}


def token_ids(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield whose the trained rows of each table are, under `IDS_SUFFIX`."""
    for name, adapter in token_adapters(model).items():
        yield name + IDS_SUFFIX, torch.tensor(adapter.ids)


def with_rows(name: str, table: Tensor, adapters: Mapping[str, Tensor]) -> Tensor:
    """Put gathered rows into the table that they belong to, in fp32; another weight is returned as it is.

    Args:
        name: Name of the weight.
        table: The weight.
        adapters: What `lora_state_dict` gathered.
    """
    layer = name.removesuffix(".weight")
    rows = adapters.get(layer + ROWS_SUFFIX)
    return table if rows is None else table.float().index_copy(0, adapters[layer + IDS_SUFFIX], rows.float())


def rows_by_token(adapters: Mapping[str, Tensor]) -> dict[str, dict[int, Tensor]]:
    """Return gathered rows by the name of their table and by token."""
    tables = {name.removesuffix(IDS_SUFFIX): ids for name, ids in adapters.items() if name.endswith(IDS_SUFFIX)}
    return {table: dict(zip(ids.tolist(), adapters[table + ROWS_SUFFIX], strict=True)) for table, ids in tables.items()}
