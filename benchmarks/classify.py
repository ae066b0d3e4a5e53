"""A rule over a corpus against a harvest of the same texts.

`python benchmarks/classify.py --folder FOLDER` takes some minutes and writes benchmarks/results/classify.json. The texts are
stretches of the Python standard library of the interpreter that runs it; the model and the SAEs are the bundled ones.

In turns, the same texts go through `read_shard`, which does everything a harvest does for each token once it is tokenized, and
through `apply`, from the file of texts to the file of rows: tokenizing, reading, encoding, deciding, writing.
"""

import json
import shutil
import sysconfig
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import commandline
import machine
from timing import short, time_case

from qwen_scope.corpus import located
from qwen_scope.data.classification import Rule, apply
from qwen_scope.data.classification.rule import Term
from qwen_scope.fingerprint import fingerprint
from qwen_scope.index.partial import Keep
from qwen_scope.index.read_shard import read_shard
from qwen_scope.index.shards import Shards
from qwen_scope.scope import Scope

CONTEXT = 4096
"""No text is as long: each is one piece of the shard."""


@dataclass(frozen=True)
class Settings:
    layers: tuple[tuple[int, ...], ...] = ((15,), (7, 15, 23))
    dtype: str = "bfloat16"
    tokens: int = 32768
    """In a round, about."""
    characters: int = 700
    """Of a text."""
    terms: int = 20
    """Features of the rule."""
    rounds: int = 3


QUICK = Settings(((7,),), tokens=1000, rounds=2)


def run(settings: Settings, folder: Path) -> dict[str, Any]:
    return {
        "benchmark": "classify",
        "machine": machine.describe(),
        "parameters": asdict(settings) | {"model": "the bundled one"},
        "results": [throughput(settings, list(layers), folder / "classify") for layers in settings.layers],
    }


def throughput(settings: Settings, layers: list[int], folder: Path) -> dict[str, Any]:
    scope = Scope.from_pretrained(layers=layers, dtype=settings.dtype)
    assert scope.backbone.tokenizer is not None
    corpus, out = folder / "texts.jsonl", folder / "rows.jsonl"
    write_texts(corpus, settings)
    shard = Shards.write(
        folder / "shards",
        lambda broken: located(corpus, broken=broken),
        scope.backbone.tokenizer,
        context=CONTEXT,
        shard_tokens=2 * settings.tokens,
        tokens=None,
    )[0]
    rule, keep = rule_of(scope, layers, settings.terms), Keep(10, (15, 8))

    def harvesting() -> None:
        read_shard(scope, shard, layers, keep, forward_tokens=2048)

    def applying() -> None:
        out.unlink(missing_ok=True)
        assert apply(rule, scope, corpus, out).texts == len(shard.documents)

    applying()  # what happens once: compiling, choosing a kernel
    timed = time_case({"qwen_scope": applying, "harvest": harvesting}, 0, settings.rounds)
    shutil.rmtree(folder)
    return {
        "layers": layers,
        "texts": len(shard.documents),
        "tokens": len(shard),
        **timed,
        "tokens_per_second": {name: short(len(shard) / seconds) for name, seconds in timed["seconds"].items()},
    }


def write_texts(path: Path, settings: Settings) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        for _, text in zip(range(settings.tokens * 3 // settings.characters), texts(settings.characters), strict=False):
            file.write(json.dumps({"text": text}) + "\n")


def texts(characters: int) -> Iterator[str]:
    for _, document in located(sysconfig.get_path("stdlib"), broken=lambda sentence: None):
        for start in range(0, len(document), characters):
            text = str(document[start : start + characters])
            if text.strip():
                yield text


def rule_of(scope: Scope, layers: list[int], terms: int) -> Rule:
    """Some features of all layers, each with as much to say."""
    names = [f"{layers[n % len(layers)]}/{n}" for n in range(terms)]
    return Rule(
        kind="sparse",
        positive="code",
        terms=[Term(name, 1.0, 5.0, 0.5, 0.5) for name in names],
        intercept=0.0,
        threshold=0.5,
        model=scope.backbone.name,
        suite=scope.suite.name,
        fingerprints={str(layer): fingerprint(scope.suite, [layer]) for layer in layers},
        learnt_from={},
    )


def main() -> None:
    options = commandline.parser(__doc__)
    options.add_argument("--folder", type=Path, default=Path("build"), help="for texts, shards and rows")
    args = commandline.parsed(options)
    commandline.write(run(QUICK if args.quick else Settings(), args.folder), args, "classify")


if __name__ == "__main__":
    main()
