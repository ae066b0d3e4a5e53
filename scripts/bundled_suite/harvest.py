"""Second step of the bundled suite: run the corpus through the bundled model and keep the residuals on disk.

    python scripts/bundled_suite/harvest.py CORPUS_DIR RESIDUALS_DIR [--tokens N] [--part I/N]

Documents are drawn so that each kind of text has its share (`SHARES`, by characters). Every second dialogue and
instruction is rendered through the model's chat template, since it is a chat model. About 1 000 tokens/s on 2 cores;
resumes where it stopped.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from qwen_scope.backbone import Backbone
from qwen_scope.training.activations import harvest_residuals

LAYERS = [7, 15, 23]
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
    """Harvests train and held-out residuals."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", type=Path)
    parser.add_argument("residuals", type=Path)
    parser.add_argument("--tokens", type=int, default=3_000_000)
    parser.add_argument("--heldout-tokens", type=int, default=131_072)
    parser.add_argument("--part", default="0/1", help="I/N: make every N-th shard only, in one thread if N > 1")
    args = parser.parse_args()
    index, parts = map(int, args.part.split("/"))
    if parts > 1:
        torch.set_num_threads(1)
    backbone = Backbone.from_pretrained(dtype="bfloat16", device="cpu")
    assert backbone.tokenizer is not None
    for part, tokens in (("heldout", args.heldout_tokens), ("train", args.tokens)):
        texts = rendered(mixed_documents(args.corpus / f"{part}.jsonl"), backbone.tokenizer)
        harvest_residuals(backbone, texts, LAYERS, args.residuals / part, tokens=tokens, part=(index, parts))


if __name__ == "__main__":
    main()
