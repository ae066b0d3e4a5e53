"""`GRPOReport`: what a run of reinforcement learning came to, as JSON and as one page with curves."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qwen_scope.evidence.statistics import Interval, bootstrap
from qwen_scope.files import replacing
from qwen_scope.finetuning.drift import Drift
from qwen_scope.finetuning.grpo_evaluation import RESAMPLES, Evaluation
from qwen_scope.finetuning.grpo_run_config import GRPORun
from qwen_scope.finetuning.repetition import RepetitionFeature
from qwen_scope.plain import finite, plain

REPORTED, STEERED, ORDINARY = "#0072B2", "#D55E00", "#009E73"


@dataclass(frozen=True)
class GRPOReport:
    """A run, before and after."""

    model: str
    """The language model trained."""
    suite: str
    """Whose features were steered."""
    config: GRPORun
    """How it was run."""
    steering: str
    """The edits of the steered rollouts, strengths in raw units; empty for plain GRPO."""
    features: list[RepetitionFeature]
    """The repetition features found, if they were looked for."""
    evaluations: list[Evaluation]
    """On prompts kept back, the first before training."""
    history: list[dict[str, Any]]
    """Of each update, its step, rewards and what else TRL tells."""
    drift: Drift
    """How well the SAEs fit ordinary texts before and after."""

    @property
    def change(self) -> Interval:
        """The repeat ratio after less that before, with its interval over prompts; the same seeds stay together."""
        first, last = (np.asarray(which.loops) for which in (self.evaluations[0], self.evaluations[-1]))
        return bootstrap(last - first, RESAMPLES, 0)

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values for JSON."""
        return {
            "model": self.model,
            "suite": self.suite,
            "config": self.config.to_dict(),
            "steering": self.steering,
            "features": [feature.to_dict() for feature in self.features],
            "change": asdict(self.change),
            "evaluations": [
                {
                    **found.to_dict(),
                    "repeat_ratio": asdict(found.repeat_ratio),
                    "mean_repetition": asdict(found.mean_repetition),
                }
                for found in self.evaluations
            ],
            "history": self.history,
            "drift": self.drift.to_dict(),
        }

    def save(self, folder: Path) -> None:
        """Writes `report.json`, `README.md` and, with matplotlib, `curves.png`, each atomically."""
        with replacing(folder / "report.json") as temporary:
            text = json.dumps(finite(self.to_dict()), indent=1, ensure_ascii=False)
            temporary.write_text(text + "\n", encoding="utf-8")
        try:
            draw(self, folder / "curves.png")
            picture = "![repeat ratio and rewards over the updates](curves.png)"
        except ImportError:
            picture = "Curves were left out: matplotlib was not installed (`pip install 'qwen-scope[finetune]'`)."
        with replacing(folder / "README.md") as temporary:
            temporary.write_text(page(self, picture), encoding="utf-8")

    def __str__(self) -> str:
        first, last = self.evaluations[0], self.evaluations[-1]
        change = self.change
        return (
            f"after {last.step} updates {last.repeat_ratio.mean:.1%} of the texts loop, before {first.repeat_ratio.mean:.1%} "
            f"(change {change.mean:+.1%}, 95 % interval {change.low:+.1%} to {change.high:+.1%}); repeated runs of four tokens "
            f"{last.mean_repetition.mean:.1%}, before {first.mean_repetition.mean:.1%}"
        )


def page(report: GRPOReport, picture: str) -> str:
    """The report as Markdown."""
    config = report.config
    kind = "plain GRPO" if not report.steering else f"GRPO with rare negatives, off_policy {config.off_policy}"
    parts = [
        f"# {plain(report.model)}, trained by reinforcement learning",
        f"{kind}: {config.steps} updates of {config.prompts_per_step} prompts with {config.rollouts} rollouts each"
        + (f", one of them steered by `{report.steering}`" if report.steering else "")
        + f"; rewards {', '.join(map(plain, config.rewards))}; loss {config.loss}.",
        f"On prompts kept back, {plain(str(report))}.",
        picture,
        table(report),
        "A text loops if it ran into the limit of tokens and its end is a block of at most 64 tokens three times or more, 16 "
        "tokens at least. Intervals: bootstrap over prompts. Perplexity: of the texts, under the model before training.",
    ]
    if report.features:
        parts.append("## Repetition features\n\n" + _features(report))
    parts.append("## Do the SAEs still fit?\n\n" + _drift(report.drift))
    parts.append("## Examples\n\n" + _examples(report))
    return "\n\n".join(parts) + "\n"


def table(report: GRPOReport) -> str:
    """The evaluations as a Markdown table."""
    head = ("updates", "texts that loop", "95 % interval", "repeated 4-grams", "tokens", "ended", "perplexity")
    rows = [
        [
            str(found.step),
            f"{found.repeat_ratio.mean:.1%}",
            f"{found.repeat_ratio.low:.1%} to {found.repeat_ratio.high:.1%}",
            f"{found.mean_repetition.mean:.1%}",
            f"{found.mean_tokens:.1f}",
            f"{found.ended:.0%}",
            "–" if found.perplexity is None else f"{found.perplexity:.1f}",
        ]
        for found in report.evaluations
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, ["--:"] * len(head), *rows))


def _features(report: GRPOReport) -> str:
    head = ("feature", "first occurrence", "last repeat", "rises in")
    rows = [[f.name, f"{f.first:.3f}", f"{f.last:.3f}", f"{f.rises:.0%}"] for f in report.features]
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, ["--:"] * len(head), *rows))


def _drift(drift: Drift) -> str:
    head = ("layer", "FVU before", "FVU after", "overlap of the strongest features")
    rows = [[str(of.layer), f"{of.fvu_before:.4f}", f"{of.fvu_after:.4f}", f"{of.overlap:.3f}"] for of in drift.layers]
    shown = "\n".join(f"| {' | '.join(line)} |" for line in (head, ["--:"] * len(head), *rows))
    return "\n\n".join([shown, *(f"**Warning:** {plain(warning)}" for warning in drift.warnings)])


def _examples(report: GRPOReport) -> str:
    first, last = report.evaluations[0], report.evaluations[-1]
    shown = []
    for before, after in zip(first.examples, last.examples, strict=True):
        shown.append(f"- before: {plain(before)}\n- after: {plain(after)}")
    return "\n\n".join(shown)


def draw(report: GRPOReport, path: Path) -> None:
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
        loops, repeats, rewards = figure.subplots(1, 3)
        steps = [found.step for found in report.evaluations]
        for panel, intervals, name in (
            (loops, [found.repeat_ratio for found in report.evaluations], "share of texts that loop"),
            (repeats, [found.mean_repetition for found in report.evaluations], "repeated 4-grams"),
        ):
            panel.fill_between(
                steps, [i.low for i in intervals], [i.high for i in intervals], color=REPORTED, alpha=0.2
            )
            panel.plot(steps, [i.mean for i in intervals], color=REPORTED, linewidth=1.4, marker="o", markersize=3)
            panel.set_ylabel(name)
        for key, name, colour in (
            ("ordinary/reward", "ordinary", ORDINARY),
            ("steered/reward", "steered", STEERED),
            ("reward", "reward", REPORTED),
        ):
            there = [(row["step"], row[key]) for row in report.history if key in row]
            if there and (key != "reward" or not report.steering):
                rewards.plot(*zip(*there, strict=True), color=colour, linewidth=1.0, label=name)
        rewards.set_ylabel("reward of rollouts")
        if rewards.get_legend_handles_labels()[0]:
            rewards.legend(frameon=False, fontsize=8)
        for panel in (loops, repeats, rewards):
            panel.set_xlabel("updates")
            panel.grid(alpha=0.25)
        # No date and version, so that the same figures make the same file.
        figure.savefig(temporary, format="png", metadata={"Software": None})
