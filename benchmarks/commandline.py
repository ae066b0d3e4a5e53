"""What the benchmark scripts share: `--quick`, `--threads`, and where results go."""

import argparse
import json
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


def parser(documentation: str | None) -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=documentation, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--quick", action="store_true", help="tiny sizes; written only where --out says")
    made.add_argument("--threads", type=int, help="default: as many as torch takes")
    made.add_argument("--out", type=Path, help="default: in results/ beside this file")
    return made


def parsed(options: argparse.ArgumentParser) -> argparse.Namespace:
    """The options, with the number of threads already set."""
    args = options.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    return args


def write(found: dict[str, Any], args: argparse.Namespace, name: str) -> None:
    """To `--out`, else to `results/{name}.json`, else, for a quick run, nowhere."""
    if args.threads:
        name += f"-{args.threads}-thread{'s' * (args.threads > 1)}"
    out = args.out or (None if args.quick else RESULTS / f"{name}.json")
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
