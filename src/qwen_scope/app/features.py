"""The tab Features: search by words, by an example, by number; and a feature's page, with a label to write."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any, Literal

import gradio as gr

from qwen_scope.app import export, tokens, uploads
from qwen_scope.app.link import href
from qwen_scope.app.shared import Shared, in_words
from qwen_scope.errors import QwenScopeError
from qwen_scope.feature_name import parse_feature
from qwen_scope.index.feature import Feature
from qwen_scope.index.feature_index import FeatureIndex
from qwen_scope.index.find import Findings
from qwen_scope.index.labels import LONGEST
from qwen_scope.index.pages import feature_html
from qwen_scope.index.search import Hit
from qwen_scope.index.show import clip, share, visible

How = Literal["words", "example"]
HOWS: list[tuple[str, How]] = [("words", "words"), ("an example text", "example")]
SHARED = "Labels are shared: everybody who uses this app, or the library on this machine, sees what is saved here."
STEERED = "0.8x"
"""How strongly a feature is carried to the tab Steer: as its preset Medium, of the highest activation seen."""


def build(shared: Shared) -> None:
    """The tab."""
    index = shared.index
    if index is None:
        gr.HTML(
            tokens.note(
                "There is no feature index of this suite, so nothing is known of its features. Make one with `qwen-scope "
                "harvest` and start the app with --index."
            ),
            elem_id="features-none",
        )
        return
    opened, found = gr.State(None), gr.State(None)
    with gr.Row():
        asked = gr.Textbox(
            "",
            label="Search, or a feature's number",
            info="Words, or an example text; or a number such as "
            f"{index.layers[-1]}/905, layer and feature, which opens its page.",
            max_length=200 * shared.config.max_tokens,
            lines=1,
            max_lines=8,
            elem_id="features-asked",
            scale=3,
        )
        how = gr.Radio(HOWS, value="words", label="Search by", elem_id="features-how", scale=1)
    with gr.Accordion("Where to search", open=False, elem_id="features-options"):
        layers = gr.CheckboxGroup(index.layers, value=index.layers, label="Layers", elem_id="features-layers")
        count = gr.Slider(1, 100, 20, step=1, label="Features at most", elem_id="features-count")
    run = gr.Button("Search or open", variant="primary", elem_id="run-features")
    hits = gr.HTML(elem_id="features-hits", max_height=360)
    with gr.Row(visible=False, elem_id="features-labelling") as labelling:
        label = gr.Textbox(
            "",
            label="Label",
            info=SHARED + " An empty one takes back what was written by hand.",
            max_length=LONGEST,
            elem_id="features-label",
            scale=5,
        )
        save = gr.Button("Save label", elem_id="features-save", scale=1, min_width=110)
    page = gr.HTML(elem_id="features-page")
    with gr.Accordion("The Python lines that give this", open=False):
        code = gr.Code(language="python", label="Python", interactive=False, elem_id="features-python")

    def searched(
        asked: str, how: How, layers: list[int], count: int, progress: gr.Progress = gr.Progress()
    ) -> tuple[Any, ...]:
        progress(0, desc="Looking up")
        name = number_of(asked)
        if name is not None:
            return gr.skip(), gr.skip(), *_opened(shared, index, name)
        layers = sorted(layers)
        if not layers:
            raise QwenScopeError("expected at least one layer to search, found none; choose one under Where to search")
        if how == "words":
            result = index.search(asked, count=int(count), layers=layers)
            shown = hits_html(result, asked)
            lines = (
                f"for hit in index.search({asked!r}, count={int(count)}, layers={layers}):\n"
                "    print(hit.name, hit.label, hit.snippet)\n"
            )
        else:
            uploads.check_text(shared.scope, asked, shared.config)
            result = index.find(asked, count=int(count), layers=layers)
            shown = findings_html(result)
            lines = f"print(index.find({asked!r}, count={int(count)}, layers={layers}))\n"
        return result, shown, gr.skip(), gr.skip(), gr.skip(), gr.skip(), _opening(index) + lines

    def saved(name: str | None, text: str) -> tuple[Any, ...]:
        if name is None:
            raise QwenScopeError("expected a feature to label, found none open; open one first")
        index.label(name, text)
        return _opened(shared, index, name)

    shown_of = [opened, page, labelling, label, code]
    run.click(in_words(searched), [asked, how, layers, count], [found, hits, *shown_of], **shared.running)
    # By the button, so that the address remembers it.
    pressed = "() => { document.getElementById('run-features').click(); return []; }"
    asked.submit(None, None, None, js=pressed, queue=False, api_visibility="private")
    save.click(in_words(saved), [opened, label], shown_of, **shared.looking)
    shared.link.keep("features", run, {"feature": asked, "by": how, "layers": layers, "count": count})
    export.buttons(
        shared,
        "features",
        [opened, found, code],
        {
            "csv": lambda opened, found, code: csv_of(index, opened, found),
            "json": lambda opened, found, code: json_of(index, opened, found),
            "py": lambda opened, found, code: code or _nothing(),
        },
        picture="features-page",
    )


def number_of(asked: str) -> str | None:
    """The name of a feature, if that is what was asked for."""
    try:
        layer, number = parse_feature(asked)
    except QwenScopeError:
        return None
    return f"{layer}/{number}"


def page_html(shared: Shared, feature: Feature) -> str:
    """A feature's page, with links to its neighbours' and to the tab Steer."""
    steering = f"{feature.name}:{STEERED}"
    link = escape(href("steer", run=False, steering=steering))
    known = (
        ""
        if feature.max is None
        else f'<p class="qs-note"><a href="{link}" id="features-steer">Steer with {feature.name}</a></p>'
    )
    return known + feature_html(feature, lambda name: href("features", feature=name))


def hits_html(hits: Sequence[Hit], asked: str) -> str:
    """What a search by words found."""
    if not hits:
        return tokens.note(
            f"Nothing is known of a feature about “{clip(visible(asked), 200)}”; try other words, or an example text."
        )
    rows = [
        [tokens.feature_link(hit.layer, hit.number), _about(hit), _snippet(hit), f"{hit.score:.3g}"] for hit in hits
    ]
    return tokens.table(
        f"{len(hits)} features, best first", ["Feature", "About", "Matched", "Score"], rows, numbers=[3]
    )


def findings_html(findings: Findings) -> str:
    """What a search by an example found."""
    if not findings.features:
        return tokens.note(
            "No feature fires more often in this text than in the corpus of the index; try a longer one."
        )
    rows = [
        [
            tokens.feature_link(of.layer, of.number),
            escape(visible(of.label.text)) if of.label else _codes(token.token for token in of.top_tokens[:4]),
            share(of.positive_rate),
            share(of.density),
            f"{of.z:.2f}",
        ]
        for of in findings
    ]
    return tokens.note(
        "Fire more often at the tokens of this text than in the corpus of the index. A single text does not tell how much texts "
        "vary, so z promises too much."
    ) + tokens.table(
        f"{len(findings)} features, surest first",
        ["Feature", "About", "In this text", "In the corpus", "z"],
        rows,
        numbers=[2, 3, 4],
    )


def csv_of(index: FeatureIndex, opened: str | None, found: Sequence[Hit] | Findings | None) -> str:
    """The features found last; where nothing was searched for, the examples of the one that is open."""
    if found:
        rows = [[of.name, of.label.text if of.label else "", _score(of)] for of in found]
        return export.to_csv(["feature", "label", "score"], rows)
    if opened is None:
        return _nothing()
    examples = index[opened].examples
    rows = [[of.kind, of.rank, of.value, of.document, of.start, of.end, of.tokens[of.peak], of.text] for of in examples]
    return export.to_csv(["kind", "rank", "value", "document", "start", "end", "peak", "text"], rows)


def json_of(index: FeatureIndex, opened: str | None, found: Sequence[Hit] | Findings | None) -> str:
    """All of what was found last and of the feature that is open."""
    if opened is None and not found:
        return _nothing()
    told = found.to_dict() if isinstance(found, Findings) else [hit.to_dict() for hit in found or []]
    return export.to_json({"found": told, "feature": None if opened is None else index[opened].to_dict()})


def _opened(shared: Shared, index: FeatureIndex, name: str) -> tuple[Any, ...]:
    """A feature's page and all that belongs to it."""
    feature = index[name]
    hand = index.labels.of(feature.layer, feature.number, "hand")
    lines = f'feature = index[{feature.name!r}]\nprint(feature)\n# To label it: index.label({feature.name!r}, "…")\n'
    return (
        feature.name,
        page_html(shared, feature),
        gr.update(visible=True),
        gr.update(value=hand.text if hand else "", label=f"Label of {feature.name}"),
        _opening(index) + lines,
    )


def _opening(index: FeatureIndex) -> str:
    from qwen_scope.index.feature_index import bundled_folder

    # The rest of the path is this machine's affair.
    folder = "" if index.folder == bundled_folder() else repr(index.folder.name)
    return f"from qwen_scope.index import FeatureIndex\n\nindex = FeatureIndex.open({folder})\n"


def _about(hit: Hit) -> str:
    return escape(visible(hit.label.text)) if hit.label else _codes(hit.top_tokens[:4])


def _codes(found: Any) -> str:
    return " ".join(f"<code>{escape(visible(token))}</code>" for token in found)


def _snippet(hit: Hit) -> str:
    """What matched, with the words of the query in bold."""
    parts, at = [], 0
    for start, end in hit.matched:
        parts += [escape(visible(hit.snippet[at:start])), f"<strong>{escape(visible(hit.snippet[start:end]))}</strong>"]
        at = end
    where = f"{escape(hit.where)}: " if hit.where else ""
    return where + "".join([*parts, escape(visible(hit.snippet[at:]))])


def _score(of: Any) -> float:
    return of.score if isinstance(of, Hit) else of.z


def _nothing() -> str:
    raise QwenScopeError("expected something to take away, found nothing yet; search, or open a feature, first")
