"""Unicode scripts: which ones a language is written in, and which tokens of a vocabulary belong to one."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING

import regex

from qwen_scope.errors import QwenScopeError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_OF_SCRIPT = {
    "Arabic": "ar fa ks ku ps sd ug ur", "Armenian": "hy", "Bengali": "as bn", "Bopomofo": "zh",
    "Canadian_Aboriginal": "cr iu oj", "Cyrillic": "ab av ba be bg ce cv kk kv ky mk mn os ru sr tg tt uk",
    "Devanagari": "hi ks mr ne sa", "Ethiopic": "am ti",
    "Georgian": "ka", "Greek": "el", "Gujarati": "gu", "Gurmukhi": "pa", "Han": "ja zh", "Hangul": "ko", "Hebrew": "he yi",
    "Hiragana": "ja", "Kannada": "kn", "Katakana": "ja", "Khmer": "km", "Lao": "lo", "Malayalam": "ml", "Mongolian": "mn",
    "Myanmar": "my", "Oriya": "or", "Sinhala": "si", "Tamil": "ta", "Telugu": "te", "Thaana": "dv", "Thai": "th",
    "Tibetan": "bo dz", "Yi": "ii",
    "Latin": (
        "aa af ak an ay az bi bm br bs ca ch co cr cs cy da de ee en eo es et eu ff fi fj fo fr fy ga gd gl gn gv ha ho hr ht "
        "hu hz ia id ie ig ik io is it iu jv kg ki kj kl kr ku kw la lb lg li ln lt lu lv mg mh mi ms mt na nb nd ng nl nn no "
        "nr nv ny oc oj om pl pt qu rm rn ro rw sc se sg sk sl sm sn so sq sr ss st su sv sw tk tl tn to tr ts tw ty uz ve vi "
        "vo wa wo xh yo za zu"
    ),
}  # fmt: skip
"""Languages by ISO 639-1 code that are written in each script. Chinese characters in Korean text are not among Korean's: Chinese
that leaks into it is what is looked for."""
SCRIPTS: Mapping[str, tuple[str, ...]] = {
    code: tuple(script for script, codes in _OF_SCRIPT.items() if code in codes.split())
    for code in sorted({code for codes in _OF_SCRIPT.values() for code in codes.split()})
}
"""Scripts of each language, by ISO 639-1 code."""


def scripts_of(language: str) -> tuple[str, ...]:
    """The scripts of a language by its ISO 639-1 code (`zh`, `pt-BR`), or the one a name of a Unicode script says (`Cyrillic`).

    Raises:
        QwenScopeError: neither.
    """
    code = re.split("[-_]", language)[0].lower()
    if code in SCRIPTS:
        return SCRIPTS[code]
    letters_of((language,))
    return (language,)


def letters_of(scripts: Sequence[str]) -> regex.Pattern[str]:
    """What matches a letter of some scripts.

    Raises:
        QwenScopeError: a script that Unicode does not name.
    """
    return _letters(tuple(scripts), False)


def letters_beyond(scripts: Sequence[str]) -> regex.Pattern[str]:
    """What matches a letter of any other script; characters common to several, such as digits, belong to none."""
    return _letters(tuple(scripts), True)


@cache
def _letters(scripts: tuple[str, ...], beyond: bool) -> regex.Pattern[str]:
    named = "".join(rf"\p{{Script={script}}}" for script in scripts)
    try:
        within = rf"[{named}\p{{Script=Common}}\p{{Script=Inherited}}]" if beyond else rf"[^{named}]"
        return regex.compile(rf"(?V1)[\p{{L}}--{within}]")
    except regex.error as error:
        raise QwenScopeError(
            f"expected languages by their code such as zh, or scripts such as Cyrillic, found {', '.join(scripts)}; correct it"
        ) from error


def tokens_of(tokenizer: PreTrainedTokenizerBase, scripts: Sequence[str]) -> list[int]:
    """The tokens of a vocabulary that hold a letter of some scripts, or only begin one.

    A token of bytes that are only part of a character counts if its first byte begins letters of these scripts alone, as 0xD0
    does of Cyrillic.
    """
    pattern = letters_of(scripts)
    leads = _lead_bytes(tuple(scripts))
    found = []
    for number, piece in enumerate(tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))):
        text = str(tokenizer.decode([number], clean_up_tokenization_spaces=False))
        if pattern.search(text) or ("\ufffd" in text and _bytes_of(piece)[:1] in leads):
            found.append(number)
    return found


@cache
def _lead_bytes(scripts: tuple[str, ...]) -> frozenset[bytes]:
    """First bytes of two or more in UTF-8 that begin letters of these scripts and of no others."""
    of, others = letters_of(scripts), letters_beyond(scripts)
    ours, theirs = set(), set()
    for code in range(0x80, 0x20000):
        if 0xD800 <= code < 0xE000:
            continue
        character = chr(code)
        if of.match(character):
            ours.add(character.encode()[:1])
        elif others.match(character):
            theirs.add(character.encode()[:1])
    return frozenset(ours - theirs)


def _bytes_of(piece: str | None) -> bytes:
    """The bytes of a token as byte-level vocabularies spell it, or those with byte fallback; nothing of others."""
    if piece is None:
        return b""
    if fallback := re.fullmatch(r"<0x([0-9A-F]{2})>", piece):
        return bytes([int(fallback[1], 16)])
    spelt = _byte_spelling()
    stripped = piece.lstrip("Ġ▁")
    return bytes(spelt[c] for c in stripped) if all(c in spelt for c in stripped) else b""


@cache
def _byte_spelling() -> dict[str, int]:
    """GPT-2's letters for bytes: those that print stand for themselves, the others for letters from U+0100 on."""
    plain: Iterable[int] = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    spelt = {chr(byte): byte for byte in plain}
    rest = (byte for byte in range(256) if byte not in set(spelt.values()))
    return spelt | {chr(0x100 + at): byte for at, byte in enumerate(rest)}
