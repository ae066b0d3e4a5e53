"""Texts as rows of features: what the rules and scikit-learn's estimators take."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import sparse
from sklearn.base import BaseEstimator, TransformerMixin

from qwen_scope.corpus import Document
from qwen_scope.data.fired import Fired, read

if TYPE_CHECKING:
    from qwen_scope.scope import Scope


def matrix(fired: Sequence[Fired]) -> sparse.csr_matrix:
    """A row for each text, a column for each feature, the layers side by side: the highest value of each feature."""
    parts = [sparse.csr_matrix((of.values, of.features, of.starts), shape=(len(of), of.d_sae)) for of in fired]
    return sparse.csr_matrix(sparse.hstack(parts, format="csr"))


class FeatureEncoder(TransformerMixin, BaseEstimator):
    """Texts to features, as the first step of a scikit-learn pipeline: `make_pipeline(FeatureEncoder(scope), OrRule())`.

    Every call reads its texts through the model. To fit several times, such as in cross-validation, transform once and fit on
    the matrix.

    Args:
        scope: the model and its SAEs.
        layers: whose features; all that the scope reads unless told.
    """

    def __init__(self, scope: Scope, layers: Sequence[int] | None = None):
        self.scope = scope
        self.layers = layers

    def fit(self, X: Sequence[Document], y: Any = None) -> FeatureEncoder:
        """Nothing is learnt."""
        return self

    def transform(self, X: Sequence[Document]) -> sparse.csr_matrix:
        """(texts, features of all layers): the highest value of each feature, position 0 and norm outliers left out."""
        layers = self._layers()
        found = read(self.scope, list(X), layers, "any", progress=False)
        return matrix([found.fired[layer] for layer in layers])

    def get_feature_names_out(self, input_features: Any = None) -> np.ndarray:
        """`layer/number` of each column."""
        layers = self._layers()
        return np.array(
            [f"{layer}/{n}" for layer in layers for n in range(self.scope.suite[layer].d_sae)], dtype=object
        )

    def __sklearn_is_fitted__(self) -> bool:
        return True

    def __sklearn_clone__(self) -> FeatureEncoder:
        # scikit-learn copies what estimators are made with; a language model is shared instead.
        return FeatureEncoder(self.scope, self.layers)

    def _layers(self) -> list[int]:
        return list(self.scope.layers if self.layers is None else self.layers)
