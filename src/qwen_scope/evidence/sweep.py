"""`sweep`: does a steering do what it is for, beyond what chance, a prompt or any other feature would do?"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from qwen_scope.errors import QwenScopeError
from qwen_scope.evidence.arms import Arm, Prompt, arms_of, asked
from qwen_scope.evidence.config import SweepConfig
from qwen_scope.evidence.effects import Effect, Reading, effect_of
from qwen_scope.evidence.fluency import perplexities, repetition
from qwen_scope.evidence.judging import STEERED, Cell, judge
from qwen_scope.evidence.random_features import Densities, densities_of, random_steerings
from qwen_scope.evidence.report import Example, Point, SweepReport
from qwen_scope.evidence.texts import Key, Text, Texts
from qwen_scope.feature_name import parse_feature
from qwen_scope.files import expanded
from qwen_scope.fingerprint import fingerprint
from qwen_scope.generation import Sampling
from qwen_scope.generation.generate import ROWS, generate
from qwen_scope.scope import Scope
from qwen_scope.steering import Steering
from qwen_scope.steering.recipe import model_name
from qwen_scope.stopping import Stopped, stopping
from qwen_scope.tokens import TokenizedText, tokenize

FEWEST_PROMPTS = 4
"""Two to choose strengths on, two to judge on; a verdict from so few is hardly ever "yes"."""
EXAMPLES = 2
"""Prompts whose texts are shown in a report."""


def sweep(
    scope: Scope,
    steering: Any,
    prompts: Sequence[Prompt],
    effect: str | Effect | Callable[[list[str]], Sequence[float]],
    config: SweepConfig = SweepConfig(),
    *,
    folder: str | Path | None = None,
    densities: Densities | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> SweepReport:
    """Generates texts under a steering at several strengths and under its controls, measures an effect, and judges.

    Controls are: no steering; the steering turned round; random features of the same layers, of like density and norm, at the
    same strengths in raw units; and what an instruction does without steering.

    Args:
        steering: whatever `Steering.of` takes; at strength 1 it is as given.
        prompts: texts to be continued, or chats to be answered: lists of messages, all of one kind.
        effect: what is measured of each text, see `effect_of`.
        config: how it is run and judged.
        folder: where texts are kept as they come, so that the same call goes on after an end; the report is for you to save.
        densities: how often features fire, by layer; by default those of the bundled index, or measured on a sample of texts.
        progress: told how many texts there are, of how many, before some more are generated; what it raises ends the sweep.

    Raises:
        QwenScopeError: a steering, effect or prompts that cannot be, or a folder with another sweep.
        Stopped: somebody asked for it; what was generated is in the folder.
    """
    steering = Steering.of(steering, scope.suite.name)
    if not steering:
        raise QwenScopeError("expected a steering to sweep over, found an empty one; such as 15/1037:1x@generated")
    prompts = list(prompts)
    if len(prompts) < FEWEST_PROMPTS or len({isinstance(prompt, str) for prompt in prompts}) > 1:
        raise QwenScopeError(
            f"expected at least {FEWEST_PROMPTS} prompts, all texts or all chats, found {len(prompts)}; half of them choose the "
            "strength, the other half judge it"
        )
    measured = effect_of(effect, scope)
    raw = [change.strength for change in scope.changes(steering)]
    known, source = (densities, "given") if densities else densities_of(scope)
    others = random_steerings(steering, raw, scope.suite, known, config.random_features, config.seed)
    arms = arms_of(steering, others, prompts, config)
    about = {
        "model": model_name(scope.backbone, scope.suite),
        "suite": scope.suite.name,
        "fingerprint": fingerprint(scope.suite, steering.layers),
        "steering": str(
            Steering(tuple(replace(e, strength=s, unit="raw") for e, s in zip(steering.edits, raw, strict=True)))
        ),
        "random": [str(other) for other in others],
        "prompts": prompts,
        "instruction": config.instruction,
        "sampling": [config.seed, config.max_new_tokens, config.temperature, config.top_p],
    }
    texts = Texts(None if folder is None else expanded(folder) / "texts.jsonl", about)
    keys = [
        Key(arm.name, strength, prompt, seed)
        for arm in arms
        for strength in arm.strengths
        for prompt in range(len(prompts))
        for seed in range(config.seeds)
    ]
    _generate(scope, arms, prompts, keys, texts, config, progress)
    cells = _cells(arms, keys, texts.found, measured, len(prompts), config.seeds)
    judgement = judge(arms, cells, config)
    unsteered = cells[STEERED, 0.0]
    points = [
        Point.of(arm, strength, cells[arm.name, strength], unsteered, _tokens(arm, strength, keys, texts), config)
        for arm in arms
        for strength in arm.strengths
    ]
    return SweepReport(
        steering=str(steering),
        raw=about["steering"],
        units=scope.maxima.source,
        random=about["random"],
        densities=source,
        effect=measured.name,
        circular=isinstance(measured, Reading)
        and parse_feature(measured.feature) in {(edit.layer, edit.number) for edit in steering.edits},
        model=about["model"],
        suite=about["suite"],
        prompts=[_shown(prompt) for prompt in prompts],
        config=config,
        points=points,
        judgement=judgement,
        examples=_examples(arms, prompts, judgement.best, judgement.judged, texts.found),
    )


def _generate(
    scope: Scope,
    arms: Sequence[Arm],
    prompts: Sequence[Prompt],
    keys: list[Key],
    texts: Texts,
    config: SweepConfig,
    progress: Callable[[int, int], None] | None,
) -> None:
    """Generates what is not there yet, some texts at a time."""
    by_name = {arm.name: arm for arm in arms}
    todo = [key for key in keys if key not in texts.found]
    plain = [tokenize(prompt, scope.backbone.tokenizer, reply=True)[0][0] for prompt in prompts]

    def read(key: Key) -> TokenizedText:
        arm = by_name[key.arm]
        if arm.kind != "prompted":
            return plain[key.prompt]
        given = asked(prompts[key.prompt], config.instruction, arm.way)
        return tokenize(given, scope.backbone.tokenizer, reply=True)[0][0]

    def sampling(key: Key) -> Sampling:
        # One seed for a prompt in all arms, so that what chance does is the same in all.
        number = config.seed + key.seed * len(prompts) + key.prompt
        return Sampling(config.max_new_tokens, config.temperature, config.top_p, seed=number)

    rows = {(arm.name, strength): scope.changes(arm.at(strength)) for arm in arms for strength in arm.strengths}
    bar = tqdm(total=len(keys), initial=len(keys) - len(todo), desc="generating", unit="text", disable=len(todo) < 8)
    with stopping() as stop, bar:
        for start in range(0, len(todo), ROWS):
            if progress is not None:
                progress(len(texts.found), len(keys))
            some = todo[start : start + ROWS]
            found = generate(
                scope.backbone,
                scope.suite,
                [read(key) for key in some],
                [rows[key.arm, key.strength] for key in some],
                [sampling(key) for key in some],
                progress=False,
            )
            # Given the prompt as it was without an instruction, so that all arms are measured alike.
            likely = perplexities(scope.backbone, [plain[key.prompt].ids for key in some], [text.ids for text in found])
            texts.add(
                {
                    key: Text(text.text, len(text.ids), perplexity, repetition(text.ids))
                    for key, text, perplexity in zip(some, found, likely, strict=True)
                }
            )
            bar.update(len(some))
            if stop.asked and start + ROWS < len(todo):
                kept = (
                    "" if texts.path is None else f"; {len(texts.found)} texts are kept, and the same command goes on"
                )
                raise Stopped(f"stopped after {len(texts.found)} of {len(keys)} texts{kept}")


def _cells(
    arms: Sequence[Arm], keys: list[Key], found: Mapping[Key, Text], effect: Effect, prompts: int, seeds: int
) -> dict[tuple[str, float], Cell]:
    """Measures the effect, and puts what was measured in order."""
    score = dict(zip(keys, effect.score([found[key].text for key in keys]), strict=True))

    def table(arm: Arm, strength: float, value: Callable[[Key], float | None]) -> np.ndarray:
        rows = [[value(Key(arm.name, strength, p, s)) for s in range(seeds)] for p in range(prompts)]
        return np.array(rows, dtype=np.float64)  # None becomes NaN

    return {
        (arm.name, strength): Cell(
            table(arm, strength, score.__getitem__),
            table(arm, strength, lambda key: found[key].perplexity),
            table(arm, strength, lambda key: found[key].repetition),
        )
        for arm in arms
        for strength in arm.strengths
    }


def _tokens(arm: Arm, strength: float, keys: list[Key], texts: Texts) -> float:
    """Mean length of the texts of an arm at a strength."""
    return float(np.mean([texts.found[key].tokens for key in keys if key[:2] == (arm.name, strength)]))


def _examples(
    arms: Sequence[Arm], prompts: Sequence[Prompt], best: float | None, judged: list[int], found: Mapping[Key, Text]
) -> list[Example]:
    """Texts of the first judged prompts: unsteered, steered at the best strength, and only prompted."""
    shown = [(STEERED, 0.0), *([] if best is None else [(STEERED, best)])]
    shown += [(arm.name, 0.0) for arm in arms if arm.kind == "prompted"]
    return [
        Example(_shown(prompts[at]), "unsteered" if (arm, strength) == (STEERED, 0.0) else arm, strength, text)
        for at in judged[:EXAMPLES]
        for arm, strength in shown
        for text in [found[Key(arm, strength, at, 0)].text]
    ]


def _shown(prompt: Prompt) -> str:
    """A prompt as one text, for people."""
    return prompt if isinstance(prompt, str) else "\n".join(f"{m.get('role')}: {m.get('content')}" for m in prompt)
