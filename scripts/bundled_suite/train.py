"""Third step of the bundled suite: train its layers on the mixed corpus and write them as bf16, which is what is shipped.

    python scripts/bundled_suite/train.py CORPUS_DIR SUITE_DIR

The layers differ in width, so each width is a run of its own. Residuals are kept in CORPUS_DIR/residuals (17 GB), so that the
model reads them once for both passes of a run. What was begun is gone on with.
"""

import argparse
from pathlib import Path

import torch

from qwen_scope.suite import Suite
from qwen_scope.training import RunConfig, TrainConfig, train

NAME = "SAE-Res-SmolLM2-135M-Instruct-L0_50"
RUNS = {(7, 23): 4608, (15,): 9216}
"""Layers and their number of features."""


def main() -> None:
    """Trains and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", type=Path)
    parser.add_argument("suite", type=Path)
    args = parser.parse_args()
    for layers, d_sae in RUNS.items():
        config = RunConfig(
            TrainConfig(d_sae),
            layers,
            tokens=5_000_000,
            passes=2,
            held_out=65_536,
            name=NAME,
            cache=args.corpus / "residuals",
        )
        train(args.corpus / "mixed.jsonl", args.corpus / "float32", config)
    Suite.from_pretrained(args.corpus / "float32").save_pretrained(args.suite, dtype=torch.bfloat16)


if __name__ == "__main__":
    main()
