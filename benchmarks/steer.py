"""What steering costs, and what generating many texts together saves, on the bundled model.

`python benchmarks/steer.py` takes some ten minutes and writes benchmarks/results/steer.json. Three comparisons, each in turns:
texts without steering and with each kind of edit; texts that each have another steering, together and one after another, which
must draw the same tokens; one text by `Scope.generate` and by transformers' own `generate` with a hook that adds the same.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import commandline
import machine
import torch
from timing import OURS, short, time_case

from qwen_scope.generation import Generation, Sampling
from qwen_scope.scope import Scope

EDITS = {
    "add": "15/1037:1x",
    "add, three layers": "7/100:0.5x 15/1037:0.5x 23/200:0.5x",
    "ablate": "15/1037:ablate",
    "clamp": "15/1037:=20",
    "scale": "15/1037:*0.5",
}
"""What a text is steered by, in the comparison with unsteered texts."""
SUBJECTS = ("rivers", "bread", "chess", "the moon", "trains", "gardens", "winter", "music")


@dataclass(frozen=True)
class Settings:
    tokens: int = 48
    """Generated for each text."""
    rows: tuple[int, ...] = (1, 32)
    """Texts at once, in the comparison with unsteered ones."""
    together: int = 32
    """Texts that each have another steering."""
    dtype: str = "float32"
    rounds: int = 5
    rounds_together: int = 3


QUICK = Settings(tokens=4, rows=(1, 2), together=3, rounds=2, rounds_together=2)


def run(settings: Settings) -> dict[str, Any]:
    scope = Scope.from_pretrained(dtype=settings.dtype)
    return {
        "benchmark": "steer",
        "machine": machine.describe(),
        "parameters": asdict(settings) | {"model": "the bundled one", "edits": EDITS},
        "cost": [cost(scope, settings, rows) for rows in settings.rows],
        "together": together(scope, settings),
        "transformers": against_transformers(scope, settings),
    }


def chats(count: int) -> list[list[dict[str, str]]]:
    """Prompts of unlike lengths."""
    return [
        [
            {
                "role": "user",
                "content": f"Tell me about {SUBJECTS[n % len(SUBJECTS)]}" + ", and what you like about it" * (n % 3),
            }
        ]
        for n in range(count)
    ]


def greedy(settings: Settings) -> Sampling:
    return Sampling(max_new_tokens=settings.tokens, ignore_eos=True)


def cost(scope: Scope, settings: Settings, rows: int) -> dict[str, Any]:
    """Texts without steering and with each kind of edit."""
    prompts = chats(rows)

    def generating(steering: str | None) -> Callable[[], object]:
        return lambda: scope.generate(prompts, steering, greedy(settings))

    calls = {OURS: generating(None)} | {name: generating(steering) for name, steering in EDITS.items()}
    for call in calls.values():
        call()  # what happens once: choosing a kernel, reading the maxima
    # Many texts at once take a while, and vary less.
    timed = time_case(calls, 0, settings.rounds if rows == 1 else settings.rounds_together)
    return {"rows": rows, **timed, "tokens_per_second": rates(timed, rows * settings.tokens)}


def together(scope: Scope, settings: Settings) -> dict[str, Any]:
    """Texts that each have another steering, all at once and one after another."""
    prompts = chats(settings.together)
    steerings = [[f"15/{1037 + 31 * n}:{0.3 + 0.02 * n:.2f}x"] for n in range(settings.together)]
    told: dict[str, list[Generation]] = {}

    def at_once() -> None:
        told["together"] = scope.generate(prompts, steerings, greedy(settings))

    def one_by_one() -> None:
        told["alone"] = [scope.generate(p, s, greedy(settings)) for p, s in zip(prompts, steerings, strict=True)]

    timed = time_case({OURS: at_once, "one after another": one_by_one}, 0, settings.rounds_together)
    same = [a.ids == b.ids for a, b in zip(told["together"], told["alone"], strict=True)]
    texts = settings.together
    return {**timed, "same_tokens": sum(same), "tokens_per_second": rates(timed, texts * settings.tokens)}


def against_transformers(scope: Scope, settings: Settings) -> dict[str, Any]:
    """One text, by our engine and by transformers' with a hook of three lines."""
    (change,) = scope.changes(EDITS["add"])
    added = change.strength * change.direction
    tokenizer: Any = scope.backbone.tokenizer
    model: Any = scope.backbone.model
    ids = tokenizer.apply_chat_template(chats(1)[0], add_generation_prompt=True, return_tensors="pt", return_dict=True)
    length, told = ids["input_ids"].shape[1], {}

    def hook(module: Any, args: Any, output: Any) -> Any:
        # Position 0 is left alone, as it is by ours.
        if output.shape[1] == 1:
            return output + added
        return torch.cat([output[:, :1], output[:, 1:] + added], 1)

    def transformers() -> None:
        handle = scope.backbone.layers[15].register_forward_hook(hook)
        try:
            most = settings.tokens
            out = model.generate(**ids, do_sample=False, max_new_tokens=most, min_new_tokens=most, pad_token_id=0)
        finally:
            handle.remove()
        told["transformers"] = out[0, length:].tolist()

    def ours() -> None:
        told[OURS] = scope.generate(chats(1)[0], EDITS["add"], greedy(settings)).ids

    ours()
    transformers()
    timed = time_case({OURS: ours, "transformers": transformers}, 0, settings.rounds)
    return {
        **timed,
        "same_tokens": told[OURS] == told["transformers"],
        "tokens_per_second": rates(timed, settings.tokens),
    }


def rates(timed: dict[str, Any], tokens: int) -> dict[str, float]:
    return {name: short(tokens / seconds) for name, seconds in timed["seconds"].items()}


def main() -> None:
    args = commandline.parsed(commandline.parser(__doc__))
    commandline.write(run(QUICK if args.quick else Settings()), args, "steer")


if __name__ == "__main__":
    main()
