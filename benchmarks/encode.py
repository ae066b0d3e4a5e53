"""Time and peak memory of encode and of encode + decode against the model card's snippet, and peers if installed.

`python benchmarks/encode.py` takes some minutes and writes benchmarks/results/encode.json; with `--quick` it runs tiny
sizes in some seconds, to see whether it runs.

Times are taken in one process, in rounds that run every contender once, every other round in reverse order, after a
warm-up whose results are compared. Machines drift; the ratio within a round drifts little, so the figure to read is
the median of the rounds' ratios. Peaks are taken in a fresh process each (see memory.py).
"""

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import machine
import memory
import torch
from contenders import CONTENDERS, PEERS, Contender, Sizes, installed, residuals
from torch import Tensor

RESULTS = Path(__file__).parent / "results" / "encode.json"
OURS = "qwen_scope"
TOLERANCE = 1e-5
Pairs = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Plan:
    sizes: Sizes
    tokens: tuple[int, ...] = (1, 128, 1024, 4096)
    memory_tokens: tuple[int, ...] = (1, 128, 1024, 4096)
    seed: int = 0
    seconds_per_case: float = 10
    min_rounds: int = 3


FULL = Plan(Sizes(d_model=2048, d_sae=32768, k=50))
QUICK = Plan(Sizes(d_model=64, d_sae=512, k=8), tokens=(1, 16), memory_tokens=(16,), seconds_per_case=0.05)


def run(plan: Plan) -> dict[str, Any]:
    names = installed()
    return {
        "benchmark": "encode",
        "machine": machine.describe(),
        "parameters": asdict(plan) | {"dtype": "float32", "residuals": "Gaussian", "rows": "random, norm 1"},
        "contenders": names,
        "not_installed": [dist for name, dist in PEERS.items() if name not in names],
        "memory_method": memory.method(),
        "results": with_peaks(time_all(plan, list(names)), plan, list(names)),
    }


@torch.no_grad()
def time_all(plan: Plan, names: list[str]) -> list[dict[str, Any]]:
    contenders = {name: CONTENDERS[name](plan.sizes, plan.seed) for name in names}
    results = []
    for operation in memory.OPERATIONS:
        for tokens in plan.tokens:
            x = residuals(tokens, plan.sizes.d_model, plan.seed)
            agreement = compare(contenders, operation, x)  # also the warm-up
            calls = {name: lambda c=c, x=x, op=operation: memory.apply(c, op, x) for name, c in contenders.items()}
            result = {"operation": operation, "tokens": tokens, **time_case(calls, plan), "agreement": agreement}
            results.append(result)
            print(operation, tokens, {name: f"{r:.2f}x" for name, r in result["times_as_fast"].items()}, flush=True)
    return results


def time_case(calls: dict[str, Callable[[], object]], plan: Plan) -> dict[str, Any]:
    """Median seconds of each call, and how many times as fast as each of the others ours is."""
    rounds: list[dict[str, float]] = []
    start = time.perf_counter()
    while len(rounds) < plan.min_rounds or time.perf_counter() - start < plan.seconds_per_case:
        order = list(calls) if len(rounds) % 2 == 0 else list(calls)[::-1]
        rounds.append({name: seconds(calls[name]) for name in order})
    ratios = {name: [r[name] / r[OURS] for r in rounds] for name in calls if name != OURS}
    return {
        "rounds": len(rounds),
        "seconds": {name: short(median(r[name] for r in rounds)) for name in calls},
        "times_as_fast": {name: short(median(values)) for name, values in ratios.items()},
        "times_as_fast_quartiles": {name: quartiles(values) for name, values in ratios.items()},
    }


def quartiles(values: list[float]) -> list[float]:
    """The lower and the upper: half of the rounds lie between."""
    return [short(value) for value in quantiles(values, n=4, method="inclusive")[::2]]


def short(value: float) -> float:
    return float(f"{value:.4g}")


def seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    result = call()
    elapsed = time.perf_counter() - start
    del result
    return elapsed


def compare(contenders: dict[str, Contender], operation: str, x: Tensor) -> dict[str, Any]:
    """Runs every contender once and holds its result against ours.

    Raises:
        SystemExit: they do not do the same thing, so times would mean nothing.
    """
    if operation == "encode":
        found = {name: contender.pairs(contender.encode(x)) for name, contender in contenders.items()}
        return {name: same_features(name, found[OURS], found[name]) for name in found if name != OURS}
    x_hat = {name: contender.reconstruct(x) for name, contender in contenders.items()}
    return {name: same_reconstruction(name, x_hat[OURS], x_hat[name]) for name in x_hat if name != OURS}


def same_features(name: str, ours: Pairs, theirs: Pairs) -> dict[str, Any]:
    """The same set of features in every row, and each feature's value the same to 1e-5 relative.

    The kth and the next feature of a row may be closer than float32 rounds; two products that add up in another order
    may then keep another of the two. Such a row counts as a near tie if its sorted values agree all the same.
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
    """The distance between two reconstructions of a token, relative to its length. A near tie shows here."""
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


def with_peaks(results: list[dict[str, Any]], plan: Plan, names: list[str]) -> list[dict[str, Any]]:
    for result in results:
        if result["tokens"] in plan.memory_tokens:
            case = (result["operation"], result["tokens"], plan.sizes, plan.seed)
            result["peak_mib"] = {name: memory.measure(name, *case) for name in names}
            print(result["operation"], result["tokens"], result["peak_mib"], "MiB", flush=True)
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="tiny sizes; written only where --out says")
    parser.add_argument("--out", type=Path, help=f"default: {RESULTS.name} in results/ beside this file")
    args = parser.parse_args()
    out = args.out or (None if args.quick else RESULTS)
    found = run(QUICK if args.quick else FULL)
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
