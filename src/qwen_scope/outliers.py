"""Which residuals are left out of statistics and training for their extreme norm."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

NORM_OUTLIER = 5.0
"""A residual whose norm is more than this many times the median norm of its batch is an outlier: an attention sink or
the like. The report (section 2) leaves out "activations with an extreme L2 norm" without saying what is extreme; sinks
seen in the bundled model are 8 to 130 times the median, everything else stays below 2."""


def norm_outliers(x: Float[Tensor, "tokens d_model"]) -> Bool[Tensor, " tokens"]:
    """Which residuals have a norm above `NORM_OUTLIER` times the median norm of all given."""
    # Not x.float().norm(), which would hold all residuals once more.
    norms = torch.linalg.vector_norm(x, dim=1, dtype=torch.promote_types(x.dtype, torch.float32))
    return norms > NORM_OUTLIER * norms.median()
