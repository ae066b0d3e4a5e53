"""Random steerings to compare with: the same edits of other features, drawn among those of like density and norm."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from qwen_scope.backbone import Backbone
from qwen_scope.errors import QwenScopeError
from qwen_scope.evaluation.sample import sample_features
from qwen_scope.fingerprint import fingerprint
from qwen_scope.scope import Scope
from qwen_scope.steering import Edit, Steering
from qwen_scope.suite import Suite

POOL = 50
"""Features of like density that each random one is drawn from."""
LIKE_NORM = 0.1
"""How far, as a share, the norm of their directions may be off."""

Densities = Callable[[int], Float[Tensor, " d_sae"]]
"""By layer, the share of tokens at which each feature fires."""


def random_steerings(
    steering: Steering, raw: list[float], suite: Suite, densities: Densities, count: int, seed: int
) -> list[Steering]:
    """Steerings of other features: each edit the same, at the same strength in raw units, of a feature of the same layer drawn
    among the 50 that fire of nearest density (as a ratio) whose direction's norm is within 10 %.

    Args:
        raw: the strength of each edit in raw units.
        densities: shares of tokens at which features fire.
        count: how many.
        seed: what is drawn follows from.

    Raises:
        QwenScopeError: a layer without as many other features that fire.
    """
    draw = random.Random(seed)
    steered = {(edit.layer, edit.number) for edit in steering.edits}
    # The same pool for each feature: edits of one feature at several places stay edits of one.
    pools = {name: _pool(name, steered, suite, densities(name[0]), count) for name in sorted(steered)}
    found = []
    for _ in range(count):
        taken: dict[tuple[int, int], int] = {}
        for layer, number in pools:
            used = {other for (at, _), other in taken.items() if at == layer}
            taken[layer, number] = draw.choice([other for other in pools[layer, number] if other not in used])
        edits: list[Edit] = []
        for edit, strength in zip(steering.edits, raw, strict=True):
            number = taken[edit.layer, edit.number]
            edits.append(replace(edit, number=number, strength=strength, unit="raw"))
        found.append(Steering(tuple(edits)))
    return found


def _pool(
    name: tuple[int, int],
    steered: set[tuple[int, int]],
    suite: Suite,
    density: Float[Tensor, " d_sae"],
    count: int,
) -> list[int]:
    layer, number = name
    norms = suite[layer].W_dec.detach().float().norm(dim=0).cpu()
    there = (density > 0) & ((norms / norms[number] - 1).abs() <= LIKE_NORM)
    there[[other for at, other in steered if at == layer]] = False
    others = there.nonzero()[:, 0]
    needed = sum(at == layer for at, _ in steered)
    if len(others) < max(count, needed):
        raise QwenScopeError(
            f"expected {max(count, needed)} other features of layer {layer} that fire, with directions of a norm like that of "
            f"{layer}/{number}, found {len(others)}; compare with fewer random features"
        )
    # One that never fired is as rare as anything that did.
    own = density[number] if density[number] > 0 else density[density > 0].min()
    distance = (density[others].double().log() - own.double().log()).abs()
    return others[distance.argsort(stable=True)[: max(POOL, needed)]].tolist()


def densities_of(scope: Scope) -> tuple[Densities, str]:
    """Densities of features, and where they are from: for the bundled suite, the index that comes with the package; for
    another, or without pyarrow, a sample of texts. Those of another index come from `index_densities`."""
    try:
        from qwen_scope.index.feature_index import FeatureIndex

        index = FeatureIndex.open()
    except (ModuleNotFoundError, QwenScopeError):
        index = None
    if index is not None and set(scope.suite.layers) <= set(index.layers):
        layers = sorted(scope.suite.layers)
        if layers == index.layers and fingerprint(scope.suite, layers) == index.about.fingerprint:
            return index_densities(index), "the index that comes with the package"
    return lambda layer: measured_density(scope.backbone, scope.suite, layer), "a sample of texts"


def index_densities(index: FeatureIndex) -> Densities:
    """Those of an index."""
    return lambda layer: torch.tensor(
        index.table(layer, ["density"]).column("density").to_pylist(), dtype=torch.float64
    )


def measured_density(backbone: Backbone, suite: Suite, layer: int) -> Float[Tensor, " d_sae"]:
    """The share of tokens at which each feature of a layer fires in the sample of texts, without position 0 and norm
    outliers."""
    fired, tokens = torch.zeros(suite[layer].d_sae, dtype=torch.float64), 0
    for found in sample_features(backbone, suite, layer):
        fired += torch.bincount(found.indices[found.active], minlength=found.d_sae).double()
        tokens += len(found)
    return fired / max(1, tokens)
