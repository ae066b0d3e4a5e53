"""Time and peak memory of encode and of encode + decode against the model card's snippet, and peers if installed.

`python benchmarks/encode.py` takes a quarter of an hour and writes benchmarks/results/encode.json. With `--threads 1` it
takes times alone, on one thread. With `--large` it takes times of encoding alone at 5120 -> 81920, in 16 GB of memory.
With `--quick` it runs tiny sizes in some seconds, to see whether it runs.

Times are taken in one process, in rounds (see timing.py), after a warm-up whose results are compared. Peaks are taken in
a fresh process each (see memory.py).
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import commandline
import fresh
import machine
import memory
import torch
from agreement import same_features, same_reconstruction
from contenders import CONTENDERS, OWN, Contender, QwenScope, Sizes, missing_peers, peers, residuals
from timing import OURS, time_case
from torch import Tensor

BOTH = ("encode", "encode + decode")
FIRST_USES = (1, 3)
"""Numbers of tokens that bring in every code path before memory is measured."""


@dataclass(frozen=True)
class Plan:
    sizes: Sizes
    operations: tuple[str, ...] = BOTH
    tokens: tuple[int, ...] = (1, 128, 1024, 4096)
    memory_tokens: tuple[int, ...] = (1, 128, 1024, 4096)
    seed: int = 0
    seconds_per_case: float = 10
    min_rounds: int = 3


FULL = Plan(Sizes(d_model=2048, d_sae=32768, k=50))
LARGE = Plan(Sizes(5120, 81920, 100, decodes=False), operations=("encode",), tokens=(128,), memory_tokens=())
QUICK = Plan(Sizes(d_model=64, d_sae=512, k=8), tokens=(1, 16), memory_tokens=(16,), seconds_per_case=0.05)


def run(plan: Plan) -> dict[str, Any]:
    labels = OWN | peers()
    contenders, results = time_all(plan, labels)
    return {
        "benchmark": "encode",
        "machine": machine.describe(),
        "parameters": asdict(plan) | {"dtype": "float32", "residuals": "Gaussian", "rows": "random, norm 1"},
        "contenders": contenders,
        "not_installed": missing_peers(),
        "memory_method": memory.method(),
        "results": with_peaks(results, plan, list(labels)),
    }


@torch.no_grad()
def time_all(plan: Plan, labels: dict[str, str]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What the contenders are, known once they have run, and the results."""
    contenders = {name: CONTENDERS[name](plan.sizes, plan.seed) for name in labels}
    results = [
        time_one(contenders, operation, residuals(tokens, plan.sizes.d_model, plan.seed), plan)
        for operation in plan.operations
        for tokens in plan.tokens
    ]
    return {name: described(contender, labels[name]) for name, contender in contenders.items()}, results


def time_one(contenders: dict[str, Contender], operation: str, x: Tensor, plan: Plan) -> dict[str, Any]:
    agreement = compare(contenders, operation, x)  # also the warm-up
    calls: dict[str, Callable[[], object]] = {
        name: lambda contender=contender: apply(contender, operation, x) for name, contender in contenders.items()
    }
    timed = time_case(calls, plan.seconds_per_case, plan.min_rounds)
    print(operation, len(x), {name: f"{r:.2f}x" for name, r in timed["times_as_fast"].items()}, flush=True)
    return {"operation": operation, "tokens": len(x), **timed, "agreement": agreement}


def described(contender: Contender, label: str) -> dict[str, Any]:
    choice = contender.choice if isinstance(contender, QwenScope) else {}
    return {"label": label, "kept_beside_weights_mib": round(contender.kept_bytes / memory.MIB, 1), **choice}


def apply(contender: Contender, operation: str, x: Tensor) -> object:
    return contender.encode(x) if operation == "encode" else contender.reconstruct(x)


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


def with_peaks(results: list[dict[str, Any]], plan: Plan, names: list[str]) -> list[dict[str, Any]]:
    for result in results:
        if result["tokens"] in plan.memory_tokens:
            case = (result["operation"], result["tokens"], asdict(plan.sizes), plan.seed)
            result["peak_mib"] = {name: fresh.call(peak_mib, name, *case) for name in names}
            print(result["operation"], result["tokens"], result["peak_mib"], "MiB", flush=True)
    return results


@torch.no_grad()
def peak_mib(name: str, operation: str, tokens: int, sizes: dict[str, Any], seed: int) -> float:
    """The peak of one operation above the weights and what is kept beside them; for a fresh process."""
    contender, d_model = CONTENDERS[name](Sizes(**sizes), seed), sizes["d_model"]
    for few in FIRST_USES:
        apply(contender, operation, residuals(few, d_model, seed))
    x = residuals(tokens, d_model, seed)
    return memory.peak_above_mib(lambda: apply(contender, operation, x))


def main() -> None:
    options = commandline.parser(__doc__)
    options.add_argument("--large", action="store_true", help="encode at 5120 -> 81920 instead")
    args = commandline.parsed(options)
    plan = QUICK if args.quick else LARGE if args.large else FULL
    if args.threads and not args.quick:
        plan = replace(plan, memory_tokens=())
    commandline.write(run(plan), args, "encode-large" if args.large else "encode")


if __name__ == "__main__":
    main()
