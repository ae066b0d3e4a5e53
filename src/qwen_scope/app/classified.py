"""Of the tab Data, the part that shows what was saved of a classification: a rule, tried on a text, or an evaluation."""

from __future__ import annotations

import json
from base64 import b64encode
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gradio as gr

from qwen_scope.app import export, tokens, uploads
from qwen_scope.app.config import AppConfig
from qwen_scope.app.shared import Shared, in_words
from qwen_scope.errors import QwenScopeError
from qwen_scope.feature_name import parse_feature

if TYPE_CHECKING:
    from qwen_scope.data.classification import Evaluation, Explanation, Rule

MOST_METHODS = 100
"""Methods of an evaluation, or features of a rule, that are shown."""


def build(shared: Shared) -> None:
    """The components and their events."""
    found = gr.State(None)
    file = gr.File(
        label="rule.json of qwen-scope classify fit, or evaluation.json of classify evaluate",
        file_types=[".json"],
        elem_id="data-rule-file",
        height=120,
    )
    text = gr.Textbox(
        "",
        label="A text to try the rule on",
        lines=3,
        max_lines=12,
        max_length=200 * shared.config.max_tokens,
        elem_id="data-rule-text",
    )
    run = gr.Button("Show", elem_id="data-rule-show")
    shown = gr.HTML(elem_id="data-rule")

    def show(file: str | None, text: str) -> tuple[Any, str]:
        if file is None:
            raise QwenScopeError("expected a file with a rule or an evaluation, found none; choose one")
        from qwen_scope.data.classification import Rule

        result = load(file, shared.config)
        if not isinstance(result, Rule):
            return result, evaluation_html(result)
        tried = None
        if text.strip():
            uploads.check_text(shared.scope, text, shared.config)
            tried = result.explain(shared.scope, text)
        return result, rule_html(shared, result) + ("" if tried is None else explanation_html(tried))

    run.click(in_words(show), [file, text], [found, shown], **shared.running)
    export.buttons(
        shared,
        "data-rule",
        [found, text],
        {
            "csv": lambda result, text: csv_of(_there(result)),
            "json": lambda result, text: export.to_json(_there(result).to_dict()),
            "py": lambda result, text: python_lines(shared, _there(result), text),
        },
        picture="data-rule",
    )


def load(file: str, config: AppConfig) -> Rule | Evaluation:
    """The rule or the evaluation in an uploaded file, whichever it is.

    Raises:
        QwenScopeError: it is neither, or damaged.
    """
    from qwen_scope.data.classification import Evaluation, Rule

    path = Path(file)
    uploads.check_file(path, [".json"], config)
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise QwenScopeError(f"expected JSON in {path.name}, found none that reads; choose another file") from error
    is_rule = isinstance(content, dict) and "outcomes" not in content
    try:
        found = Rule.load(path) if is_rule else Evaluation.load(path)
    except QwenScopeError as error:
        raise QwenScopeError(uploads.without_folder(str(error), path)) from error
    # Of an evaluation also the points and lines of its plots, which would take minutes to draw.
    parts = [found.terms] if isinstance(found, Rule) else [found.outcomes, found.f1_by_k, found.f1_by_fraction]
    size = max(map(len, parts))
    if size > MOST_METHODS:
        raise QwenScopeError(
            f"expected at most {MOST_METHODS} rows in {path.name}, found {size}; print it in a terminal"
        )
    return found


def rule_html(shared: Shared, rule: Rule) -> str:
    """What a rule looks at and how it did."""
    others = ", ".join(label for label in rule.learnt_from if label != rule.positive) or "anything else"
    how = "any of these features fires" if rule.kind == "or" else "the weighted vote of these features is above 0"
    rows = []
    for term in rule.terms:
        layer, number = parse_feature(term.feature)
        about = term.label or shared.names.of(layer, number) or " | ".join(term.examples[:2])
        rows.append(
            [
                f"{term.weight:+.2f}",
                tokens.feature_link(layer, number),
                f"{term.positive_rate:.1%}",
                f"{term.negative_rate:.1%}",
                escape(about),
            ]
        )
    parts = [
        tokens.note(
            f"“{rule.positive}” rather than {others}: where {how}. Learnt from {sum(rule.learnt_from.values())} texts with "
            f"{rule.suite}."
        ),
        tokens.table(
            "Features of the rule", ["Weight", "Feature", "In positive", "In others", "About"], rows, numbers=[0, 2, 3]
        ),
    ]
    if rule.kind == "sparse":
        parts.append(tokens.note(f"A text that fires none of them has {rule.intercept - rule.threshold:+.2f}."))
    scores = [(name, value) for name, value in rule.scores.items() if value is not None]
    if scores:
        caption = f"On {sum(rule.tested_on.values())} test texts"
        parts.append(
            tokens.table(
                caption, ["Score", "Value"], [[escape(name), f"{value:.3f}"] for name, value in scores], numbers=[1]
            )
        )
    return "".join(parts)


def explanation_html(explanation: Explanation) -> str:
    """What a rule says of a text, and the tokens that decide it."""
    decision = explanation.decision
    said = (
        f"This text is {'' if decision.positive else 'not '}“{explanation.label}”: {decision.score:+.3f}, of which "
        f"{explanation.rest:+.3f} before any feature fires."
    )
    if not explanation.reasons:
        return tokens.note(f"{said} No feature of the rule fires.")
    rows = []
    for reason in explanation.reasons:
        layer, number = parse_feature(reason.feature)
        rows.append(
            [
                f"{reason.adds:+.3f}",
                tokens.feature_link(layer, number),
                f"{reason.value:.3g}",
                escape(tokens.shown(reason.around)),
                str(reason.position),
            ]
        )
    head = ["Adds", "Feature", "Value", "Where, the token between » and «", "Position"]
    return tokens.note(said) + tokens.table("Why", head, rows, numbers=[0, 2, 4])


def evaluation_html(evaluation: Evaluation) -> str:
    """How each method did, with the plot."""
    from qwen_scope.data.classification.plot import picture

    rows = [
        [
            escape(of.method),
            f"{of.scores.f1:.3f}",
            f"{of.scores.f1_low:.3f} to {of.scores.f1_high:.3f}",
            _or_dash(of.scores.f1_length_matched),
            f"{of.scores.precision:.3f}",
            f"{of.scores.recall:.3f}",
            f"{of.scores.auc:.3f}",
            _or_dash(of.scores.auc_length_matched),
        ]
        for of in evaluation.outcomes
    ]
    head = ["Method", "F1", "95 %", "F1 matched", "Precision", "Recall", "AUC", "AUC matched"]
    alt = "Precision over recall of each method, F1 by the number of features, F1 by the share of the discovery texts"
    return (
        tokens.note(
            f"“{evaluation.positive}” told from others: learnt from {sum(evaluation.train.values())} texts, tested on "
            f"{sum(evaluation.test.values())}, layer {evaluation.layer}. Matched: with the lengths of both classes made the same."
        )
        + tokens.table("Methods", head, rows, numbers=range(1, 8))
        + f'<img class="qs-picture" alt="{escape(alt)}" src="data:image/png;base64,{b64encode(picture(evaluation)).decode()}">'
    )


def csv_of(found: Rule | Evaluation) -> str:
    """A rule's features or an evaluation's methods, a row each."""
    from qwen_scope.data.classification import Rule

    if isinstance(found, Rule):
        head = ["feature", "weight", "scale", "positive_rate", "negative_rate", "label"]
        rows = [[t.feature, t.weight, t.scale, t.positive_rate, t.negative_rate, t.label or ""] for t in found.terms]
        return export.to_csv(head, rows)
    names = ["f1", "f1_low", "f1_high", "accuracy", "precision", "recall", "auc", "average_precision"]
    rows = [[of.method, *(getattr(of.scores, name) for name in names)] for of in found.outcomes]
    return export.to_csv(["method", *names], rows)


def python_lines(shared: Shared, found: Rule | Evaluation, text: str) -> str:
    """The lines that show the same."""
    if not hasattr(found, "terms"):
        return 'from qwen_scope.data.classification import Evaluation\n\nprint(Evaluation.load("evaluation.json"))\n'
    lines = 'from qwen_scope.data.classification import Rule\n\nrule = Rule.load("rule.json")\nprint(rule)\n'
    return (
        lines
        if not text.strip()
        else f"from qwen_scope import Scope\n{lines}scope = {shared.opening}\nprint(rule.explain(scope, {text!r}))\n"
    )


def _or_dash(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _there(found: Rule | Evaluation | None) -> Rule | Evaluation:
    if found is None:
        raise QwenScopeError("expected a rule or an evaluation to take away, found none yet; press Show first")
    return found
