"""A `TopKSAE` in the shape that SAEBench (Karvonen et al. 2025, arXiv:2503.09532) evaluates; SAEBench is not imported."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from qwen_scope.sae import TopKSAE


@dataclass
class SAEBenchConfig:
    """What SAEBench 0.6 reads as `sae.cfg`: the fields of its `CustomSAEConfig`. It sets some of them itself."""

    model_name: str
    """The language model, by a name that TransformerLens knows."""
    d_in: int
    """Width of the residual stream."""
    d_sae: int
    """Number of features."""
    hook_layer: int
    """Which decoder layer, from 0."""
    hook_name: str
    """TransformerLens' name for the output of that layer."""
    dtype: str
    """What SAEBench computes in, such as `float32`."""
    device: str
    """Where the SAE is."""
    architecture: str = "topk"
    """Kind of SAE; written to the results."""
    apply_b_dec_to_input: bool = False
    """`b_dec` is not subtracted before encoding."""
    normalize_activations: str = "none"
    """Residuals are not scaled before encoding."""
    prepend_bos: bool = True
    """Texts begin with a special token, which most evaluations leave out; so position 0 counts in none of those."""
    hook_head_index: int | None = None
    """Of an attention head; residuals have none."""
    context_size: int | None = None
    """Tokens of a text; each evaluation sets its own."""
    dataset_trust_remote_code: bool = False
    """Code of datasets is not run."""
    model_from_pretrained_kwargs: dict[str, Any] = field(default_factory=dict)
    """Further arguments for loading the language model."""

    def to_dict(self) -> dict[str, Any]:
        """The fields alone, for the results."""
        return asdict(self)


class SAEBenchSAE(nn.Module):
    """Reads and writes dense features, as SAEBench wants, with the features that the SAE itself finds.

    SAEBench wants decoder rows of norm 1. Published SAEs do not promise them, so values are multiplied by their
    feature's norm and rows divided by it: reconstructions stay as they are. Which features are kept is still decided by
    the pre-activations before that, since that is how the SAE was trained. A row of norm 0 is left as it is.

    What it returns has the dtype of what it was given, since SAEBench mixes it with the model's residuals.

    Args:
        sae: what to evaluate; it is not changed.
        model_name: the language model, by a name that TransformerLens knows.
        layer: the decoder layer whose output the SAE reads, from 0.
    """

    norms: Tensor

    def __init__(self, sae: TopKSAE, model_name: str, layer: int):
        super().__init__()
        rows = sae.decoder_rows().detach().float()
        norms = rows.norm(dim=1)
        norms = norms.where(norms > 0, 1)
        weights = (sae.W_enc.detach(), (rows / norms[:, None]).T, sae.b_enc.detach(), sae.b_dec.detach())
        self.sae = TopKSAE(*weights, sae.k, sae.activation, sae.encoder.kernel)
        self.register_buffer("norms", norms)
        self.cfg = SAEBenchConfig(
            model_name=model_name,
            d_in=sae.d_model,
            d_sae=sae.d_sae,
            hook_layer=layer,
            hook_name=f"blocks.{layer}.hook_resid_post",
            dtype=_name(self.dtype),
            device=str(self.device),
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "SAEBenchSAE":
        # What `to` comes down to. SAEBench hangs things of its own on the config, so it is changed, not replaced.
        super()._apply(fn, recurse)
        self.cfg.dtype, self.cfg.device = _name(self.dtype), str(self.device)
        return self

    @property
    def W_enc(self) -> Float[Tensor, "d_model d_sae"]:
        """Column f reads feature f, in units of directions of norm 1."""
        return self.sae.W_enc.T * self.norms

    @property
    def W_dec(self) -> Float[Tensor, "d_sae d_model"]:
        """Row f is the direction of feature f, of norm 1."""
        return self.sae.decoder_rows()

    @property
    def b_enc(self) -> Float[Tensor, " d_sae"]:
        """Bias of the pre-activations, in the same units."""
        return self.sae.b_enc * self.norms

    @property
    def b_dec(self) -> Float[Tensor, " d_model"]:
        """Bias of the reconstruction."""
        return self.sae.b_dec

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.norms.device

    @property
    def dtype(self) -> torch.dtype:
        """What the weights are stored in; `to` changes it."""
        return self.norms.dtype

    def encode(self, x: Float[Tensor, "*positions d_model"]) -> Float[Tensor, "*positions d_sae"]:
        """Residuals to dense features, in units of directions of norm 1; takes `positions * d_sae` floats."""
        features = self.sae.encode(x)
        values = (features.values * self.norms[features.indices]).to(x.dtype)
        return values.new_zeros(*features.shape, features.d_sae).scatter_(-1, features.indices, values)

    def decode(self, acts: Float[Tensor, "*positions d_sae"]) -> Float[Tensor, "*positions d_model"]:
        """Dense features, changed or not, back to residuals; gradients flow to them."""
        return (acts.to(self.dtype) @ self.W_dec + self.b_dec).to(acts.dtype)

    def forward(self, x: Float[Tensor, "*positions d_model"]) -> Float[Tensor, "*positions d_model"]:
        """The reconstruction of x."""
        return self.decode(self.encode(x))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
