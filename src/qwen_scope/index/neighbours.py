"""Neighbours of a feature in its layer: by the direction it writes, and by the tokens at which it fires."""

from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from qwen_scope.index.ranking import Highest, Ranked, products
from qwen_scope.kernels import compiled_together
from qwen_scope.kernels.pairs import group_by_feature, share_features
from qwen_scope.sae import TopKSAE

LEAST_TOGETHER = 2
"""Tokens at which two features must both fire to count as neighbours: once is chance."""


@torch.no_grad()
def similar(sae: TopKSAE, count: int = 10) -> Ranked:
    """For every feature those with the nearest decoder directions, by cosine; itself left out.

    Of equal cosines the lower feature comes first; a direction of zeros has cosine 0 with every other. Products are made in
    blocks: there is never a (d_sae, d_sae) matrix.
    """
    rows = F.normalize(sae.W_dec.detach().T.float(), dim=1)
    best = Highest(len(rows), min(count, len(rows) - 1), rows.device)
    for some, first, cosines in products(rows, rows):
        itself = torch.arange(some.start, some.stop, device=rows.device)
        inside = (first <= itself) & (itself < first + cosines.shape[1])
        cosines[inside.nonzero().flatten(), itself[inside] - first] = -torch.inf
        best.add(cosines, some, first)
    found = best.result()
    return Ranked(found.numbers, found.values.clip(-1, 1))


def together(
    indices: Int[Tensor, "tokens k"], values: Float[Tensor, "tokens k"], d_sae: int, count: int = 10
) -> Ranked:
    """For every feature those that fire at the same tokens: by the share of tokens at which both fire, among those at which
    either does (Jaccard).

    Only pairs that fire together at `LEAST_TOGETHER` tokens count, so a feature that fires less often has no neighbours. Of
    equal shares the lower feature comes first. Takes time in proportion to tokens * k * k, and memory in proportion to the
    pairs given.

    Args:
        indices: features kept at each token of a sample, as `encode` gave them, on the CPU.
        values: theirs; a feature fires where its value is above 0.
        d_sae: number of features.
        count: how many neighbours are kept at most.

    Raises:
        QwenScopeError: an index that is no feature.
    """
    pairs = group_by_feature(indices, d_sae)
    fires = values > 0
    fired = torch.bincount(indices[fires].long(), minlength=d_sae)
    numbers = np.full((d_sae, count), -1, np.int32)
    shares = np.zeros((d_sae, count))
    loop = partial(
        compiled_together.most_together,
        *(array.numpy() for array in (pairs.starts, pairs.order, indices.contiguous(), fires.contiguous(), fired)),
        LEAST_TOGETHER,
        numbers,
        shares,
    )
    share_features(pairs, loop)
    return Ranked(numbers, shares.astype(np.float32))
