"""Whether two contenders give the same result: otherwise their times mean nothing."""

from typing import Any

from timing import OURS, short
from torch import Tensor

TOLERANCE = 1e-5
Pairs = tuple[Tensor, Tensor]


def same_features(name: str, ours: Pairs, theirs: Pairs) -> dict[str, Any]:
    """The same set of features in every row, and each feature's value the same to 1e-5 relative.

    The kth and the next feature of a row may be closer than float32 rounds; two products that add up in another order
    may then keep another of the two. Such a row counts as a near tie if its sorted values agree all the same.

    Raises:
        SystemExit: other features or values than that.
    """
    (our_indices, our_values), (their_indices, their_values) = by_feature(*ours), by_feature(*theirs)
    same = (our_indices == their_indices).all(dim=1)
    of_features = relative(our_values[same], their_values[same])
    of_sorted = relative(our_values[~same].sort().values, their_values[~same].sort().values)
    refuse(name, "features", max(of_features, of_sorted) <= TOLERANCE, same)
    return {
        "rows": len(same),
        "rows_with_same_features": int(same.sum()),
        "rows_with_near_ties": int((~same).sum()),
        "largest_relative_difference": short(of_features),
    }


def same_reconstruction(name: str, ours: Tensor, theirs: Tensor) -> dict[str, Any]:
    """The distance between two reconstructions of a token, relative to its length. A near tie shows here.

    Raises:
        SystemExit: more of them differ than near ties explain.
    """
    distance = (ours - theirs).norm(dim=1) / theirs.norm(dim=1)
    same = distance <= TOLERANCE
    refuse(name, "reconstructions", True, same)
    return {
        "rows": len(same),
        "rows_with_same_output": int(same.sum()),
        "largest_relative_difference": short(distance[same].max().item() if same.any() else 0.0),
    }


def refuse(name: str, what: str, values_agree: bool, same: Tensor) -> None:
    """More than the rare near tie is another result."""
    different = int((~same).sum())
    if not values_agree or different > max(1, len(same) // 1000):
        raise SystemExit(f"{name} gives other {what} than {OURS} in {different} of {len(same)} rows, or other values")


def by_feature(indices: Tensor, values: Tensor) -> Pairs:
    indices, order = indices.sort(dim=1)
    return indices, values.gather(1, order)


def relative(a: Tensor, b: Tensor) -> float:
    return ((a - b).abs() / b.abs()).max().item() if a.numel() else 0.0
