"""What is compared: the same SAE held by qwen_scope, by the model card's snippet, and by real peers if installed.

qwen_scope is there twice: with the kernel it chooses, and with its reference, which that choice has to beat.

Each contender owns its weights, in the layout its own loader gives them, filled with the same numbers.
"""

from dataclasses import dataclass
from importlib import import_module, metadata, util
from typing import Any, Protocol

import card
import torch
from torch import Tensor

from qwen_scope import __version__
from qwen_scope.features import SparseFeatures
from qwen_scope.kernels import Kernel
from qwen_scope.sae import TopKSAE

BLOCK_ROWS = 256
"""Weights are made this many rows at a time, in place, so that making them never takes more than holding them."""


@dataclass(frozen=True)
class Sizes:
    d_model: int
    d_sae: int
    k: int
    decodes: bool = True
    """Without, nothing is written into the decoder, which then takes no memory."""


class Contender(Protocol):
    def __init__(self, sizes: Sizes, seed: int) -> None: ...

    @property
    def kept_bytes(self) -> int:
        """What it keeps beside the weights from its first use on."""
        ...

    def encode(self, x: Tensor) -> Any:
        """Whatever form of features this contender gives its users."""
        ...

    def reconstruct(self, x: Tensor) -> Tensor:
        """Encode and decode."""
        ...

    def pairs(self, encoded: Any) -> tuple[Tensor, Tensor]:
        """What `encode` gave, as (indices, values) of shape (tokens, k), in any order."""
        ...


class QwenScope:
    kernel: Kernel | None = None

    def __init__(self, sizes: Sizes, seed: int) -> None:
        # W_dec with contiguous rows, as the first decode would lay it out: that is done once per SAE.
        rows, bias = torch.empty(sizes.d_sae, sizes.d_model), torch.empty(sizes.d_sae)
        weights = (torch.empty_like(rows), rows.T, bias, torch.empty(sizes.d_model))
        self.sae = TopKSAE(*weights, k=sizes.k, kernel=self.kernel)
        fill(sizes, seed, self.sae.W_enc, self.sae.W_dec.T, self.sae.b_enc, self.sae.b_dec)

    @property
    def kept_bytes(self) -> int:
        return self.sae.encoder.nbytes

    @property
    def choice(self) -> dict[str, str]:
        """Which kernel runs, and why."""
        choice = self.sae.encoder.choice
        assert choice is not None, "nothing was encoded yet"
        return {"kernel": choice.kernel, "why": choice.why}

    def encode(self, x: Tensor) -> SparseFeatures:
        return self.sae.encode(x)

    def reconstruct(self, x: Tensor) -> Tensor:
        return self.sae.decode(self.sae.encode(x))

    def pairs(self, encoded: SparseFeatures) -> tuple[Tensor, Tensor]:
        return encoded.indices, encoded.values


class QwenScopeReference(QwenScope):
    kernel = "reference"


class Card:
    kept_bytes = 0

    def __init__(self, sizes: Sizes, seed: int) -> None:
        self.k = sizes.k
        self.W_enc = torch.empty(sizes.d_sae, sizes.d_model)
        self.W_dec = torch.empty(sizes.d_model, sizes.d_sae)
        self.b_enc, self.b_dec = torch.empty(sizes.d_sae), torch.empty(sizes.d_model)
        fill(sizes, seed, self.W_enc, self.W_dec.T, self.b_enc, self.b_dec)

    def encode(self, x: Tensor) -> Tensor:
        return card.get_feature_acts(x, self.W_enc, self.b_enc, self.k)

    def reconstruct(self, x: Tensor) -> Tensor:
        return card.decode(self.encode(x), self.W_dec, self.b_dec)

    def pairs(self, encoded: Tensor) -> tuple[Tensor, Tensor]:
        values, indices = encoded.topk(self.k, dim=-1)
        return indices, values


class SAELens:
    kept_bytes = 0

    def __init__(self, sizes: Sizes, seed: int) -> None:
        topk_sae = import_module("sae_lens.saes.topk_sae")
        config = topk_sae.TopKSAEConfig(
            d_in=sizes.d_model,
            d_sae=sizes.d_sae,
            k=sizes.k,
            apply_b_dec_to_input=False,
            rescale_acts_by_decoder_norm=False,
            normalize_activations="none",
        )
        self.k = sizes.k
        self.sae = topk_sae.TopKSAE(config)
        fill(sizes, seed, self.sae.W_enc.T, self.sae.W_dec, self.sae.b_enc, self.sae.b_dec)

    def encode(self, x: Tensor) -> Tensor:
        return self.sae.encode(x)

    def reconstruct(self, x: Tensor) -> Tensor:
        return self.sae.decode(self.sae.encode(x))

    def pairs(self, encoded: Tensor) -> tuple[Tensor, Tensor]:
        values, indices = encoded.topk(self.k, dim=-1)
        return indices, values


class Sparsify:
    kept_bytes = 0

    def __init__(self, sizes: Sizes, seed: int) -> None:
        sparsify = import_module("sparsify")
        # As a transcoder it does not subtract b_dec, which the published SAEs do not either.
        config = sparsify.SparseCoderConfig(num_latents=sizes.d_sae, k=sizes.k, transcode=True)
        self.sae = sparsify.SparseCoder(sizes.d_model, config)
        fill(sizes, seed, self.sae.encoder.weight, self.sae.W_dec, self.sae.encoder.bias, self.sae.b_dec)

    def encode(self, x: Tensor) -> Any:
        return self.sae.encode(x)

    def reconstruct(self, x: Tensor) -> Tensor:
        encoded = self.sae.encode(x)
        return self.sae.decode(encoded.top_acts, encoded.top_indices)

    def pairs(self, encoded: Any) -> tuple[Tensor, Tensor]:
        return encoded.top_indices, encoded.top_acts


CONTENDERS: dict[str, type[Contender]] = {
    "qwen_scope": QwenScope,
    "qwen_scope_reference": QwenScopeReference,
    "card": Card,
    "sae_lens": SAELens,
    "sparsify": Sparsify,
}
PEERS = {"sae_lens": "sae-lens", "sparsify": "eai-sparsify"}
"""Optional contenders: module -> distribution."""


OWN = {
    "qwen_scope": f"qwen_scope {__version__}",
    "qwen_scope_reference": "our reference",
    "card": "the card's snippet",
}


def peers() -> dict[str, str]:
    """The peers this interpreter has, and what to call them in print."""
    return {name: f"{dist} {metadata.version(dist)}" for name, dist in PEERS.items() if util.find_spec(name)}


def missing_peers() -> list[str]:
    return [dist for name, dist in PEERS.items() if name not in peers()]


@torch.no_grad()
def fill(sizes: Sizes, seed: int, W_enc: Tensor, decoder_rows: Tensor, b_enc: Tensor, b_dec: Tensor) -> None:
    """The one SAE every contender holds, written in place: rows of norm 1 in random directions, Gaussian biases.

    Args:
        W_enc: (d_sae, d_model), any strides.
        decoder_rows: (d_sae, d_model), any strides.
    """
    for offset, matrix in enumerate((W_enc, decoder_rows) if sizes.decodes else (W_enc,)):
        generator = torch.Generator().manual_seed(seed + offset)
        for block in matrix.split(BLOCK_ROWS):
            rows = torch.randn(block.shape, generator=generator)
            block.copy_(rows / rows.norm(dim=1, keepdim=True))
    generator = torch.Generator().manual_seed(seed + 2)
    for bias in (b_enc, b_dec):
        bias.copy_(0.1 * torch.randn(bias.shape, generator=generator))


def residuals(tokens: int, d_model: int, seed: int) -> Tensor:
    """Gaussian residuals, (tokens, d_model)."""
    return torch.randn(tokens, d_model, generator=torch.Generator().manual_seed(seed + 3))
