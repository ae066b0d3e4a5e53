"""What `Scope.features` gives: one text's tokens, and each layer's features at each of them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from qwen_scope import render
from qwen_scope.errors import QwenScopeError
from qwen_scope.features import SparseFeatures
from qwen_scope.files import read_safetensors, write_safetensors
from qwen_scope.tokens import TokenizedText

FORMAT = "qwen-scope text features 1"


@dataclass(frozen=True, eq=False, repr=False)
class LayerFeatures(SparseFeatures):
    """The features of one layer at each token of a text: a `SparseFeatures` that can name what it holds."""

    layer: int
    """Which decoder layer, from 0."""
    tokens: tuple[str, ...]
    """The text of each position."""
    positions: tuple[int, ...]
    """The place of each position in the text, from 0."""

    def __getitem__(self, positions: Any) -> LayerFeatures:
        kept = torch.arange(len(self.tokens), device=self.indices.device)[positions].flatten().tolist()
        part = SparseFeatures(self.indices[positions], self.values[positions], self.d_sae)
        return LayerFeatures(
            part.indices,
            part.values,
            self.d_sae,
            self.layer,
            tuple(self.tokens[i] for i in kept),
            tuple(self.positions[i] for i in kept),
        )

    def strongest(self, n: int = 10, *, skip_first: bool = True) -> list[tuple[str, float, int]]:
        """The n features that reach the highest value anywhere in the text.

        Args:
            skip_first: leave out position 0, an attention sink where a reading means little.

        Returns:
            (name such as "15/123", highest value, the position of that value), highest first.
        """
        indices, values = self.indices.reshape(-1, self.k), self.values.reshape(-1, self.k)
        kept = torch.tensor([not (skip_first and position == 0) for position in self.positions])
        where = torch.tensor(self.positions)[kept].repeat_interleave(self.k)
        flat, numbers = values.cpu()[kept].flatten(), indices.cpu()[kept].flatten()
        found: dict[int, tuple[str, float, int]] = {}
        for at in flat.argsort(descending=True).tolist():
            if len(found) == n or flat[at] <= 0:
                break
            feature = int(numbers[at])
            found.setdefault(feature, (f"{self.layer}/{feature}", float(flat[at]), int(where[at])))
        return list(found.values())

    def __repr__(self) -> str:
        few = self.k <= render.FEW_FEATURES
        return render.layer_table(self, render.MANY_TOKENS, None if few else render.MANY_FEATURES)

    def _repr_html_(self) -> str:
        return render.layer_html(self)


@dataclass(frozen=True, eq=False, repr=False)
class TextFeatures:
    """The features of one text. `found[15]` are those of layer 15."""

    tokenized: TokenizedText
    """The text as the model read it."""
    by_layer: dict[int, LayerFeatures]
    """Features per layer, in order of the layers."""
    errors: dict[int, Float[Tensor, " tokens"]] = field(default_factory=dict)
    """Per layer, how far each token's reconstruction is from its residual x: |x - x_hat| / |x|. Only where it was asked for."""

    @property
    def text(self) -> str:
        """The text itself."""
        return self.tokenized.text

    @property
    def ids(self) -> list[int]:
        """Token ids."""
        return self.tokenized.ids

    @property
    def tokens(self) -> list[str]:
        """The text of each token."""
        return self.tokenized.tokens

    @property
    def spans(self) -> list[tuple[int, int]]:
        """Characters [start, end) of `text` that each token covers."""
        return self.tokenized.spans

    @property
    def layers(self) -> list[int]:
        """The layers read."""
        return list(self.by_layer)

    def __getitem__(self, layer: int) -> LayerFeatures:
        if layer not in self.by_layer:
            raise QwenScopeError(
                f"expected one of the layers read, {self.layers}, found {layer!r}; read it with layers=[…]"
            )
        return self.by_layer[layer]

    def __iter__(self) -> Iterator[LayerFeatures]:
        return iter(self.by_layer.values())

    def __len__(self) -> int:
        return len(self.tokens)

    def to_dict(self, top: int | None = None) -> dict[str, Any]:
        """Everything as plain lists for JSON.

        Args:
            top: keep only the strongest features of each token.
        """

        def features_at(layer: LayerFeatures, position: int) -> list[dict[str, Any]]:
            pairs = zip(layer.indices[position].tolist(), layer.values[position].tolist(), strict=True)
            return [{"feature": f"{layer.layer}/{index}", "value": value} for index, value in pairs][:top]

        return {
            "text": self.text,
            "tokens": [
                {
                    "position": position,
                    "token": token,
                    "id": self.ids[position],
                    "span": list(self.spans[position]),
                    "features": {str(layer.layer): features_at(layer, position) for layer in self},
                    **(
                        {"errors": {str(n): float(off[position]) for n, off in self.errors.items()}}
                        if self.errors
                        else {}
                    ),
                }
                for position, token in enumerate(self.tokens)
            ],
        }

    def save(self, path: str | Path) -> None:
        """Writes everything to one safetensors file, atomically."""
        tensors = {}
        for layer in self:
            tensors[f"layer{layer.layer}.indices"] = layer.indices.to(torch.int32)
            tensors[f"layer{layer.layer}.values"] = layer.values
        for number, off in self.errors.items():
            tensors[f"layer{number}.errors"] = off
        about = {"tokenized": asdict(self.tokenized), "d_sae": {layer.layer: layer.d_sae for layer in self}}
        write_safetensors(Path(path), tensors, {"format": FORMAT, "about": json.dumps(about)})

    @staticmethod
    def load(path: str | Path) -> TextFeatures:
        """Reads what `save` wrote.

        Raises:
            QwenScopeError: another kind of file.
        """
        tensors, metadata = read_safetensors(Path(path))
        if metadata.get("format") != FORMAT:
            raise QwenScopeError(
                f"expected features written by TextFeatures.save, found another file at {path}; check the path"
            )
        about = json.loads(metadata["about"])
        about["tokenized"]["spans"] = [tuple(span) for span in about["tokenized"]["spans"]]
        tokenized = TokenizedText(**about["tokenized"])
        layers = {
            int(layer): SparseFeatures(
                tensors[f"layer{layer}.indices"].long(), tensors[f"layer{layer}.values"], int(d_sae)
            )
            for layer, d_sae in about["d_sae"].items()
        }
        errors = {layer: tensors[key] for layer in layers if (key := f"layer{layer}.errors") in tensors}
        return text_features(tokenized, layers, errors)

    def __repr__(self) -> str:
        return render.text_summary(self)

    def _repr_html_(self) -> str:
        return render.text_html(self)


def text_features(
    tokenized: TokenizedText,
    layers: dict[int, SparseFeatures],
    errors: dict[int, Float[Tensor, " tokens"]] | None = None,
) -> TextFeatures:
    """Joins the tokens of a text with the features of its layers, and their errors where there are any."""
    tokens, positions = tuple(tokenized.tokens), tuple(range(len(tokenized)))
    by_layer = {
        layer: LayerFeatures(found.indices, found.values, found.d_sae, layer, tokens, positions)
        for layer, found in sorted(layers.items())
    }
    return TextFeatures(tokenized, by_layer, dict(sorted((errors or {}).items())))


def reconstruction_errors(
    x: Float[Tensor, "tokens d_model"], x_hat: Float[Tensor, "tokens d_model"]
) -> Float[Tensor, " tokens"]:
    """How far reconstructions are from residuals, as a share of the residual's length, in float32."""
    x = x.float()
    return (x - x_hat).norm(dim=1) / x.norm(dim=1)
