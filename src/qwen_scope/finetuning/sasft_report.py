"""The report of a SASFT run: the figures as JSON, one page as Markdown, and curves."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from qwen_scope.evidence.statistics import bootstrap
from qwen_scope.files import replacing
from qwen_scope.finetuning.drift import Drift
from qwen_scope.finetuning.evaluate import Evaluation, Spoken
from qwen_scope.finetuning.restraints import Restraints
from qwen_scope.finetuning.sasft_run_config import SASFTRun
from qwen_scope.plain import finite, plain

COLOUR = "#0072B2"
CURVES = (
    ("sft_loss", "cross-entropy (nats a token)"),
    ("reduce_loss", "reduction loss"),
    ("above_limit", "share above the limits"),
)
RESAMPLES = 2000
"""Of the intervals, over beginnings."""
EXAMPLES = 3
"""Texts of each tag that are shown."""


def write_report(
    folder: Path,
    config: SASFTRun,
    restraints: Restraints,
    before: Evaluation,
    after: Evaluation,
    drift: Drift,
    log: Sequence[Mapping[str, Any]],
    trained: int,
    kept: int,
) -> dict[str, Any]:
    """Writes `report.json`, `README.md` and, with matplotlib, `curves.png`, each atomically.

    Args:
        log: what the trainer logged.
        trained: samples trained on.
        kept: samples kept back, which before and after are measured on.

    Returns:
        What `report.json` holds.
    """
    history = [
        {name: row[name] for name in ("step", "loss", *(key for key, _ in CURVES), "penalised_mass") if name in row}
        for row in log
        if "loss" in row
    ]
    value = finite(
        {
            "config": config.to_dict(),
            "samples": {"trained_on": trained, "kept_back": kept},
            "features": [{**vars(each), "limits": dict(each.limits)} for each in restraints.features],
            "suite": restraints.suite,
            "before": before.to_dict(),
            "after": after.to_dict(),
            "drift": drift.to_dict(),
            "history": history,
        }
    )
    with replacing(folder / "report.json") as temporary:
        temporary.write_text(json.dumps(value, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    try:
        draw(history, folder / "curves.png")
        picture = "![loss, reduction loss and share above the limits over the updates](curves.png)"
    except ImportError:
        picture = "Curves were left out: matplotlib was not installed (`pip install 'qwen-scope[finetune]'`)."
    with replacing(folder / "README.md") as temporary:
        temporary.write_text(page(config, restraints, before, after, drift, picture, trained, kept), encoding="utf-8")
    return value


def page(
    config: SASFTRun,
    restraints: Restraints,
    before: Evaluation,
    after: Evaluation,
    drift: Drift,
    picture: str,
    trained: int,
    kept: int,
) -> str:
    """The report as Markdown."""
    what = {
        "sasft": f"features kept down, reduce_weight {config.reduce_weight:g}",
        "sft": "plain fine-tuning, for comparison",
        "token-penalty": f"probability of the homes' scripts penalised, token_penalty {config.token_penalty:g}",
    }[config.method]
    how = f"LoRA of rank {config.lora_rank}" if config.lora_rank else "all weights"
    parts = [
        f"# Fine-tuning: {what}",
        f"{trained} samples trained on ({how}, learning rate {config.learning_rate:g}), {kept} kept back for the figures below.",
        summary(before, after),
        picture,
        "Perplexity: exp of the mean cross-entropy of the tokens trained on, over the samples kept back. Switches: the share of "
        f"texts of {config.new_tokens} tokens at most, generated from the beginnings of these samples at temperature "
        f"{config.temperature:g}, with a letter of a home's script that the text's own language does not use; in brackets "
        "the 95 % interval (bootstrap over beginnings).",
        "## Features\n\n" + features_table(restraints),
        "## Do the SAEs still fit?\n\n" + drift_table(drift),
    ]
    if after.spoken:
        parts.append("## Texts before and after\n\n" + examples(before.spoken, after.spoken))
    return "\n\n".join(parts) + "\n"


def summary(before: Evaluation, after: Evaluation) -> str:
    """Perplexity and switches of each tag as a Markdown table."""
    rows = []
    for tag in before.perplexity:
        switches = [switched(which, tag) for which in (before, after)]
        rows.append([plain(tag), f"{before.perplexity[tag]:.2f}", f"{after.perplexity[tag]:.2f}", *switches])
    return _table(("tag", "perplexity before", "after", "switches before", "after"), rows)


def switched(found: Evaluation, tag: str) -> str:
    """The share of a tag's texts that switch, its interval over beginnings, and how many texts there are."""
    texts = [each for each in found.spoken if each.tag == tag]
    if not texts:
        return "–"
    beginnings: dict[str, list[bool]] = {}
    for each in texts:
        beginnings.setdefault(each.prompt, []).append(each.switched)
    shares = np.array([[np.mean(each)] for each in beginnings.values()])
    counted = f"{found.switch_ratio[tag]:.1%} of {len(texts)}"
    if np.ptp(shares) == 0:
        return counted  # a bootstrap would say that nothing else can be
    interval = bootstrap(shares, RESAMPLES, 0)
    return f"{counted} [{interval.low:.1%}, {interval.high:.1%}]"


def features_table(restraints: Restraints) -> str:
    """The features kept down and their limits as a Markdown table."""
    rows = [
        [
            f"`{each.feature}`",
            plain(each.home) or "–",
            "–" if each.monolinguality is None else f"{each.monolinguality:.3g}",
            plain(", ".join(f"{tag} {limit:.3g}" for tag, limit in each.limits.items())),
        ]
        for each in restraints.features
    ]
    return f"Of {plain(restraints.suite)}.\n\n" + _table(
        ("feature", "home", "monolinguality", "limits (pre-activation)"), rows
    )


def drift_table(drift: Drift) -> str:
    """How the SAEs fit before and after as a Markdown table, with warnings."""
    rows = [[str(of.layer), f"{of.fvu_before:.4f}", f"{of.fvu_after:.4f}", f"{of.overlap:.3f}"] for of in drift.layers]
    shown = _table(("layer", "FVU before", "FVU after", "overlap of the strongest features"), rows)
    return "\n\n".join([shown, *(f"**Warning:** {plain(warning)}" for warning in drift.warnings)])


def examples(before: Sequence[Spoken], after: Sequence[Spoken]) -> str:
    """Some texts of each tag, of the same beginnings and seeds."""
    shown = []
    for tag in dict.fromkeys(each.tag for each in before):
        pairs = [(a, b) for a, b in zip(before, after, strict=True) if a.tag == tag][:EXAMPLES]
        shown += [
            f"- {plain(tag)}, {plain(a.prompt)}\n    - before: {plain(a.text)}\n    - after: {plain(b.text)}"
            for a, b in pairs
        ]
    return "\n".join(shown)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *rows))


def draw(history: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Writes the curves as PNG, atomically.

    Raises:
        ImportError: no matplotlib.
        QwenScopeError: a path that cannot be written.
    """
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # Not pyplot, which keeps every figure of the process.
    with rc_context({"text.usetex": False, "text.parse_math": False}), replacing(path) as temporary:
        figure = Figure(figsize=(9.0, 2.8), dpi=110, layout="constrained")
        FigureCanvasAgg(figure)
        for panel, (key, name) in zip(figure.subplots(1, len(CURVES)), CURVES, strict=True):
            there = [(row["step"], row[key]) for row in history if key in row]
            if there:
                panel.plot(*zip(*there, strict=True), color=COLOUR, linewidth=1.3)
            panel.set_xlabel("updates")
            panel.set_ylabel(name)
            panel.grid(alpha=0.25)
        figure.savefig(temporary, format="png", metadata={"Software": None})
