"""`Maxima`: the highest activation of features, which strengths such as `2x` are counted in."""

from __future__ import annotations

import json
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from qwen_scope.backbone import Backbone
from qwen_scope.bundled import maxima_file
from qwen_scope.errors import QwenScopeError
from qwen_scope.evaluation.sample import sample_features
from qwen_scope.files import read_safetensors
from qwen_scope.fingerprint import fingerprint
from qwen_scope.suite import Suite


class Maxima:
    """Highest activations by layer and feature, and where they are from.

    Args:
        of_layer: the (d_sae,) highest activations of a layer, 0 or NaN where a feature never fired. Asked once a layer.
        source: where they are from, for people.
    """

    def __init__(self, of_layer: Callable[[int], Float[Tensor, " d_sae"]], source: str):
        self.source = source
        self._of_layer = of_layer
        self._known: dict[int, Tensor] = {}

    def __call__(self, layer: int, number: int) -> float:
        """The highest activation of a feature.

        Raises:
            QwenScopeError: it never fired.
        """
        highest = float(self.layer(layer)[number])
        if not highest > 0:
            raise QwenScopeError(
                f"expected a feature that fires, to count its strength in, found that {layer}/{number} never does in "
                f"{self.source}; give a strength without x, in raw units of activation"
            )
        return highest

    def layer(self, layer: int) -> Float[Tensor, " d_sae"]:
        """Those of all features of a layer; 0 or NaN where one never fired."""
        if layer not in self._known:
            self._known[layer] = self._of_layer(layer)
        return self._known[layer]


def maxima_of(backbone: Backbone, suite: Suite) -> Maxima:
    """Those that come with the package for the bundled suite; of another suite, those in a sample of texts.

    A sample lacks most features, and shows of others less than they can reach: harvest an index for good ones.
    """
    tensors, metadata = read_safetensors(maxima_file())
    known = json.loads(metadata["fingerprints"])
    # Only if it has all layers: to tell a suite by its weights loads them.
    if {str(layer) for layer in suite.layers} <= set(known) and all(
        known[str(layer)] == fingerprint(suite, [layer]) for layer in suite.layers
    ):
        return Maxima(lambda layer: tensors[f"layer{layer}"], "the index that comes with the package")
    return Maxima(lambda layer: measured(backbone, suite, layer), "a sample of texts (harvest an index for more)")


def measured(backbone: Backbone, suite: Suite, layer: int) -> Float[Tensor, " d_sae"]:
    """The highest activations of a layer in the sample of texts, without position 0 and norm outliers.

    Raises:
        QwenScopeError: a model without a tokenizer.
    """
    if backbone.tokenizer is None:
        raise QwenScopeError(
            "expected a tokenizer, to measure the highest activation of features, found none; give strengths without x, in raw "
            "units of activation"
        )
    highest = torch.zeros(suite[layer].d_sae)
    for found in sample_features(backbone, suite, layer):
        highest = highest.scatter_reduce(0, found.indices.flatten(), found.values.flatten(), "amax")
    return highest
