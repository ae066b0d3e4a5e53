"""Second step of the bundled suite: mix the corpus by kind and write it as a corpus that `qwen-scope train` reads.

    python scripts/bundled_suite/mix.py CORPUS_DIR

Writes CORPUS_DIR/mixed.jsonl out of train.jsonl. Documents are drawn so that each kind of text has its share (`SHARES`, by
characters). Every second dialogue and instruction is rendered through the model's chat template, since it is a chat model.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from qwen_scope.bundled import model_folder
from qwen_scope.files import replacing

SHARES = {
    "prose": 0.20,
    "instruction": 0.14,
    "news": 0.13,
    "dialogue": 0.13,
    "code": 0.12,
    "sentences": 0.10,
    "language": 0.10,
    "reference": 0.08,
}


def mixed_documents(path: Path) -> Iterator[dict]:
    """Documents of a JSONL file in its order, but the kinds interleaved by `SHARES`; ends when a kind runs out."""
    by_kind: dict[str, list[dict]] = {kind: [] for kind in SHARES}
    with path.open() as file:
        for line in file:
            document = json.loads(line)
            by_kind[document["kind"]].append(document)
    queues = {kind: iter(documents) for kind, documents in by_kind.items()}
    drawn = dict.fromkeys(SHARES, 0)
    while True:
        kind = min(SHARES, key=lambda kind: drawn[kind] / SHARES[kind])
        document = next(queues[kind], None)
        if document is None:
            return
        drawn[kind] += len(document["text"])
        yield document


def rendered(documents: Iterator[dict], tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    """Plain texts; every second document with turns, and every second instruction, through the chat template."""
    for number, document in enumerate(documents):
        turns = document.get("turns")
        if turns is None and document["kind"] == "instruction":
            turns = [{"role": "user", "content": document["text"]}]
        if turns and number % 2:
            yield str(tokenizer.apply_chat_template(turns, tokenize=False))
        else:
            yield document["text"]


def main() -> None:
    """Mixes and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", type=Path)
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(model_folder())
    texts = rendered(mixed_documents(args.corpus / "train.jsonl"), tokenizer)
    with (
        replacing(args.corpus / "mixed.jsonl") as temporary,
        temporary.open("w", encoding="utf-8", newline="\n") as file,
    ):
        file.writelines(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)


if __name__ == "__main__":
    main()
