"""AdamW that needs less memory: moments in 8 or 4 bits (arXiv 2110.02861, arXiv 2309.01507), weights in bf16 alone.

A moment in few bits is a code for each number, its place in a codebook, and in fp32 the largest number of each block of
a row. Blocks lie inside rows: a shard of rows has whole ones and a checkpoint suits any number of ranks. Weights
in bf16 are rounded by chance (arXiv 2010.06192): rounded to the nearest, they would not see a step that is much smaller
than they are. Chance is a function of seed, step, weight and shard: a resumed run has the same, and so have the ranks
that hold copies of a shard.

Every update is computed in fp32 by the kernel that plain AdamW uses, some rows at a time.

Shapes: R rows and C columns of a weight's local part, N blocks of a row.
"""

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Final, Literal

import torch
from torch import Tensor
from torch.nn import functional
from torch.optim.adamw import adamw

from kubetune_trainer.distributed import local_part, shard_number

BLOCKS: Final = {8: 256, 4: 128}
"""Numbers that share a scale, by bits, as torchao has them."""
SMALLEST: Final = 4096
"""Weights with fewer numbers, and those that are no matrices, have moments in fp32."""
CHUNK_NUMBERS: Final = 2**21
"""Numbers of a weight that are updated at once: more leave glibc holes that it keeps, fewer are many calls."""
SMALLEST_SCALE: Final = 1e-12
MOMENTS: Final = ("exp_avg", "exp_avg_sq")
Bits = Literal[4, 8]


@dataclass(frozen=True, kw_only=True)
class Codebook:
    """What codes stand for, and the way from a number to the nearest one's code.

    Among numbers with the same upper 16 bits lies one bound between codes at most, as long as codes are further apart
    than a 128th of a number: two looks into a table and a comparison then do what a search through all codes would.
    """

    values: Tensor
    """Of each code, ascending."""
    lower: Tensor
    """The code of the smallest number with these upper 16 bits, (65536,)."""
    bound: Tensor
    """From where on a number with these upper 16 bits has the next code, (65536,)."""

    @classmethod
    def of(cls, values: Tensor) -> "Codebook":
        """Make one of what its codes stand for, ascending fp32."""
        between = (values[1:] + values[:-1]) / 2
        upper = torch.arange(-(2**15), 2**15, dtype=torch.int32, device=values.device).roll(2**15) << 16
        ends = torch.stack((upper, upper | 0xFFFF)).view(torch.float32)
        lower, upmost = torch.bucketize(ends.sort(dim=0).values, between, right=True)
        assert (upmost - lower)[~ends.isnan().any(dim=0)].amax() <= 1, "codes are too near to each other"
        after = torch.cat((between, between.new_tensor([torch.inf])))
        return cls(values=values, lower=lower.to(torch.uint8), bound=after[lower])


class CompactAdamW(torch.optim.Optimizer):
    """AdamW with moments in few bits, weights that are rounded by chance, or both.

    Args:
        groups: As torch's optimizers take them.
        lr: Learning rate of groups that say none.
        bits: Of the moments; None keeps them in the weight's own type.
        rounding_seed: Decides how bf16 weights, and moments in bf16, are rounded; None rounds to the nearest.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        *,
        lr: float,
        bits: Bits | None = None,
        rounding_seed: int | None = None,
    ) -> None:
        super().__init__(groups, {"lr": lr, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0})
        self._bits, self._rounding_seed = bits, rounding_seed
        self._codebooks: dict[tuple[str, torch.device], Codebook] = {}
        weights = [weight for group in self.param_groups for weight in group["params"]]
        self._numbers = {weight: number for number, weight in enumerate(weights)}

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every weight that has a gradient."""
        assert closure is None, "nothing here is evaluated twice"
        given = [
            (weight, group) for group in self.param_groups for weight in group["params"] if weight.grad is not None
        ]
        for weight, _ in given:  # before all updates, whose temporaries would leave holes between what stays
            self._begin(weight)
        for weight, group in given:
            self._update(weight, group)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a state as it is; torch would bring codes and scales to the type of their weight."""
        super().load_state_dict(state_dict)
        for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=True):
            for weight, number in zip(group["params"], saved["params"], strict=True):
                self.state[weight].update(state_dict["state"].get(number, {}))

    def _begin(self, weight: Tensor) -> None:
        state = self.state[weight]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            for moment in MOMENTS:
                state.update(self._zeros(moment, weight))

    def _update(self, weight: Tensor, group: dict[str, Any]) -> None:
        state = self.state[weight]
        values, gradient = local_part(weight.detach()), local_part(weight.grad)
        randomness = self._randomness(weight, step=int(state["step"]))
        rows = max(1, CHUNK_NUMBERS // max(1, values[:1].numel()))
        done = state["step"].to(values.device)
        for start in range(0, len(values), rows):
            chunk = slice(start, start + rows)
            moments = [self._read(state, moment, chunk) for moment in MOMENTS]
            updated = values[chunk].float()
            adamw(
                [updated], [gradient[chunk].float()], [moments[0]], [moments[1]], [],
                [done.clone()],
                fused=True, amsgrad=False, maximize=False, lr=group["lr"], beta1=group["betas"][0],
                beta2=group["betas"][1], eps=group["eps"], weight_decay=group["weight_decay"],
            )  # fmt: skip
            values[chunk].copy_(_rounded(updated, values.dtype, randomness))
            for moment, found in zip(MOMENTS, moments, strict=True):
                self._write(state, moment, chunk, found, randomness)
        state["step"] += 1

    def _zeros(self, moment: str, weight: Tensor) -> dict[str, Tensor]:
        """Return the first state of a moment, sharded as its weight is."""
        if self._bits is None:
            return {moment: torch.zeros_like(weight)}
        if weight.dim() != 2 or weight.numel() < SMALLEST or weight.shape[1] % 2:
            return {moment: torch.zeros_like(weight, dtype=torch.float32)}
        columns = weight.shape[1]
        widths = {moment: columns if self._bits == 8 else columns // 2, f"{moment}_scale": -(-columns // self._block)}
        types = {moment: torch.uint8, f"{moment}_scale": torch.float32}
        return {name: _zeros_by_rows(weight, width, types[name]) for name, width in widths.items()}

    def _read(self, state: dict[str, Tensor], moment: str, rows: slice) -> Tensor:
        kept = local_part(state[moment])[rows]
        if kept.dtype != torch.uint8:
            return kept.float() if kept.dtype != torch.float32 else kept
        codes = kept if self._bits == 8 else torch.stack((kept >> 4, kept & 15), dim=-1).flatten(1)
        return decode(
            codes, local_part(state[f"{moment}_scale"])[rows], self._codebook(moment, kept.device), self._block
        )

    def _write(
        self, state: dict[str, Tensor], moment: str, rows: slice, values: Tensor, randomness: torch.Generator | None
    ) -> None:
        kept = local_part(state[moment])[rows]
        if kept.dtype != torch.uint8:
            kept.copy_(_rounded(values, kept.dtype, randomness))
            return
        codes, scale = encode(values, self._codebook(moment, kept.device), self._block)
        kept.copy_(codes if self._bits == 8 else codes[:, ::2] << 4 | codes[:, 1::2])
        local_part(state[f"{moment}_scale"])[rows].copy_(scale)

    @property
    def _block(self) -> int:
        assert self._bits is not None
        return BLOCKS[self._bits]

    def _codebook(self, moment: str, device: torch.device) -> Codebook:
        """Return that of a moment; the second has no sign."""
        if (moment, device) not in self._codebooks:
            from torchao.optim import subclass_4bit, subclass_8bit  # noqa: PLC0415 (seconds, for those who need it)

            known = subclass_8bit if self._bits == 8 else subclass_4bit
            values = known.get_qmap_signed() if moment == "exp_avg" else known.get_qmap_unsigned()
            self._codebooks[moment, device] = Codebook.of(torch.tensor(values, dtype=torch.float32, device=device))
        return self._codebooks[moment, device]

    def _randomness(self, weight: Tensor, *, step: int) -> torch.Generator | None:
        if self._rounding_seed is None or weight.dtype != torch.bfloat16:
            return None
        drawn_for = self._rounding_seed, step, self._numbers[weight], shard_number(weight)
        digest = hashlib.sha256(repr(drawn_for).encode()).digest()
        return torch.Generator(weight.device).manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def encode(values_RC: Tensor, codebook: Codebook, block: int) -> tuple[Tensor, Tensor]:
    """Return the code of each number (R, C), the nearest in the codebook, and the scale of each block (R, N)."""
    columns = values_RC.shape[1]
    blocks = functional.pad(values_RC, (0, -columns % block)).unflatten(1, (-1, block))
    scale_RN = blocks.abs().amax(dim=-1).clamp(min=SMALLEST_SCALE)
    scaled = (blocks / scale_RN[..., None]).flatten()
    upper = scaled.view(torch.int32) >> 16 & 0xFFFF
    codes = codebook.lower.index_select(0, upper)
    codes += scaled >= codebook.bound.index_select(0, upper)
    return codes.view(len(values_RC), -1)[:, :columns], scale_RN


def decode(codes_RC: Tensor, scale_RN: Tensor, codebook: Codebook, block: int) -> Tensor:
    """Return the numbers that codes stand for."""
    values_RC = codebook.values.index_select(0, codes_RC.flatten().int()).view(codes_RC.shape)
    return values_RC.mul_(scale_RN.repeat_interleave(block, dim=1)[:, : codes_RC.shape[1]])


def round_by_chance(values: Tensor, randomness: torch.Generator) -> Tensor:
    """Round fp32 to one of the two bf16 neighbours, the nearer the likelier, so that the mean is the number itself."""
    drawn = torch.empty(-(-values.numel() // 4), dtype=torch.int64, device=values.device)  # one for four numbers
    drawn.random_(-(2**63), None, generator=randomness)
    noise = drawn.view(torch.uint16)[: values.numel()].int().view(values.shape)
    bits = values.contiguous().view(torch.int32)
    # What is not finite stays what it is: an addition to its bits would make another number of it.
    carried = torch.where(values - values == 0, bits + noise, bits)
    return (carried & -(2**16)).view(torch.float32).bfloat16()


def _rounded(values: Tensor, dtype: torch.dtype, randomness: torch.Generator | None) -> Tensor:
    if dtype != torch.bfloat16 or randomness is None:
        return values.to(dtype)
    return round_by_chance(values, randomness)


def _zeros_by_rows(weight: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """Return zeros with as many rows as a weight, which lie where its rows lie.

    Made of the weight itself: parts that FSDP keeps on the CPU would go to the ranks' device with `DTensor.from_local`.
    """
    like = weight.detach()[:, :1].expand(-1, width)
    return torch.zeros_like(like, dtype=dtype, memory_format=torch.contiguous_format)
