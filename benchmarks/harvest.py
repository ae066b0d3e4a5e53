"""Harvesting against the bare model, and what a whole harvest takes in memory.

`python benchmarks/harvest.py --folder FOLDER` takes some ten minutes and writes benchmarks/results/harvest.json. The text is
the Python standard library of the interpreter that runs it; the model and the SAEs are the bundled ones.

Speed: the same pieces of text go in turns through the model alone, stopped at the last layer wanted, and through
`read_shard`, which does everything a harvest does for each token. Memory: a whole harvest in a process of its own.
"""

import shutil
import sysconfig
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import commandline
import fresh
import machine
import memory
import numpy as np
from timing import short, time_case

from qwen_scope.corpus import located
from qwen_scope.index.config import HarvestConfig
from qwen_scope.index.harvest import harvest
from qwen_scope.index.partial import Keep
from qwen_scope.index.read_shard import read_shard
from qwen_scope.index.shards import Shards
from qwen_scope.reading import read
from qwen_scope.scope import Scope
from qwen_scope.tokens import TokenizedText


@dataclass(frozen=True)
class Settings:
    layers: tuple[tuple[int, ...], ...] = ((15,), (7, 15, 23))
    dtype: str = "bfloat16"
    tokens: int = 32768
    """In a round of the comparison of speeds."""
    rounds: int = 3
    whole_tokens: int = 131072
    """Of the whole harvest."""


QUICK = Settings(((7,),), tokens=1000, rounds=2, whole_tokens=1000)


def run(settings: Settings, folder: Path) -> dict[str, Any]:
    return {
        "benchmark": "harvest",
        "machine": machine.describe(),
        "parameters": asdict(settings) | {"model": "the bundled one", "context": 256},
        "results": [throughput(settings, list(layers), folder) for layers in settings.layers],
        "whole": fresh.call(whole, str(folder), settings.dtype, settings.whole_tokens),
        "memory_method": memory.method(),
    }


def throughput(settings: Settings, layers: list[int], folder: Path) -> dict[str, Any]:
    """The model alone and harvesting, in turns, on one shard."""
    scope = Scope.from_pretrained(layers=layers, dtype=settings.dtype)
    shard = shards(scope, folder / "shards", settings.tokens)[0]
    texts = [TokenizedText("", ids.tolist(), [], []) for ids in np.split(shard.ids, shard.pieces[1:-1])]
    keep = Keep(10, (15, 8))

    def bare() -> None:
        for _ in read(texts, scope.backbone, layers, progress=False):
            pass

    def harvesting() -> None:
        read_shard(scope, shard, layers, keep, forward_tokens=2048)

    harvesting()  # what happens once: compiling, choosing a kernel
    timed = time_case({"qwen_scope": harvesting, "model": bare}, 0, settings.rounds)
    shutil.rmtree(folder / "shards")
    return {
        "layers": layers,
        "tokens": len(shard),
        **timed,
        "tokens_per_second": {name: short(len(shard) / seconds) for name, seconds in timed["seconds"].items()},
    }


def shards(scope: Scope, folder: Path, tokens: int) -> Shards:
    assert scope.backbone.tokenizer is not None
    return Shards.write(
        folder,
        lambda broken: located(sysconfig.get_path("stdlib"), broken=broken),
        scope.backbone.tokenizer,
        context=256,
        shard_tokens=tokens,
        tokens=tokens,
    )


def whole(folder: str, dtype: str, tokens: int) -> dict[str, Any]:
    """A harvest of all bundled layers from text to index; for a fresh process."""
    place = Path(folder) / "whole"
    start = time.perf_counter()
    index = harvest(sysconfig.get_path("stdlib"), place, HarvestConfig(tokens=tokens, dtype=dtype))  # pyright: ignore
    seconds = time.perf_counter() - start
    size = sum(path.stat().st_size for path in files(place))
    shutil.rmtree(place)
    return {
        "layers": index.layers,
        "features": len(index),
        "tokens": index.about.tokens,
        "seconds": short(seconds),
        "peak_mib": round(memory.highest_mib(), 1),
        "index_bytes": size,
    }


def files(folder: Path) -> Iterator[Path]:
    return (path for path in folder.rglob("*") if path.is_file())


def main() -> None:
    options = commandline.parser(__doc__)
    options.add_argument("--folder", type=Path, default=Path("build"), help="for shards and the index")
    args = commandline.parsed(options)
    commandline.write(run(QUICK if args.quick else Settings(), args.folder), args, "harvest")


if __name__ == "__main__":
    main()
