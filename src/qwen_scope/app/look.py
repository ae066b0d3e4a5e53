"""How the page looks: the theme, its own style and script, and what stands above and below the tabs."""

from __future__ import annotations

from html import escape
from pathlib import Path

from gradio.themes import Base, Default

HERE = Path(__file__).parent
CAUTION = (
    "Caution. It is strictly prohibited to use interpretability tools for non-scientific research purposes to interfere with "
    "model capabilities, or to fabricate, generate, and disseminate harmful information that violates public order, good "
    "morals, and socialist core values, including pornographic, violent, discriminatory, or incendiary content. Violators will "
    "have their authorization automatically terminated and shall bear all legal liabilities arising therefrom. The right of "
    "final interpretation of this statement belongs to the project owner."
)
"""The model card's caution, as it stands there."""
FONT = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "Noto Sans", "sans-serif")
MONO = ("ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "monospace")


def theme() -> Base:
    """Gradio's default theme with fonts of the visitor's own machine, so that none is fetched, and darker grey text."""
    return Default(primary_hue="indigo", font=list(FONT), font_mono=list(MONO)).set(
        # The default's greys are too faint to read on their grounds.
        body_text_color_subdued="#4b5563",
        body_text_color_subdued_dark="#c5c8d0",
        block_info_text_color="#4b5563",
        block_info_text_color_dark="#c5c8d0",
        input_placeholder_color="#636b78",
        input_placeholder_color_dark="#a7adba",
        button_primary_background_fill="#4346c4",
        button_primary_background_fill_dark="#4346c4",
        button_primary_background_fill_hover="#34379c",
        button_primary_background_fill_hover_dark="#34379c",
        button_primary_text_color="#ffffff",
        button_primary_text_color_dark="#ffffff",
        button_secondary_text_color="#1f2937",
        button_secondary_text_color_dark="#f3f4f6",
        block_label_text_color="#374151",
        block_label_text_color_dark="#e5e7eb",
        block_title_text_color="#1f2937",
        block_title_text_color_dark="#e5e7eb",
    )


def css() -> str:
    """The page's own style."""
    return (HERE / "page.css").read_text(encoding="utf-8")


def head() -> str:
    """The page's own script."""
    return f"<script>{(HERE / 'page.js').read_text(encoding='utf-8')}</script>"


def above(model: str, suite: str) -> str:
    """What stands above the tabs: which model is read through which SAEs."""
    return (
        f'<div class="qs-head"><h1>Qwen-Scope</h1><p>{escape(model)} through <strong>{escape(suite)}</strong></p></div>'
    )


def below() -> str:
    """What stands below the tabs, always in sight there: the caution."""
    return f'<p class="qs-caution" id="caution">{escape(CAUTION)}</p>'
