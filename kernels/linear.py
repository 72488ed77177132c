"""The linear layer: torch's own, or on the CPU and for few rows the native kernel.

`F.linear` in bf16 repacks its weight at every call, which for one row takes as long as reading it.
Shapes: T packed tokens, E inputs, F outputs.
"""

import torch
import torch.nn.functional as functional
from torch import Tensor

from minigen.kernels import native


def linear(x_TE: Tensor, weight_FE: Tensor, bias_F: Tensor | None = None) -> Tensor:
    """x_TE @ weight_FE.T + bias_F, [T, F] in the dtype of x, added up in float32.

    Raises ValueError (or what `F.linear` raises) where shapes or dtypes do not fit.
    """
    if native.serves(x_TE, weight_FE):
        return torch.ops.minigen.native_linear(x_TE, weight_FE, bias_F)
    return functional.linear(x_TE, weight_FE, bias_F)
