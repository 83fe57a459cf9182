"""Calibrated rounding (GPTQ, arXiv 2210.17323): the error that rounding a weight makes is spread over those after it.

For each linear layer, H = X^T X of its inputs says which errors of its weights can stand in for each other. Columns are
rounded one after the other, and what each loses is taken up by the columns that are still to come.

Legend: O outputs, I inputs, G groups of a row, C columns of one pass.
"""

from typing import Final

import torch
from torch import Tensor

from kubetune_trainer.quantize.rounding import Rounded, integer_range, symmetric_scales

DAMPING: Final = 0.01
"""Part of the mean diagonal that is added to the diagonal, so that inputs which are hardly used cannot blow up."""
MOST_DAMPING: Final = 100.0
"""With so much the Hessian is all but diagonal; one that still has no inverse is no matrix of numbers."""
COLUMNS_AT_ONCE: Final = 128
"""Columns whose errors are carried to the rest of the matrix in one product."""


def gptq(weight: Tensor, hessian: Tensor, *, bits: int, group_size: int | None, damping: float = DAMPING) -> Rounded:
    """Round one matrix so that its outputs change little on the data that the Hessian was made of.

    Columns with the largest inputs come first, while nearly all others can still take up their error. Scales are fixed
    before, so that the order changes nothing about which weights share one.

    Args:
        weight: (O, I).
        hessian: X^T X of its inputs, up to a factor, (I, I).
        bits: 4 or 8.
        group_size: Weights of a row that share a scale; None means all of them.
        damping: Part of the Hessian's mean diagonal that is added to it; more of it where that is not enough.

    Raises:
        ValueError: The rows are not a whole number of groups, or the Hessian is not made of finite numbers.
    """
    scales_OG = symmetric_scales(weight, bits=bits, group_size=group_size)
    columns = weight.shape[1]
    scales_OI = scales_OG.repeat_interleave(columns // scales_OG.shape[1], dim=1)
    order_I = hessian.diagonal().argsort(descending=True, stable=True)
    rest_OI, scales_OI = weight.float()[:, order_I], scales_OI[:, order_I]
    inverse_II = _inverse_factor(hessian[order_I][:, order_I], damping=damping)
    values_OI = torch.empty_like(rest_OI)
    low, high = integer_range(bits)
    for begin in range(0, columns, COLUMNS_AT_ONCE):
        end = min(begin + COLUMNS_AT_ONCE, columns)
        errors_OC = torch.empty_like(rest_OI[:, begin:end])
        for column in range(begin, end):
            scale_O = scales_OI[:, column]
            values_OI[:, column] = (rest_OI[:, column] / scale_O).round_().clamp_(low, high)
            lost_O = rest_OI[:, column] - values_OI[:, column] * scale_O
            errors_OC[:, column - begin] = lost_O / inverse_II[column, column]
            rest_OI[:, column:end] -= errors_OC[:, column - begin, None] * inverse_II[column, column:end]
        rest_OI[:, end:] -= errors_OC @ inverse_II[begin:end, end:]
    back_I = order_I.argsort()
    return Rounded(
        values=values_OI[:, back_I].to(torch.int8).contiguous().cpu(),
        scales=scales_OG.cpu(),
        group_size=group_size,
        bits=bits,
    )


def _inverse_factor(hessian_II: Tensor, *, damping: float) -> Tensor:
    """Return the upper Cholesky factor of the damped Hessian's inverse; changes the Hessian, which may be large."""
    mean, added = float(hessian_II.diagonal().mean()) or 1.0, 0.0
    while damping <= MOST_DAMPING:
        hessian_II.diagonal().add_((damping - added) * mean)
        factor_II, failed = torch.linalg.cholesky_ex(hessian_II)
        if not failed:
            inverse_II = torch.cholesky_inverse(factor_II)
            del factor_II
            factor_II, failed = torch.linalg.cholesky_ex(inverse_II, upper=True)
        if not failed and factor_II.isfinite().all():
            return factor_II
        damping, added = 10 * damping, damping  # in fp32, inputs that nearly repeat each other are not quite positive
    raise ValueError("a Hessian must be made of finite numbers")
