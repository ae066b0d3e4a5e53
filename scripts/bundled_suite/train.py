"""Third step of the bundled suite: train one layer's SAE on harvested residuals and add it to a suite's folder.

    python scripts/bundled_suite/train.py RESIDUALS_DIR SUITE_DIR --layer 15 --d-sae 9216 [--epochs 2] [--threads N]

Prints the variance explained on held-out residuals. Written as bf16, which is what is shipped.
"""

import argparse
from dataclasses import asdict
from pathlib import Path

import torch

from qwen_scope.bundled import GGUF_SHA256, MODEL_NAME
from qwen_scope.evaluation.fidelity import fvu
from qwen_scope.suite import Suite
from qwen_scope.training.activations import load_residuals, shards
from qwen_scope.training.trainer import TrainConfig, train_sae

NAME = "SAE-Res-SmolLM2-135M-Instruct-L0_50"


def main() -> None:
    """Trains, measures, writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("residuals", type=Path)
    parser.add_argument("suite", type=Path)
    parser.add_argument("--layer", type=int, required=True)
    parser.add_argument("--d-sae", type=int, required=True)
    parser.add_argument("--epochs", type=float, default=2.0)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    x = load_residuals(shards(args.residuals / "train"), args.layer)
    config = TrainConfig(d_sae=args.d_sae, epochs=args.epochs)
    sae = train_sae(x, config)
    heldout = load_residuals(shards(args.residuals / "heldout"), args.layer).float()
    explained = 1 - fvu(heldout, torch.cat([sae(part) for part in heldout.split(4096)]))
    print(f"layer {args.layer}: {explained:.4f} of the held-out variance explained, {len(x)} training tokens")
    provenance = {
        "model_file_sha256": GGUF_SHA256,
        f"layer{args.layer}": {"training_tokens": len(x), **asdict(config)},
    }
    Suite.of({args.layer: sae}, NAME, MODEL_NAME, provenance).save_pretrained(args.suite, dtype=torch.bfloat16)


if __name__ == "__main__":
    main()
