"""`qwen-scope steer`: text with and without a steering, side by side, or a sweep that tells whether it does what it is for."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from qwen_scope.cli.common import Source, given_texts, names_of, print_json
from qwen_scope.errors import QwenScopeError

if TYPE_CHECKING:
    from qwen_scope.scope import Scope
    from qwen_scope.steering import Steering

Edits = Annotated[tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="EDIT…", aliases=("-s",))]
Strengths = Annotated[tuple[float, ...], tyro.conf.arg(metavar="N…")]


@dataclass(frozen=True)
class Steer:
    """Text under a steering beside the same without it, and what it did; with --sweep, evidence that it does what it is for."""

    prompts: tyro.conf.Positional[tuple[str, ...]] = ()
    """Prompts to go on from, each in quotes."""
    source: tyro.conf.OmitArgPrefixes[Source] = Source()
    steering: Edits = ()
    """Edits such as `15/1037:2x@generated`: a feature, how much (2, -2x, =5, *0.5, ablate), and where (all, prompt, generated,
    or positions such as 0,3-7). Can be given several times."""
    recipe: Path | None = None
    """A steering saved with --save."""
    file: Path | None = None
    """Read prompts from a file instead, one a line; `-` is standard input."""
    chat: bool = False
    """Read each prompt as a user's message through the model's chat template."""
    max_new_tokens: int = 40
    """Tokens generated at most."""
    temperature: float = 0.7
    """0 takes the most likely token always; 1 draws from the model's own distribution."""
    top_p: float = 1.0
    """Draws from the most likely tokens that together have this probability."""
    seed: int = 0
    """What everything random follows from."""
    save: Path | None = None
    """Also save the steering as a recipe, with its strengths in raw units."""
    json: bool = False
    """Print JSON."""
    sweep: Path | None = None
    """Run over several strengths beside controls, and write figures, a plot and a verdict into this folder. Goes on where it was
    stopped."""
    effect: str | None = None
    """What a sweep measures of each text: words:goal,team, regex:!, language:fr, script:Greek, feature:15/1037, or
    scorer:module:function of your own."""
    instruction: str = ""
    """What one would ask for instead of steering, as a control of a sweep."""
    strengths: Strengths = (-2.0, -1.0, -0.5, 0.5, 1.0, 1.5, 2.0, 3.0)
    """Multiples of the steering in a sweep."""
    seeds: int = 1
    """Texts for each prompt and strength of a sweep."""
    random_features: int = 5
    """Random steerings that a sweep compares with."""

    def run(self) -> None:
        """Generates and prints."""
        prompts = given_texts(self.prompts, self.file)
        if not prompts:
            raise QwenScopeError(
                'expected a prompt, found none; try: qwen-scope steer "My neighbour told me" --steering 23/4411:0.6x'
            )
        if not self.steering and self.recipe is None:
            raise QwenScopeError(
                "expected --steering or --recipe, found neither; say which feature to steer, such as 23/4411:0.6x"
            )
        if (self.sweep is None) != (self.effect is None):
            raise QwenScopeError(
                "expected --sweep FOLDER and --effect together, found one of them; such as --sweep out --effect 'regex:!'"
            )
        from qwen_scope.generation import Sampling
        from qwen_scope.steering import Steering

        # What is wrong with these should be known before a model is loaded.
        sampling = Sampling(self.max_new_tokens, self.temperature, self.top_p, seed=self.seed)
        steering = Steering.of(list(self.steering))
        scope = self.source.open()
        if self.recipe is not None:
            steering = Steering.of([steering, self.recipe], scope.suite.name)
        inputs: list[Any] = [[{"role": "user", "content": text}] for text in prompts] if self.chat else list(prompts)
        if self.save is not None:
            scope.save_steering(self.save, steering)
        if self.sweep is not None:
            self._sweep(scope, steering, inputs, self.sweep)
            return
        results = [scope.side_by_side(prompt, steering, sampling) for prompt in inputs]
        if self.json:
            print_json({**names_of(scope), "texts": [result.to_dict() for result in results]})
            return
        for prompt, result in zip(prompts, results, strict=True):
            print(f"{prompt!r}\n\n{result}\n")

    def _sweep(self, scope: "Scope", steering: "Steering", prompts: list[Any], folder: Path) -> None:
        from qwen_scope.evidence import SweepConfig, sweep

        config = SweepConfig(
            strengths=self.strengths,
            instruction=self.instruction,
            random_features=self.random_features,
            seeds=self.seeds,
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            seed=self.seed,
        )
        report = sweep(scope, steering, prompts, self.effect or "", config, folder=folder)
        report.save(folder)
        if self.json:
            print_json(report.to_dict())
        else:
            print(f"{report}\n\nreport: {folder / 'README.md'}")
