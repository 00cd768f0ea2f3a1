"""The one place where an attention kernel is chosen."""

import torch.nn.functional as F
from torch import Tensor


def attend(q_BKD: Tensor, k_BMD: Tensor, v_BMD: Tensor, *, heads: int) -> Tensor:
    """Multi-head softmax(q k^T / sqrt(d)) v: (B, K, D), (B, M, D), (B, M, D) -> (B, K, D).

    D is split into heads of d = D / heads channels. Fused kernels: no K x M matrix is made here.
    """
    b, k, d = q_BKD.shape

    def split(x_BND: Tensor) -> Tensor:
        return x_BND.view(b, -1, heads, d // heads).transpose(1, 2)

    out = F.scaled_dot_product_attention(split(q_BKD), split(k_BMD), split(v_BMD))
    return out.transpose(1, 2).reshape(b, k, d)
