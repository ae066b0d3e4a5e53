"""A footprint against the bare model, and what is reckoned from many saved ones.

`python benchmarks/footprints.py --folder FOLDER` takes some six minutes, most of them for making 50 footprints to read, and
writes benchmarks/results/footprints.json. Items are paragraphs of the Python standard library's documentation strings.

Speed: the same items go in turns through the model alone, tokenized already and stopped at the layer wanted, and through
`Footprint.of`, which begins with their text. Saved footprints are random, but clustered: each set has a vocabulary of its own of
frequent and rare features, which it shares with its neighbours in part.
"""

import ast
import shutil
import sysconfig
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import commandline
import machine
import numpy as np
from timing import quartiles, seconds, short, time_case

from qwen_scope.data import Footprint
from qwen_scope.data.coverage import redundancy
from qwen_scope.data.fired import Fired, Position
from qwen_scope.data.footprint import About
from qwen_scope.data.overlap import overlaps
from qwen_scope.reading import read
from qwen_scope.scope import Scope
from qwen_scope.tokens import tokenize


@dataclass(frozen=True)
class Settings:
    layer: int = 15
    positions: tuple[Position, ...] = ("last", "any")
    dtype: str = "bfloat16"
    items: int = 500
    """In a round of the comparison of speeds."""
    rounds: int = 3
    sets: int = 50
    items_of_each: int = 10_000
    d_sae: int = 32_768
    k: int = 50
    resamples: int = 100


QUICK = Settings(items=20, rounds=2, sets=4, items_of_each=60, d_sae=512, k=8, resamples=5)


def run(settings: Settings, folder: Path) -> dict[str, Any]:
    return {
        "benchmark": "footprints",
        "machine": machine.describe(),
        "parameters": asdict(settings) | {"model": "the bundled one"},
        "results": made(settings),
        "saved": saved(settings, folder),
    }


def made(settings: Settings) -> list[dict[str, Any]]:
    """The model alone and a footprint, in turns, on the same items."""
    scope = Scope.from_pretrained(layers=[settings.layer], dtype=settings.dtype)
    texts = [text for text, _ in zip(paragraphs(), range(settings.items), strict=False)]
    tokenized, _ = tokenize(texts, scope.backbone.tokenizer)
    tokens = sum(map(len, tokenized))

    def bare() -> None:
        for _ in read(tokenized, scope.backbone, [settings.layer], progress=False):
            pass

    found = []
    for position in settings.positions:

        def footprint(position: Position = position) -> Footprint:
            return Footprint.of(scope, texts, layer=settings.layer, position=position)

        footprint()  # what happens once: compiling, choosing a kernel
        timed = time_case({"qwen_scope": footprint, "model": bare}, 0, settings.rounds)
        rates = {name: short(tokens / taken) for name, taken in timed["seconds"].items()}
        found.append({"position": position, "tokens": tokens, **timed, "tokens_per_second": rates})
    return found


def paragraphs() -> Iterator[str]:
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                for text in (ast.get_docstring(node) or "").split("\n\n"):
                    if 100 <= len(text) <= 800:
                        yield text


def saved(settings: Settings, folder: Path) -> dict[str, Any]:
    """From files to redundancy and overlaps of all sets."""
    paths = [folder / "footprints" / f"{number}.safetensors" for number in range(settings.sets)]
    for number, path in enumerate(paths):
        clustered(settings, number).save(path)
    pairs = sum(len(Footprint.load(path).fired.features) for path in paths)

    def without_intervals() -> None:
        loaded = [Footprint.load(path) for path in paths]
        for each in loaded:
            redundancy(each.fired)
        overlaps(loaded)

    loaded = [Footprint.load(path) for path in paths]

    def with_intervals() -> None:
        overlaps(loaded, resamples=settings.resamples)

    calls = {"load, redundancy, overlaps": without_intervals, "intervals": with_intervals}
    taken = {name: [seconds(call) for _ in range(settings.rounds)] for name, call in calls.items()}
    shutil.rmtree(folder / "footprints")
    return {
        "features_fired": pairs,
        "seconds": {name: short(median(values)) for name, values in taken.items()},
        "quartiles": {name: quartiles(values) for name, values in taken.items()},
    }


def clustered(settings: Settings, number: int) -> Footprint:
    """A set whose items draw features from a vocabulary of its own: frequent and rare ones, neighbours sharing some."""
    chance = np.random.default_rng(number)
    vocabulary = np.random.default_rng(1000 + number // 5).permutation(settings.d_sae)[: settings.d_sae // 4]
    own = chance.permutation(settings.d_sae)[: settings.d_sae // 8]
    known = np.unique(np.concatenate([vocabulary, own]))
    weights = 1 / (chance.permutation(len(known)) + 20.0)
    edges = np.cumsum(weights) / weights.sum()
    drawn = np.searchsorted(edges, chance.random((settings.items_of_each, 2 * settings.k))).clip(max=len(known) - 1)
    drawn = np.sort(drawn, axis=1)
    fresh = np.ones(drawn.shape, dtype=bool)
    fresh[:, 1:] = drawn[:, 1:] != drawn[:, :-1]
    # Of the features drawn, as many as an item fires, chosen by chance.
    rank = np.where(fresh, chance.random(drawn.shape), 2).argsort(1).argsort(1)
    kept = fresh & (rank < settings.k)
    features = known[drawn[kept]].astype(np.int32)
    starts = np.concatenate([[0], np.cumsum(kept.sum(1))]).astype(np.int64)
    fired = Fired(starts, features, np.ones(len(features), np.float32), settings.d_sae)
    about = About(f"set {number}", "random", None, len(fired), 0, None, 0, "last", "none", "none", "random")
    return Footprint(about, fired, [f"item {n}" for n in range(len(fired))])


def main() -> None:
    options = commandline.parser(__doc__)
    options.add_argument("--folder", type=Path, default=Path("build"), help="for saved footprints")
    args = commandline.parsed(options)
    commandline.write(run(QUICK if args.quick else Settings(), args.folder), args, "footprints")


if __name__ == "__main__":
    main()
