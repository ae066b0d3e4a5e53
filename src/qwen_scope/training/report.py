"""What is written beside the weights at the end of a run: the figures as JSON, a model card, and plots."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qwen_scope.evaluation.check import CheckReport, LayerCheck
from qwen_scope.files import replacing
from qwen_scope.plain import finite, plain
from qwen_scope.training.plots import draw

CAUTION = (
    "The publishers of Qwen-Scope attach this to their SAEs, and it holds for these too: interpretability tools must not be "
    "used, outside scientific research, to interfere with a model's capabilities, or to make and spread harmful content, "
    "such as pornographic, violent, discriminatory or inciting material."
)
HEAD = (
    "layer", "features", "k", "explained variance", "FVU", "FVU with norm outliers", "FVU with position 0 too", "L0", "loss",
    "spliced", "zeroed", "loss recovered", "never fired", "dense", "always fired",
)  # fmt: skip


def write_report(
    folder: Path, check: CheckReport, history: Sequence[Mapping[str, Any]], about: Mapping[str, Any]
) -> None:
    """Writes `report.json`, `README.md` (a model card) and `plots/` into a suite's folder, each file atomically.

    Args:
        check: figures on held-out text.
        history: rows with layer, step, tokens, fvu, dead and learning_rate of one moment each.
        about: what else is known of the run, in plain values; the values are text to a reader and nothing else.

    Raises:
        QwenScopeError: a folder that cannot be written.
    """
    value = {"about": dict(about), "held_out": check.to_dict(), "training": [dict(row) for row in history]}
    with replacing(folder / "report.json") as temporary:
        temporary.write_text(json.dumps(finite(value), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    try:
        plots = draw(folder / "plots", check, history)
    except ImportError:
        plots = None
    with replacing(folder / "README.md") as temporary:
        temporary.write_text(card(check, about, plots), encoding="utf-8")


def card(check: CheckReport, about: Mapping[str, Any], plots: Mapping[str, str] | None) -> str:
    """The model card, as Markdown with a YAML head.

    Args:
        plots: descriptions by file name; None if they could not be drawn.
    """
    model = str(check.trained_on or check.model)
    tokens, first, outliers = (
        getattr(check.layers[0].fidelity, name) for name in ("tokens", "first_tokens", "norm_outliers")
    )
    parts = [
        _front_matter(model),
        f"# {plain(check.suite)}\n\nTopK sparse autoencoders of the residual stream of {plain(model)}, layers "
        f"{', '.join(str(row.layer) for row in check.layers)} (counted from 0; the stream after the layer). Position 0 of every "
        "text and residuals of extreme norm were left out of training: what features read there means little.",
        "    from qwen_scope import Scope\n\n"
        '    scope = Scope.from_pretrained(suite="this folder or repository")\n'
        f'    scope.features("any text of yours")[{check.layers[0].layer}].top(5)',
        f"## On held-out text\n\n{check.texts} pieces of text, {tokens} tokens, of which {first} at position 0 and, at the first "
        f"layer here, {outliers} norm outliers.",
        table(check.layers),
        "FVU is the fraction of variance unexplained, explained variance 1 less that; position 0 and norm outliers are left out "
        "where not said otherwise. L0: features that fire, on average. Losses are the model's cross-entropy in nats a token: as "
        "it is, with this layer's reconstructions spliced in, with zeros in their place; recovered is (zeroed - spliced) / "
        "(zeroed - loss). Never fired, dense (at more than 10 % of the tokens) and always fired count features on these tokens: "
        "on more text, fewer never fire.",
        *(
            [
                f"**A mistake was found at layer {row.layer}:** {plain(text)}"
                for row in check.layers
                for text in row.mistakes
            ]
        ),
        _pictures(plots),
        "## How they were trained\n\n" + _facts(about),
        f"## Caution\n\n{CAUTION}",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def table(layers: Sequence[LayerCheck]) -> str:
    """The figures of each layer as a Markdown table."""
    rows = [
        [
            str(row.layer), str(row.d_sae), str(row.k), f"{1 - f.fvu:.4f}", f"{f.fvu:.4f}", f"{f.fvu_without_first:.4f}",
            f"{f.fvu_all:.4f}", f"{f.l0:.1f}", f"{row.loss:.3f}", f"{row.loss_spliced:.3f}", f"{row.loss_zeroed:.2f}",
            f"{row.loss_recovered:.2%}", str(f.never_fired), str(f.density.dense), str(len(f.always_fired)),
        ]
        for row in layers
        for f in [row.fidelity]
    ]  # fmt: skip
    return "\n".join(f"| {' | '.join(line)} |" for line in (HEAD, ["--:"] * len(HEAD), *rows))


def _front_matter(model: str) -> str:
    lines = ["library_name: qwen-scope", "tags:", "- sparse-autoencoder", "- interpretability"]
    # The hub refuses a card whose base model is no repository's name.
    if re.fullmatch(r"[\w.-]+/[\w.-]+", model):
        lines.append(f"base_model: {json.dumps(model)}")
    return "\n".join(["---", *lines, "---"])


def _pictures(plots: Mapping[str, str] | None) -> str:
    if plots is None:
        return "Plots were left out: matplotlib was not installed (`pip install 'qwen-scope[train]'`)."
    return "\n\n".join(f"![{text}](plots/{name})" for name, text in plots.items())


def _facts(about: Mapping[str, Any]) -> str:
    return "\n".join(f"- {plain(name)}: {plain(_said(value))}" for name, value in about.items())


def _said(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_said(item)}" for name, item in value.items())
    return str(value)
