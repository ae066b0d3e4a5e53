"""All layers of a suite that is larger than what is kept of it: time and anonymous memory, against the card's way.

`python benchmarks/layers.py` makes 24 layers of 2048 -> 32768 (13 GB, and 10 GB of prepared copies) in a folder of its own
in `--folder`, takes some minutes and writes benchmarks/results/layers.json; with `--quick` it runs three tiny layers in
some seconds, to see whether it runs.

A pass opens each layer once and encodes its residuals, which are in memory. Each pass is measured once, in a fresh
process. The card's way is `torch.load` and the card's snippet, a layer dropped before the next is read.
"""

import subprocess
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import commandline
import fresh
import limit
import machine
import memory
import torch
from agreement import same_features
from contenders import Sizes, residuals
from suite_files import LABELS, WAYS, add_options, choice, drop_from_page_cache, pairs, scratch, write_layers
from timing import short

WARM, MAKING_COPIES, COLD = "warm", "warm, copies made", "cold"
PAGE_CACHE = {
    WARM: "after a pass of the same kind in another process",
    MAKING_COPIES: "after passes over the files; the prepared copies are made in this pass",
    COLD: "files dropped from the page cache before",
}


@dataclass(frozen=True)
class Plan:
    sizes: Sizes
    layers: int
    tokens: int
    max_bytes: int
    """What our suite may keep of its layers."""
    limit_bytes: int
    """What a whole process may use where memory is limited, page cache included."""
    seed: int = 0


FULL = Plan(Sizes(2048, 32768, 50), layers=24, tokens=1024, max_bytes=2 * 2**30, limit_bytes=4 * 2**30)
QUICK = Plan(Sizes(64, 512, 8), layers=3, tokens=16, max_bytes=400_000, limit_bytes=2**30)


def run(plan: Plan, folder: Path) -> dict[str, Any]:
    write_layers(folder, plan.sizes, plan.layers, plan.seed)
    chosen = choice(folder, plan.sizes.k, residuals(64, plan.sizes.d_model, plan.seed))
    results = [
        measured("card", plan, folder, WARM),
        measured("qwen_scope", plan, folder, WARM),
        measured("qwen_scope_prepared", plan, folder, MAKING_COPIES),
        measured("qwen_scope_prepared", plan, folder, WARM),
        limited("card", plan, folder),
        limited("qwen_scope_prepared", plan, folder),
    ]
    return {
        "benchmark": "layers",
        "machine": machine.describe(),
        "parameters": asdict(plan) | {"dtype": "float32", "residuals": "Gaussian", "operation": "encode"},
        "suite_bytes": sum(path.stat().st_size for path in folder.glob("*.sae.pt")),
        "copies_bytes": sum(path.stat().st_size for path in (folder / "cache" / "prepared").glob("*")),
        "contenders": LABELS,
        "page_cache": PAGE_CACHE,
        **chosen,
        "memory_method": f"RssAnon, sampled every {1000 * memory.SAMPLED_EVERY:g} ms",
        "results": results,
        "agreement": agreement(plan, folder),
    }


def measured(way: str, plan: Plan, folder: Path, page_cache: str, through: tuple[str, ...] = ()) -> dict[str, Any]:
    if page_cache == WARM:
        one_pass(way, str(folder), asdict(plan))
    if page_cache == COLD:
        drop_from_page_cache(folder)
    found = fresh.call(one_pass, way, str(folder), asdict(plan), through=through)
    print(way, page_cache, found, flush=True)
    return {"way": way, "page_cache": page_cache, **found}


def limited(way: str, plan: Plan, folder: Path) -> dict[str, Any]:
    """In a process that may not use more memory than the plan says, if the system lets us limit it."""
    about: dict[str, Any] = {"way": way, "limit_bytes": plan.limit_bytes}
    try:
        with limit.group(plan.limit_bytes) as group:
            found = measured(way, plan, folder, COLD, tuple(group.through))
            return {**about, **found, "peak_in_group_mib": group.peak_mib()}
    except limit.Unavailable as why:
        return {**about, "not_measured": str(why)}
    except subprocess.CalledProcessError as error:
        return {**about, "not_measured": f"the process ended with status {error.returncode}"}


@torch.no_grad()
def one_pass(way: str, folder: str, planned: dict[str, Any]) -> dict[str, Any]:
    """Every layer opened and its residuals encoded; the features go to a file, outside of the time taken."""
    plan = Plan(**{**planned, "sizes": Sizes(**planned["sizes"])})
    given = [residuals(plan.tokens, plan.sizes.d_model, plan.seed + layer) for layer in range(plan.layers)]
    import_kernels()
    features, taken = [], 0.0
    with memory.Anonymous() as anonymous, patch("torch.load", wraps=torch.load) as load:
        start = time.perf_counter()
        open_layer = WAYS[way](Path(folder), plan.sizes.k, plan.max_bytes)
        for layer, x in enumerate(given):
            encoded = open_layer(layer)(x)
            taken += time.perf_counter() - start
            features.append(pairs(encoded, plan.sizes.k))
            del encoded
            start = time.perf_counter()
    torch.save(features, Path(folder) / f"{way}.features")
    return {
        "seconds": short(taken),
        "files_opened": load.call_count,
        "anonymous_before_mib": round(anonymous.before_mib, 1),
        "peak_anonymous_mib": round(anonymous.peak_mib, 1),
    }


def import_kernels() -> None:
    """Imports are no part of what is measured; this one happens when first needed, and not everywhere."""
    try:
        import qwen_scope.kernels.compiled  # noqa: F401
    except ImportError:
        return


def agreement(plan: Plan, folder: Path) -> dict[str, Any]:
    """The features of all layers, each way's against ours."""
    found = {way: torch.load(folder / f"{way}.features") for way in WAYS}
    ours = joined(found["qwen_scope"])
    return {way: same_features(way, ours, joined(found[way])) for way in WAYS if way != "qwen_scope"}


def joined(features: list[tuple[torch.Tensor, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
    indices, values = zip(*features, strict=True)
    return torch.cat(indices), torch.cat(values)


def main() -> None:
    options = commandline.parser(__doc__)
    add_options(options)
    args = commandline.parsed(options)
    with scratch(args.folder, args.keep) as folder:
        found = run(QUICK if args.quick else FULL, folder)
    commandline.write(found, args, "layers")


if __name__ == "__main__":
    main()
