"""How rules and explanations look in a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qwen_scope.index.show import cells, clip, line_width, visible

if TYPE_CHECKING:
    from qwen_scope.data.classification.rule import Explanation, Rule


def rule_text(rule: Rule) -> str:
    """What a rule looks at, a feature a line, and how it did."""
    others = ", ".join(label for label in rule.learnt_from if label != rule.positive)
    how = "any of these features fires" if rule.kind == "or" else "the weighted vote of these features is above 0"
    texts = sum(rule.learnt_from.values())
    lines = [
        visible(f"{rule.positive!r} rather than {others or 'anything else'}: where {how}, learnt from {texts} texts"),
        f"{'weight':>7}  {'feature':<10} {visible(rule.positive)[:10]:>10} {'others':>7}  about",
    ]
    width = line_width()
    for term in rule.terms:
        about = term.label or " | ".join(term.examples[:2])
        line = f"{term.weight:>+7.2f}  {term.feature:<10} {term.positive_rate:>10.1%} {term.negative_rate:>7.1%}  "
        lines.append(line + clip(visible(about), max(20, width - cells(line))))
    if rule.kind == "sparse":
        lines.append(f"a text that fires none has {rule.intercept - rule.threshold:+.2f}")
    if rule.scores:
        found = ", ".join(f"{name} {value:.3f}" for name, value in rule.scores.items() if value is not None)
        lines.append(f"on {sum(rule.tested_on.values())} test texts: {found}")
    return "\n".join(lines)


def explanation_text(explanation: Explanation) -> str:
    """A decision and the tokens that make it, a feature a line."""
    decision, width = explanation.decision, line_width()
    lines = [
        visible(f"{'' if decision.positive else 'not '}{explanation.label}: {decision.score:+.3f}, of which ")
        + f"{explanation.rest:+.3f} before any feature fires",
        f"{'adds':>7}  {'feature':<10} {'value':>7}  where",
    ]
    for reason in explanation.reasons:
        line = f"{reason.adds:>+7.3f}  {reason.feature:<10} {reason.value:>7.3g}  "
        about = f"  ({reason.label})" if reason.label else ""
        lines.append(line + clip(visible(reason.around + about), max(20, width - cells(line))))
    if not explanation.reasons:
        lines.append("no feature of the rule fires")
    return "\n".join(lines)
