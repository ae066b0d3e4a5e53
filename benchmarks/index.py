"""How quickly a feature index answers: opening it, one feature, words searched for.

`python benchmarks/index.py` takes a minute and writes benchmarks/results/index.json. The index is the one that comes with the
package with its layers copied under other numbers, so that there are over 30 000 features.
"""

import json
import os
import shutil
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import commandline
import machine
from timing import quartiles, short

from qwen_scope.index.feature_index import FeatureIndex, bundled_folder

QUERIES = ("legal language", "football", "code comments", "French", "the king and his army", "numbers", "love letter")
COPIES, OFFSET = 2, 100
REPEATS = 15


def run(quick: bool) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        # The search's database goes there too, so that it is made anew.
        os.environ["QWEN_SCOPE_CACHE"] = str(Path(folder) / "cache")
        place = copied(Path(folder) / "index", 1 if quick else COPIES)
        return measured(place, 2 if quick else REPEATS)


def copied(place: Path, copies: int) -> Path:
    """The bundled index, its layers `copies` times."""
    about = json.loads((bundled_folder() / "index.json").read_text(encoding="utf-8"))
    for layer in list(about["layers"]):
        for copy in range(copies):
            number = str(int(layer) + OFFSET * copy)
            shutil.copytree(bundled_folder() / f"layer{layer}", place / f"layer{number}")
            for of in ("layers", "norm_outliers"):
                about[of][number] = about[of][layer]
    (place / "index.json").write_text(json.dumps(about), encoding="utf-8")
    return place


def measured(place: Path, repeats: int) -> dict[str, Any]:
    index = FeatureIndex.open(place)
    building = timed(lambda: index.search("anything"))
    names = [(layer, number) for layer in index.layers for number in range(0, index.about.layers[layer], 997)]
    figures = {
        "open": [timed(lambda: FeatureIndex.open(place)) for _ in range(repeats)],
        "open, first feature": [timed(lambda: FeatureIndex.open(place)[names[0]]) for _ in range(repeats)],
        "a feature": [timed(lambda name=name: index[name]) for name in names],
        "search, words": [timed(lambda query=query: index.search(query)) for query in QUERIES for _ in range(repeats)],
    }
    return {
        "benchmark": "index",
        "machine": machine.describe(),
        "parameters": {"features": len(index), "layers": index.layers, "queries": QUERIES},
        "search_built_seconds": short(building),
        "results": {
            name: {
                "seconds": short(median(values)),
                "worst_seconds": short(max(values)),
                "quartiles": quartiles(values),
            }
            for name, values in figures.items()
        },
    }


def timed(call: Any) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def main() -> None:
    args = commandline.parsed(commandline.parser(__doc__))
    commandline.write(run(args.quick), args, "index")


if __name__ == "__main__":
    main()
