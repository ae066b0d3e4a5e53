"""The 14 groups of SAEs published as Qwen-Scope, and how their names are read. Knows names and numbers only.

Source: the repositories' names and the model cards; a published repository has no config file.
"""

import difflib
import re
from dataclasses import dataclass


@dataclass(frozen=True)
class PublishedSuite:
    """One published group: a TopK SAE for every decoder layer of one backbone, files `layer{n}.sae.pt`."""

    repo_id: str
    """On the Hugging Face hub, such as `Qwen/SAE-Res-Qwen3.5-2B-Base-W32K-L0_50`."""
    backbone: str
    """Hub id of the language model the SAEs were trained on."""
    n_layers: int
    """Decoder layers, each with one file; numbered from 0."""
    d_model: int
    """Width of the residual stream."""
    d_sae: int
    """Features per layer."""
    k: int
    """Features kept per token."""

    @property
    def short_name(self) -> str:
        """The backbone's name in lower case without `-base`, then `-k` and k: `qwen3.5-2b-k50`."""
        return f"{self.backbone.removeprefix('Qwen/').removesuffix('-Base').lower()}-k{self.k}"


# backbone, layers, d_model, (width in units of 1024, k) of each group
_TABLE = (
    ("Qwen3-1.7B-Base", 28, 2048, ((32, 50), (32, 100))),
    ("Qwen3-8B-Base", 36, 4096, ((64, 50), (64, 100))),
    ("Qwen3.5-2B-Base", 24, 2048, ((32, 50), (32, 100))),
    ("Qwen3.5-9B-Base", 32, 4096, ((64, 50), (64, 100))),
    ("Qwen3.5-27B", 64, 5120, ((80, 50), (80, 100))),
    ("Qwen3-30B-A3B-Base", 48, 2048, ((32, 50), (128, 100))),
    ("Qwen3.5-35B-A3B-Base", 40, 2048, ((32, 50), (128, 100))),
)

PUBLISHED: tuple[PublishedSuite, ...] = tuple(
    PublishedSuite(f"Qwen/SAE-Res-{model}-W{width}K-L0_{k}", f"Qwen/{model}", n_layers, d_model, 1024 * width, k)
    for model, n_layers, d_model, groups in _TABLE
    for width, k in groups
)
"""All published groups."""

_NAME = re.compile(r"SAE-Res-(?P<model>[^/\\]+)-W(?P<width>\d+)K-L0_(?P<k>\d+)", re.IGNORECASE)


def find(name: str) -> PublishedSuite | None:
    """The group of that name, or None: a repository id with or without `Qwen/`, or a short name, in any case."""
    wanted = name.lower().removeprefix("qwen/")
    for suite in PUBLISHED:
        if wanted in (suite.short_name, suite.repo_id.lower().removeprefix("qwen/")):
            return suite
    return None


def nearest(name: str) -> list[str]:
    """Short names of up to three groups whose short or repository name resembles `name`, the likeliest first."""
    spellings = {suite.short_name: suite.short_name for suite in PUBLISHED}
    spellings |= {suite.repo_id.lower().removeprefix("qwen/"): suite.short_name for suite in PUBLISHED}
    wanted = name.lower().removeprefix("qwen/")
    return [spellings[match] for match in difflib.get_close_matches(wanted, spellings, n=3, cutoff=0.5)]


def parse_name(text: str) -> tuple[str, int, int] | None:
    """Model, width and k out of `SAE-Res-{model}-W{width}K-L0_{k}` anywhere in a path; the last one if several.

    The width is returned in features: W80K is 81920. None where there is no such name.
    """
    matches = list(_NAME.finditer(text))
    return (matches[-1]["model"], 1024 * int(matches[-1]["width"]), int(matches[-1]["k"])) if matches else None
