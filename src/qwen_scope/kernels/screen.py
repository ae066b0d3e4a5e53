"""The exact encoder of a CPU: one fast, inexact product finds every feature that could matter, float64 decides.

**Statement.** Let `s_j = x . w_j + b_j` in real numbers and `p_j` the product of `x'` and `w'_j`, the operands as the
fast product takes them (rounded to bfloat16, or as they are), where that product

- sums in float32 or better, in any order: its error is at most `d_model * 2^-23 * |x'| |w'_j|`, twice the worst case of
  IEEE arithmetic, because some processors round sums inside an instruction otherwise;
- rounds its result to bfloat16 (`spread = 2^-8`) or leaves it in float32 (`spread = 0`);
- may flush numbers below 2^-126 to 0 anywhere.

Then, with `u_j = p_j + spread |p_j| + b_j`,

    s_j <= u_j + |x| |w_j - w'_j| + (|x - x'| + d_model * 2^-23 |x'|) |w'_j| + tiny

where `tiny = 2^-125 (1 + d_model + sqrt(d_model) (|x'| + max_j |w'_j|))`.

**Proof.** `x . w_j - x' . w'_j = x . (w_j - w'_j) + (x - x') . w'_j`; Cauchy-Schwarz bounds both terms. The sum's error and
the rounding of the result are as given, flushing at most `2 d_model` intermediate results and the result itself loses
2^-126 each, flushing parts of the operands at most `2^-126 (|x'|_1 + |w'_j|_1)`.

**Consequence.** Take any k features, compute their `s_j`; the least of these, `t`, is at most the k-th largest `s_j` of all.
A feature whose upper bound is below `t` is not among the k largest. The others get a float64 product (in all about 1.2 k on
real residuals, 1.7 k on Gaussian ones), rounded once to float32. What is returned is therefore the k largest of the exact
pre-activations, the lower feature first among equals, whatever the batch and the number of threads. Another processor may
add up float64 sums in another order, which shows after rounding about once in a hundred million values.

Errors and comparisons are computed in float64 and widened by `SLACK` = 2^-20 of their size. `u_j` itself is float32: rounding
its product with 1 + spread loses 2^-24 |p_j|, for which `spread` is taken 1.0001 times as large (2^-21 |p_j| more), and
rounding its sum with the bias loses 2^-24 |u_j|, which near `t` lies within the slack.

The first k candidates also test the bound itself: an exact value above its bound means that the weights have changed
behind our back or that the product is worse than assumed. Then nothing is returned (`BoundBroken`).
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from qwen_scope.kernels import reference
from qwen_scope.kernels.threads import share

Product = Literal["bfloat16", "float32"]

CHUNK_TOKENS = 512
"""Tokens in one product: enough to read the weights once for all of them at full speed."""
CHUNK_BYTES = 32 * 2**20
"""Approximate pre-activations held at a time."""
BLOCK = 32
"""Features whose largest value stands for them, where there are plenty."""
FEW_TOKENS = 2
"""Up to here one pass over the weights by loops of our own is faster than a matrix product."""
SPREAD = 2**-8 * 1.0001
"""Relative error of a result rounded to bfloat16, and room for rounding the bound itself, see above."""
LARGEST = 1e37
"""Rows and biases that could come near float32's largest number are not screened."""


class BoundBroken(Exception):
    """An exact pre-activation lies above its proven bound: the weights were changed, or the product is not as assumed."""


@dataclass(frozen=True, eq=False)
class Screen:
    """An encoder prepared for screening: what the fast product reads, and two norms per feature."""

    product: Product
    W_enc: Float[Tensor, "d_sae d_model"]
    """The weights, float32 or bfloat16, contiguous; shared with the SAE, not copied."""
    operand: Float[Tensor, "d_sae d_model"]
    """What the product reads: `W_enc` itself if it has the dtype of the product."""
    b_enc: Float[np.ndarray, " d_sae"]
    lost: Float[np.ndarray, " d_sae"]
    """|w_j - w'_j|."""
    length: Float[np.ndarray, " d_sae"]
    """|w'_j|."""
    copied: int
    """Bytes of the above two that are neither the SAE's own nor a file's."""

    @staticmethod
    def of(W_enc: Float[Tensor, "d_sae d_model"], b_enc: Float[Tensor, " d_sae"], product: Product) -> "Screen | None":
        """Prepares an encoder on the CPU, in one pass over its weights.

        None where a weight is not finite, or a bias not below `LARGEST` in size.
        """
        from qwen_scope.kernels import compiled

        weights, bias = W_enc.detach().contiguous(), b_enc.detach().float().numpy().copy()
        d_sae = len(weights)
        norm, lost, length = np.zeros(d_sae), np.zeros(d_sae), np.zeros(d_sae)
        if product == "bfloat16" and weights.dtype == torch.float32:
            operand = torch.empty(weights.shape, dtype=torch.bfloat16)
            share(partial(compiled.round_rows, weights.numpy(), bits(operand), norm, length, lost), d_sae)
        else:
            operand = weights.to(torch.bfloat16 if product == "bfloat16" else torch.float32)
            share(partial(compiled.row_norms, bits(operand), length), d_sae)
            norm = length
        # Not `>`: comparisons with NaN are false.
        if not (np.isfinite(norm).all() and np.isfinite(length).all() and (np.abs(bias) < LARGEST).all()):
            return None
        own = (weights if weights.data_ptr() != W_enc.data_ptr() else None, None if operand is weights else operand)
        return Screen(product, weights, operand, bias, lost, length, sum(t.nbytes for t in own if t is not None))

    @property
    def nbytes(self) -> int:
        """Bytes that this takes beside the SAE's own tensors."""
        return self.copied + self.b_enc.nbytes + self.lost.nbytes + self.length.nbytes

    def sums_in_float32(self) -> bool:
        """Whether the product on this machine sums in float32, as the bound assumes; tried on sums that would show it."""
        d_model = self.operand.shape[1]
        for tokens in (FEW_TOKENS + 1, CHUNK_TOKENS // 4):
            x = torch.ones(tokens, d_model, dtype=self.operand.dtype)
            weights = torch.full((BLOCK, d_model), 0.5, dtype=self.operand.dtype)
            weights[:, 0] = 512.0  # so large that bfloat16 loses each of the halves that follow
            exact = 512.0 + 0.5 * (d_model - 1)
            out = torch.empty(tokens, BLOCK, dtype=self.operand.dtype)
            share(partial(_multiply, x, weights, out), BLOCK, BLOCK, calls_torch=True)
            if ((out.double() - exact).abs() > exact * (2**-8 if out.dtype == torch.bfloat16 else 2**-12)).any():
                return False
        return True

    def encode(
        self, x: Float[Tensor, "tokens d_model"], k: int
    ) -> tuple[Int[Tensor, "tokens k"], Float[Tensor, "tokens k"]]:
        """As `reference.encode`, but of the exact pre-activations (see above).

        Rows that the bound leaves too many candidates of are computed in float64 for all features.

        Raises:
            QwenScopeError: a token's pre-activations hold a NaN or an infinity.
            BoundBroken: see there.
        """
        from qwen_scope.kernels.compiled import BOUND_BROKEN

        tokens, d_sae = len(x), len(self.b_enc)
        indices, values = torch.empty(tokens, k, dtype=torch.long), torch.empty(tokens, k)
        computed = np.zeros(tokens, np.int32)
        most = min(d_sae, max(4 * k + 64, d_sae // 16))
        chunk = max(1, min(CHUNK_TOKENS, CHUNK_BYTES // (d_sae * self.operand.element_size()), tokens))
        room = torch.empty(chunk, d_sae, dtype=self.operand.dtype if chunk > FEW_TOKENS else torch.float32)
        scratch = tuple(np.empty((chunk, most), dtype) for dtype in (np.int64, np.int32, np.int64))
        for start in range(0, tokens, chunk):
            rows = slice(start, min(start + chunk, tokens))
            found = (indices[rows].numpy(), values[rows].numpy(), computed[rows])
            self._encode_chunk(x[rows].detach().float().contiguous(), k, room, scratch, *found)
        if (computed == BOUND_BROKEN).any():
            raise BoundBroken
        left = torch.from_numpy(computed < 0)
        if left.any():
            bias = torch.from_numpy(self.b_enc)
            indices[left], values[left] = reference.encode_rows(x[left].detach(), self.W_enc, bias, k, torch.float64)
            reference.refuse_non_finite(values)
        return indices, values

    def _blocks(self, k: int) -> int:
        """Eight times as many as are needed, if there are as many features."""
        return -(-len(self.b_enc) // max(1, min(BLOCK, len(self.b_enc) // (8 * k))))

    def _encode_chunk(
        self,
        x: Float[Tensor, "chunk d_model"],
        k: int,
        room: Tensor,
        scratch: tuple[np.ndarray, ...],
        indices: Int[np.ndarray, "chunk k"],
        values: Float[np.ndarray, "chunk k"],
        computed: Int[np.ndarray, " chunk"],
    ) -> None:
        from qwen_scope.kernels import compiled

        tokens, d_model = x.shape
        norm, lost, length = np.zeros(tokens), np.zeros(tokens), np.zeros(tokens)
        if self.product == "bfloat16":
            operand = torch.empty(x.shape, dtype=torch.bfloat16)
            share(partial(compiled.round_rows, x.numpy(), bits(operand), norm, length, lost), tokens)
        else:
            operand = x
            compiled.row_norms(x.numpy(), length, 0, tokens)
            norm = length
        largest = float(self.length.max() + self.lost.max())
        # Not `>`: comparisons with NaN are false.
        computed[~(norm * max(largest, 1.0) < LARGEST)] = compiled.TOO_MANY
        approx = room[:tokens]
        if len(room) <= FEW_TOKENS:
            few = operand.float()
            share(partial(compiled.products, few.numpy(), bits(self.operand), approx.numpy()), len(self.b_enc), BLOCK)
        else:
            share(partial(_multiply, operand, self.operand, approx), len(self.b_enc), BLOCK, calls_torch=True)
        flushed = 2.0**-125 * (1 + d_model + d_model**0.5 * (float(length[computed == 0].max(initial=0)) + largest))
        rounded = approx.dtype == torch.bfloat16
        select = partial(
            compiled.select,
            bits(approx),
            np.float32(SPREAD if rounded else 0),
            x.numpy(),
            bits(self.W_enc),
            self.b_enc,
            self.lost,
            self.length,
            norm,
            lost + d_model * 2.0**-23 * length,
            flushed,
            self._blocks(k),
            k,
            *scratch,
            indices,
            values,
            computed,
        )
        share(select, tokens)


@torch.inference_mode()  # what the caller's thread made there could not be written to otherwise
def _multiply(x: Tensor, weights: Tensor, out: Tensor, start: int, stop: int) -> None:
    torch.mm(x, weights[start:stop].T, out=out[:, start:stop])


def bits(tensor: Tensor) -> Any:
    """A tensor as numpy takes it: bfloat16 as the uint16 of its bits."""
    return (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()
