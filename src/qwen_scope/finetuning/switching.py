"""Code-switching: how many texts fall into the script of another language than they are meant to be in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from qwen_scope.errors import QwenScopeError
from qwen_scope.finetuning.scripts import letters_beyond, letters_of, scripts_of


@dataclass(frozen=True)
class Switching:
    """Which of some texts switch."""

    switched: tuple[bool, ...]
    """For each text, whether it does."""

    @property
    def ratio(self) -> float:
        """Share of the texts that do."""
        return sum(self.switched) / len(self.switched)


def switch_ratio(
    texts: Sequence[str], intended: str | Sequence[str], into: str | None = None, *, least: int = 1
) -> Switching:
    """The code-switch ratio: the share of texts with at least `least` letters of a script that their language is not written in.

    Letters are characters of Unicode's category L; a script is Unicode's property Script. Characters common to several scripts
    (digits, punctuation, most symbols) never count, nor do the scripts of the language intended: kanji in a Japanese text are no
    Chinese. What the text has besides does not matter: one word in another script is enough, and a text without letters does not
    switch. Without `into`, a Greek letter in a formula and a Latin name in a Chinese text are letters like others. Languages that
    share all of their scripts, such as French and English, cannot be told apart so.

    Args:
        texts: what was generated, without the prompts.
        intended: the language (see `scripts_of`) that all texts are meant to be in, or one for each text.
        into: count only letters of this language's scripts; by default of any script that the one intended does not use.
        least: how many letters make a switch.

    Raises:
        QwenScopeError: no texts, another number of languages, an unknown one, or one whose scripts are all the intended one's.
    """
    languages = [intended] * len(texts) if isinstance(intended, str) else list(intended)
    if not texts or len(languages) != len(texts) or least < 1:
        raise QwenScopeError(
            f"expected one or more texts, a language for each and at least 1 letter, found {len(texts)} texts, {len(languages)} "
            f"languages and {least}; give as many"
        )
    found = []
    for text, language in zip(texts, languages, strict=True):
        own = scripts_of(language)
        if into is None:
            pattern = letters_beyond(own)
        else:
            foreign = [script for script in scripts_of(into) if script not in own]
            if not foreign:
                raise QwenScopeError(
                    f"expected languages of different scripts, found that {language} is written in all of {into}'s "
                    f"({', '.join(own)}); a switch between them does not show in letters"
                )
            pattern = letters_of(foreign)
        found.append(sum(1 for _ in pattern.finditer(text)) >= least)
    return Switching(tuple(found))
