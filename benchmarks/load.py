"""Opening one layer and encoding its first token, then a second one, against the card's way.

`python benchmarks/load.py` makes one layer of 2048 -> 32768 in a folder of its own in `--folder`, takes about a minute and
writes benchmarks/results/load.json; with `--quick` it takes a tiny layer and some seconds, to see whether it runs.

Each round is a fresh process for each way; imports are not counted, and the file is in the page cache.
"""

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import commandline
import fresh
import machine
import memory
import torch
from contenders import Sizes, residuals
from layers import import_kernels
from suite_files import LABELS, WAYS, add_options, choice, scratch, write_layers
from timing import short


@dataclass(frozen=True)
class Plan:
    sizes: Sizes
    rounds: int
    seed: int = 0


FULL = Plan(Sizes(2048, 32768, 50), rounds=5)
QUICK = Plan(Sizes(64, 512, 8), rounds=1)


def run(plan: Plan, folder: Path) -> dict[str, Any]:
    write_layers(folder, plan.sizes, layers=1, seed=plan.seed)
    chosen = choice(folder, plan.sizes.k, residuals(1, plan.sizes.d_model, plan.seed))
    arguments = (str(folder), asdict(plan.sizes), plan.seed)
    for way in WAYS:
        first_and_second(way, *arguments)  # makes the prepared copy, and brings the files into the page cache
    rounds = [{way: fresh.call(first_and_second, way, *arguments) for way in WAYS} for _ in range(plan.rounds)]
    return {
        "benchmark": "load",
        "machine": machine.describe(),
        "parameters": asdict(plan) | {"dtype": "float32", "operation": "encode", "page_cache": "warm"},
        "contenders": LABELS,
        **chosen,
        "results": [{"way": way, **medians([of[way] for of in rounds])} for way in WAYS],
    }


def medians(found: list[dict[str, float]]) -> dict[str, float]:
    return {field: short(median(one[field] for one in found)) for field in found[0]}


@torch.no_grad()
def first_and_second(way: str, folder: str, sizes: dict[str, int], seed: int) -> dict[str, float]:
    first, second = residuals(2, sizes["d_model"], seed).split(1)
    import_kernels()
    before = memory.of_status("RssAnon")
    start = time.perf_counter()
    encode = WAYS[way](Path(folder), sizes["k"], None)(0)
    encode(first)
    opened = time.perf_counter()
    encode(second)
    ended = time.perf_counter()
    return {
        "first_token_seconds": opened - start,
        "second_token_seconds": ended - opened,
        "anonymous_before_mib": before,
        "anonymous_mib": memory.of_status("RssAnon"),
    }


def main() -> None:
    options = commandline.parser(__doc__)
    add_options(options)
    args = commandline.parsed(options)
    with scratch(args.folder, args.keep) as folder:
        found = run(QUICK if args.quick else FULL, folder)
    print(*found["results"], sep="\n")
    commandline.write(found, args, "load")


if __name__ == "__main__":
    main()
