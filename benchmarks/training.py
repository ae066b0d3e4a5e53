"""Time and peak memory of one optimiser step, against dense autograd and peers if installed.

`python benchmarks/training.py` takes some minutes and writes benchmarks/results/training.json; with `--quick` it runs
tiny sizes in some seconds, to see whether it runs.

All start from the same weights and see the same batches; the losses of the first step are compared. Times are taken in
one process, in rounds (see timing.py), peaks in a fresh process each, above weights and optimiser state.
"""

from dataclasses import asdict, dataclass
from itertools import cycle
from typing import Any

import commandline
import fresh
import machine
import memory
from contenders import OWN, Sizes, missing_peers, peers, residuals
from timing import OURS, short, time_case
from torch import Tensor
from trainers import TRAINERS, QwenScope, Trainer, started

BATCHES = 4
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Case:
    sizes: Sizes
    tokens: int


@dataclass(frozen=True)
class Plan:
    cases: tuple[Case, ...]
    seed: int = 0
    seconds_per_case: float = 30
    min_rounds: int = 5


FULL = Plan((Case(Sizes(576, 9216, 50), tokens=4096), Case(Sizes(768, 12288, 50), tokens=1024)))
QUICK = Plan((Case(Sizes(64, 512, 8), tokens=32),), seconds_per_case=0.05, min_rounds=3)


def run(plan: Plan) -> dict[str, Any]:
    labels = {OURS: OWN[OURS], "dense": "dense autograd"} | peers()
    return {
        "benchmark": "training",
        "machine": machine.describe(),
        "parameters": asdict(plan) | {"dtype": "float32", "residuals": "Gaussian"},
        "contenders": {name: {"label": labels[name], "step": TRAINERS[name].includes} for name in labels},
        "not_installed": missing_peers(),
        "memory_method": memory.method(),
        "results": [run_case(case, plan, list(labels)) for case in plan.cases],
    }


def run_case(case: Case, plan: Plan, names: list[str]) -> dict[str, Any]:
    ours = QwenScope(started(case.sizes, plan.seed))
    others = {name: TRAINERS[name](started(case.sizes, plan.seed)) for name in names if name != OURS}
    contenders: dict[str, Trainer] = {OURS: ours, **others}
    batches = batches_of(case, plan.seed)
    first_fvu = {name: one.fvu(one.step(batches[0]), batches[0]) for name, one in contenders.items()}
    difference = first_fvu_difference(first_fvu)
    calls = {name: stepping(contender, batches) for name, contender in contenders.items()}
    timed = time_case(calls, plan.seconds_per_case, plan.min_rounds)
    arguments = (asdict(case.sizes), case.tokens, plan.seed)
    peaks = {name: fresh.call(peak_mib, name, *arguments) for name in names}
    print(case, {name: f"{r:.2f}x" for name, r in timed["times_as_fast"].items()}, peaks, "MiB", flush=True)
    agreement = {"first_fvu": first_fvu, "first_fvu_difference": difference}
    return {**asdict(case), **ours.about, **timed, **agreement, "peak_mib": peaks}


def batches_of(case: Case, seed: int) -> tuple[Tensor, ...]:
    return residuals(BATCHES * case.tokens, case.sizes.d_model, seed + 1).split(case.tokens)


def stepping(trainer: Trainer, batches: tuple[Tensor, ...]) -> Any:
    following = cycle(batches)
    return lambda: trainer.step(next(following))


def first_fvu_difference(found: dict[str, float]) -> float:
    """The largest difference from ours, relative to it.

    Raises:
        SystemExit: they do not compute the same thing, so times would mean nothing.
    """
    difference = max(abs(fvu / found[OURS] - 1) for fvu in found.values())
    if difference > TOLERANCE:
        raise SystemExit(f"expected one loss at the first step, found {found}")
    return short(difference)


def peak_mib(name: str, sizes: dict[str, Any], tokens: int, seed: int) -> float:
    """The peak of a step above weights, optimiser state and what is kept beside them; for a fresh process."""
    case = Case(Sizes(**sizes), tokens)
    trainer, batches = TRAINERS[name](started(case.sizes, seed)), batches_of(case, seed)
    for batch in batches[:2]:  # make the optimiser's state and bring in every code path
        trainer.step(batch)
    return memory.peak_above_mib(lambda: trainer.step(batches[2]))


def main() -> None:
    args = commandline.parsed(commandline.parser(__doc__))
    commandline.write(run(QUICK if args.quick else FULL), args, "training")


if __name__ == "__main__":
    main()
