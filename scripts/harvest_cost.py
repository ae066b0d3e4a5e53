"""What a large harvest costs: a calculation from sizes and rates, each of which is an option.

    python scripts/harvest_cost.py
    python scripts/harvest_cost.py --tokens 1e9 --layers 1 --gpus 8

Counted are the products of the model's pass (2 operations for each weight that a token passes) and of encoding (2 d_model
d_sae for each token and layer), at a share of the GPU's bfloat16 peak; the loops over kept (token, feature) pairs, which run
on the CPU beside it; and bytes on the shared disk. Left out are attention over the context, loading models, tokenizing, joining
parts, and GPUs that wait for each other. On a GPU the encoder's exact screen is assumed to run at the same share as the model.
"""

import argparse
import re
from dataclasses import dataclass, fields
from pathlib import Path

PAGE = Path(__file__).parent.parent / "docs" / "harvest.md"
MARKED = re.compile(r"(<!-- cost -->\n).*?(<!-- /cost -->)", re.DOTALL)


@dataclass(frozen=True)
class Cluster:
    """Sizes and rates."""

    tokens: float = 1e10
    """Tokens in the corpus."""
    parameters: float = 27e9
    """Weights that each token passes through."""
    d_model: int = 5120
    """Width of the residual stream."""
    d_sae: int = 81920
    """Features of a layer."""
    layers_of_model: int = 64
    """Layers of the model."""
    gpus: int = 64
    """GPUs, a worker each."""
    peak: float = 989e12
    """bfloat16 operations a second of a GPU: an H100 SXM's, by its data sheet."""
    share: float = 0.4
    """Share of the peak that is reached."""
    pair_seconds: float = 5e-7
    """CPU core seconds for each kept (token, feature) pair: `benchmarks/harvest.py` shows 5.2e-7 seconds beyond the model's
    pass for one layer of 9216 features, the encoder included."""
    k: int = 50
    """Features kept per token."""
    shard_tokens: float = 5e7
    """Tokens in a shard."""
    bytes_per_feature: float = 4096
    """What a part holds of each feature."""

    def row(self, layers: int) -> list[str]:
        """A line of the table for a harvest of some layers, the last of them the deepest."""
        model = 2 * self.parameters * layers_read(layers, self.layers_of_model) / self.layers_of_model
        encoding = 2 * self.d_model * self.d_sae * layers
        gpu_hours = self.tokens * (model + encoding) / (self.peak * self.share) / 3600
        cpu_hours = self.tokens * self.k * layers * self.pair_seconds / 3600
        part = self.d_sae * layers * self.bytes_per_feature
        return [
            str(layers),
            f"{gpu_hours:,.0f}",
            f"{gpu_hours / self.gpus:,.1f}",
            f"{encoding / (model + encoding):.0%}",
            f"{cpu_hours:,.0f}",
            f"{part / 1e9:.1f} GB",
            f"{12 * self.tokens / 1e9:,.0f} GB",
        ]


def layers_read(layers: int, of: int) -> int:
    """Layers of the model that are run: a harvest of one is taken to be of the middle layer, of more to go to the last."""
    return of // 2 if layers == 1 else of


def table(cluster: Cluster) -> str:
    """The table of the document."""
    head = [
        "layers",
        "GPU hours",
        f"hours on {cluster.gpus} GPUs",
        "of them encoding",
        "CPU core hours",
        "a part",
        "shards",
    ]
    rows = [head, ["--:"] * len(head), *(cluster.row(layers) for layers in (1, 4, cluster.layers_of_model))]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"


def main() -> None:
    """Prints the table; with `--write`, into the document."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for field in fields(Cluster):
        kind = int if isinstance(field.default, int) else float
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=kind, default=field.default)
    parser.add_argument("--write", action="store_true", help="write it into docs/harvest.md")
    args = vars(parser.parse_args())
    write = args.pop("write")
    made = table(Cluster(**args))
    print(made, end="")
    if write:
        text = PAGE.read_text(encoding="utf-8")
        PAGE.write_text(MARKED.sub(lambda match: match[1] + made + match[2], text), encoding="utf-8")


if __name__ == "__main__":
    main()
