"""Error feedback: a step chooses the signs of a block of columns, matrix products bring the later blocks up to date."""

from collections.abc import Callable

from bwla_kernels.sign_search.metric import Metric, Target
from bwla_kernels.sign_search.products import rounded_product
from bwla_kernels.sign_search.steps import blocks
from torch import Tensor


def gptq_signs(
    step: Callable[..., None], target: Target, metric: Metric, scale: Tensor, dots: Tensor, norms: Tensor
) -> Tensor:
    """Choose signs column by column, see `metric`.

    Args:
        step: the op that chooses the signs of a block: `bwla::choose_signs`, or `bwla::choose_levels`.
        target: the weight [N, K].
        metric: what the error is measured with.
        scale: initial scales of C candidates, or of C planes, float32 [C, N].
        dots, norms: sums that the step adds to.

    Returns: signs, float32 [K, C, N].
    """
    rows, columns = target.weight.shape
    sign = scale.new_empty(columns, *scale.shape)
    row_major = scale.new_empty(len(scale) * rows, columns)
    for block in blocks(columns, sign.device):
        before, through = slice(0, block.start), slice(0, block.stop)
        product = rounded_product(metric.factor[before, block].mT, row_major[:, before])
        step(
            rounded_product(metric.factor[through, block].mT, target.weight[:, through]),
            product.view(-1, *scale.shape),
            metric.factor[block, block].contiguous(),
            metric.pivots[block],
            scale,
            sign[block],
            dots,
            norms,
        )
        row_major[:, block] = sign[block].flatten(1).mT
    return sign
