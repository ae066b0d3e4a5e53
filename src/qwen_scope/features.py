"""`SparseFeatures`, the currency of the whole package: which features are active at each position, and how much."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from qwen_scope.errors import QwenScopeError


@dataclass(frozen=True, eq=False)
class SparseFeatures:
    """The sparse pair: for every position the k features kept and their values, strongest first.

    Positions can have any shape: (k,) for one token, (tokens, k) for a text, (batch, tokens, k) for a batch.
    """

    indices: Int[Tensor, "*positions k"]
    """Feature numbers, 0 <= index < d_sae."""
    values: Float[Tensor, "*positions k"]
    """Activations in the SAE's own units. Under the card's convention (`topk`) they can be negative; a feature
    counts as firing only where its value is above 0 (see `active`)."""
    d_sae: int
    """Width of the dictionary, needed to make the dense form."""

    def __post_init__(self) -> None:
        if self.indices.shape != self.values.shape:
            raise QwenScopeError(
                f"expected indices and values of one shape, found {tuple(self.indices.shape)} and "
                f"{tuple(self.values.shape)}; pass the pair as encode returned it"
            )

    @property
    def k(self) -> int:
        """Features kept per position."""
        return self.indices.shape[-1]

    @property
    def shape(self) -> torch.Size:
        """Shape of the positions, without k."""
        return self.indices.shape[:-1]

    @property
    def active(self) -> Bool[Tensor, "*positions k"]:
        """Where a kept feature really fires: value > 0."""
        return self.values > 0

    def __len__(self) -> int:
        return self.indices.shape[0]

    def __getitem__(self, positions: Any) -> SparseFeatures:
        """The features at some positions: an int, a slice, a mask, as for a tensor of shape `shape`."""
        return replace(self, indices=self.indices[positions], values=self.values[positions])

    def top(self, n: int) -> SparseFeatures:
        """The n strongest features of every position (all k if n is larger)."""
        if n < 1:
            raise QwenScopeError(f"expected at least 1 feature in top(n), found n = {n}; ask for 1 to {self.k}")
        return replace(self, indices=self.indices[..., :n], values=self.values[..., :n])

    def activation(self, feature: int) -> Float[Tensor, "*positions"]:
        """The value of one feature at every position, 0 where it was not kept."""
        if not 0 <= feature < self.d_sae:
            raise QwenScopeError(f"expected a feature from 0 to {self.d_sae - 1}, found {feature}; choose one of those")
        return torch.where(self.indices == feature, self.values, 0).sum(dim=-1)

    def to_dense(self) -> Float[Tensor, "*positions d_sae"]:
        """The dense form the model card returns: zeros with the kept values scattered in.

        Takes `positions * d_sae` floats; nothing in this package needs it.
        """
        dense = self.values.new_zeros(*self.shape, self.d_sae)
        return dense.scatter_(-1, self.indices, self.values)

    def to(self, device: str | torch.device) -> SparseFeatures:
        """The same features on another device."""
        return replace(self, indices=self.indices.to(device), values=self.values.to(device))

    def save(self, path: str | Path) -> None:
        """Writes the pair to one safetensors file (indices as int32), atomically."""
        from qwen_scope.files import write_safetensors

        tensors = {"indices": self.indices.to(torch.int32), "values": self.values}
        write_safetensors(Path(path), tensors, {"format": "qwen-scope features 1", "d_sae": str(self.d_sae)})

    @staticmethod
    def load(path: str | Path) -> SparseFeatures:
        """Reads what `save` wrote."""
        from qwen_scope.files import read_safetensors

        tensors, metadata = read_safetensors(Path(path))
        if metadata.get("format") != "qwen-scope features 1":
            raise QwenScopeError(f"expected features written by SparseFeatures.save, found another file at {path}")
        return SparseFeatures(tensors["indices"].long(), tensors["values"], int(metadata["d_sae"]))

    def __repr__(self) -> str:
        positions = "x".join(map(str, self.shape)) or "one"
        return f"{type(self).__name__}({positions} positions, k={self.k}, d_sae={self.d_sae})"
