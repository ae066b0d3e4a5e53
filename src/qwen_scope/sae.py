"""`TopKSAE`: one trained sparse autoencoder, tensors only (files are `checkpoint`'s business, text is `scope`'s)."""

from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from qwen_scope import kernels
from qwen_scope.errors import QwenScopeError
from qwen_scope.features import SparseFeatures

Activation = Literal["topk", "topk_relu"]
"""What happens to a kept pre-activation below 0: `topk` keeps it, as the model card does; `topk_relu` makes it 0,
as the report, the published demo and most trainers do. The two differ only where fewer than k are positive."""


class TopKSAE(nn.Module):
    """A TopK sparse autoencoder (Gao et al. 2024, arXiv:2406.04093) in the published convention.

    Encoding: the k largest of `x @ W_enc.T + b_enc`. `b_dec` is not subtracted first and `x` is not scaled.
    Decoding: `acts @ W_dec.T + b_dec`. Column f of `W_dec` is the direction of feature f; its norm is not promised
    to be 1. Parameters are frozen at first, since most uses only read; `sae.requires_grad_()` makes it trainable.

    Args:
        W_enc: (d_sae, d_model).
        W_dec: (d_model, d_sae).
        b_enc: (d_sae,).
        b_dec: (d_model,).
        k: features kept per position.
        activation: see `Activation`.
        kernel: which path encodes (`qwen_scope.kernels.choice.Kernel`); by default the fastest one on this machine.

    Raises:
        QwenScopeError: shapes that disagree, k outside 1..d_sae, or an unknown activation.
    """

    def __init__(
        self,
        W_enc: Float[Tensor, "d_sae d_model"],
        W_dec: Float[Tensor, "d_model d_sae"],
        b_enc: Float[Tensor, " d_sae"],
        b_dec: Float[Tensor, " d_model"],
        k: int,
        activation: Activation = "topk",
        kernel: kernels.Kernel | None = None,
    ):
        super().__init__()
        check_shapes(W_enc.shape, W_dec.shape, b_enc.shape, b_dec.shape)
        if not isinstance(k, int) or not 1 <= k <= len(b_enc):
            raise QwenScopeError(
                f"expected k from 1 to d_sae = {len(b_enc)}, found k = {k!r}; pass the k it was trained with"
            )
        if activation not in get_args(Activation):
            raise QwenScopeError(
                f"expected activation 'topk' or 'topk_relu', found {activation!r}; choose one of the two"
            )
        self.W_enc = nn.Parameter(W_enc, requires_grad=False)
        self.W_dec = nn.Parameter(W_dec, requires_grad=False)
        self.b_enc = nn.Parameter(b_enc, requires_grad=False)
        self.b_dec = nn.Parameter(b_dec, requires_grad=False)
        self.k = k
        self.activation: Activation = activation
        self.encoder = kernels.Encoder(kernel)
        """Keeps what the fast path needs, and says which path was chosen."""

    @property
    def d_model(self) -> int:
        """Width of the residual stream."""
        return self.W_enc.shape[1]

    @property
    def d_sae(self) -> int:
        """Number of features."""
        return self.W_enc.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes of the four tensors, and of what encoding fast keeps beside them."""
        return sum(p.nbytes for p in self.parameters()) + self.encoder.nbytes

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.W_enc.device

    def encode(self, x: Float[Tensor, "*positions d_model"], k: int | None = None) -> SparseFeatures:
        """Residual stream to sparse features.

        Args:
            x: residuals of any leading shape, any float dtype (computed in float32), on the SAE's device.
            k: keep another number of features than the SAE was trained for.

        Raises:
            QwenScopeError: another width or device, no positions at all, or residuals that are not finite.
        """
        k = self.k if k is None else k
        if not isinstance(x, Tensor) or x.layout != torch.strided:
            raise QwenScopeError(
                f"expected residuals as a dense tensor, found {_kind(x)}; convert it with torch.as_tensor or .to_dense()"
            )
        if x.shape[-1:] != (self.d_model,):
            raise QwenScopeError(
                f"expected residuals of width d_model = {self.d_model}, found a tensor of shape {tuple(x.shape)}; "
                "use the model and layer this SAE was trained on"
            )
        if x.device != self.device:
            raise QwenScopeError(
                f"expected residuals on the SAE's device {self.device}, found them on {x.device}; move one with .to()"
            )
        if x.numel() == 0:
            raise QwenScopeError(
                f"expected at least one residual, found a tensor of shape {tuple(x.shape)}; pass a token"
            )
        indices, values = kernels.encode(x.reshape(-1, self.d_model), self.W_enc, self.b_enc, k, self.encoder)
        if self.activation == "topk_relu":
            values = values.relu()
        shape = (*x.shape[:-1], k)
        return SparseFeatures(indices.view(shape), values.view(shape), self.d_sae)

    def decode(self, features: SparseFeatures) -> Float[Tensor, "*positions d_model"]:
        """Sparse features back to the residual stream, float32.

        Raises:
            QwenScopeError: features of a dictionary of another width.
        """
        if not isinstance(features, SparseFeatures):
            raise QwenScopeError(f"expected the features that encode gave, found {_kind(features)}; encode it first")
        if features.d_sae != self.d_sae:
            raise QwenScopeError(
                f"expected features of a dictionary of {self.d_sae}, found one of {features.d_sae}; decode with the SAE "
                "that encoded them"
            )
        pairs = (features.indices.reshape(-1, features.k), features.values.reshape(-1, features.k))
        return kernels.decode(*pairs, self.decoder_rows(), self.b_dec).view(*features.shape, self.d_model)

    def decoder_rows(self) -> Float[Tensor, "d_sae d_model"]:
        """`W_dec.T` with contiguous rows: row f is the direction of feature f.

        A published checkpoint stores the transpose, where the k columns of one token lie all over the file. The first
        call re-lays the storage once (`W_dec` keeps its shape); gradients still flow to `W_dec`.
        """
        if not self.W_dec.T.is_contiguous():
            self.W_dec.data = self.W_dec.data.T.contiguous().T
        return self.W_dec.T

    def forward(self, x: Float[Tensor, "*positions d_model"]) -> Float[Tensor, "*positions d_model"]:
        """The reconstruction of x: `decode(encode(x))`."""
        return self.decode(self.encode(x))

    def extra_repr(self) -> str:
        """What `repr` shows."""
        return f"d_model={self.d_model}, d_sae={self.d_sae}, k={self.k}, activation={self.activation!r}"


def _kind(value: object) -> str:
    return f"a {value.layout} tensor" if isinstance(value, Tensor) else f"a {type(value).__name__}"


def check_shapes(
    W_enc: tuple[int, ...], W_dec: tuple[int, ...], b_enc: tuple[int, ...], b_dec: tuple[int, ...]
) -> None:
    """Refuses four shapes that are not those of one TopK SAE in the published layout, naming a transposed matrix."""
    if len(b_enc) != 1 or len(b_dec) != 1:
        raise QwenScopeError(
            f"expected 1-d biases, found b_enc {tuple(b_enc)} and b_dec {tuple(b_dec)}; check the file"
        )
    d_sae, d_model = b_enc[0], b_dec[0]
    for name, found, expected in (("W_enc", W_enc, (d_sae, d_model)), ("W_dec", W_dec, (d_model, d_sae))):
        if tuple(found) == expected:
            continue
        hint = "it looks transposed" if tuple(found) == expected[::-1] else "the tensors are not of one SAE"
        raise QwenScopeError(
            f"expected {name} of shape {expected} beside b_enc {tuple(b_enc)} and b_dec {tuple(b_dec)}, found "
            f"{tuple(found)}: {hint}"
        )
