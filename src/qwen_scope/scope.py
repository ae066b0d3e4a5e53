"""`Scope`: a language model together with its SAEs. Text in, features out; features in, text out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from qwen_scope.backbone import Backbone
from qwen_scope.bundled import GGUF_SHA256
from qwen_scope.comparison import By, Comparison, compare
from qwen_scope.devices import as_device
from qwen_scope.errors import QwenScopeError
from qwen_scope.evaluation import SAMPLE_TEXTS, CheckReport, check
from qwen_scope.features import SparseFeatures
from qwen_scope.generation import GeneratedToken, Generation, Sampling
from qwen_scope.generation.generate import generate, stream, stream_all
from qwen_scope.kernels import Kernel
from qwen_scope.reading import read_rows
from qwen_scope.steering import Recipe, Steering
from qwen_scope.steering.around import Following, steered
from qwen_scope.steering.changes import Change, changes
from qwen_scope.steering.maxima import Maxima, maxima_of
from qwen_scope.steering.recipe import model_name
from qwen_scope.steering.trace import trace
from qwen_scope.suite import Suite, ranges
from qwen_scope.text_features import reconstruction_errors, text_features
from qwen_scope.tokens import tokenize

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class Scope:
    """A backbone and the suite of SAEs that reads it.

    Args:
        model: a `transformers` causal LM already in memory, or a `Backbone`.
        suite: its SAEs.
        tokenizer: the model's tokenizer; without one, only token ids can be read.
        layers: which of the suite's layers to read; all of them unless told.

    Raises:
        QwenScopeError: SAEs of another width than the model, or a layer that one of the two does not have.
    """

    def __init__(
        self,
        model: PreTrainedModel | Backbone,
        suite: Suite,
        tokenizer: PreTrainedTokenizerBase | None = None,
        layers: Sequence[int] | int | None = None,
    ):
        if not isinstance(suite, Suite):
            raise QwenScopeError(
                f"expected a Suite, found {suite!r}; open it with Suite.from_pretrained, or use Scope.from_pretrained"
            )
        if isinstance(model, Backbone) and tokenizer is not None:
            model = model.model
        self.backbone = model if isinstance(model, Backbone) else Backbone(model, tokenizer)
        self.suite = suite
        self.layers = self._known(suite.layers if layers is None else layers)
        if suite.d_model != self.backbone.d_model:
            belongs = f", which reads {suite.backbone}," if suite.backbone else ""
            raise QwenScopeError(
                f"expected SAEs of width d_model = {self.backbone.d_model} for {self.backbone.name}, found "
                f"{suite.d_model} in {suite.name}{belongs}; use the model they were trained on"
            )

    @classmethod
    def from_pretrained(
        cls,
        model: str | None = None,
        suite: str | None = None,
        *,
        layers: Sequence[int] | int | None = None,
        dtype: str | torch.dtype = "float32",
        device: str | torch.device | None = None,
        device_map: Any = None,
        k: int | None = None,
        cache_dir: str | None = None,
        kernel: Kernel | None = None,
        prepared: bool = False,
    ) -> Scope:
        """Loads a model and its SAEs by name; without names, the bundled ones.

        Args:
            model: hub id or folder of a causal LM. Left out, it is the suite's own backbone.
            suite: hub id, catalogue name, folder or file of SAEs (see `Suite.from_pretrained`).
            layers: which layers to read; all of the suite's unless told. SAEs load when first used.
            dtype: what the language model computes in. SAEs always compute in float32.
            device: where both go; the first GPU if there is one, else the CPU.
            device_map: spreads the language model over devices instead.
            k: overrides the number of features kept per token.
            cache_dir: where downloads are kept, instead of the hub's usual cache.
            kernel: which path encodes, instead of the fastest one on this machine.
            prepared: keep a copy of each layer used, laid out to open and run fast (see `Suite.from_pretrained`).

        Raises:
            QwenScopeError: a model or suite that cannot be found, read, or joined.
        """
        if model is not None and suite is None:
            raise QwenScopeError(
                f"expected a suite of SAEs beside the model {model!r}, found none named; pass suite=… "
                "(`qwen-scope suites` lists the published ones)"
            )
        place = as_device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        # The suite first: naming it wrong should not cost the loading of a language model.
        only = [layers] if isinstance(layers, int) else layers
        saes = Suite.from_pretrained(
            suite, k=k, layers=only, cache_dir=cache_dir, device=place, kernel=kernel, prepared=prepared
        )
        if model is None:
            if saes.backbone is None:
                raise QwenScopeError(
                    f"expected a model to read with the suite {suite!r}, which names none; pass model=…"
                )
            # The bundled suite belongs to the quantised weights that come with the package, not to those on the hub.
            quantised = saes.provenance.get("model_file_sha256") == GGUF_SHA256
            model = None if quantised else saes.backbone
        backbone = Backbone.from_pretrained(
            model, dtype=dtype, device=place, device_map=device_map, cache_dir=cache_dir
        )
        return cls(backbone, saes, layers=layers)

    @torch.no_grad()
    def features(
        self,
        inputs: Any,
        *,
        layers: Sequence[int] | int | None = None,
        thinking: bool | None = None,
        errors: bool = False,
    ) -> Any:
        """The features of every token, at every layer asked for, exactly as the model card defines them.

        Args:
            inputs: a text; a list of texts; token ids (list, list of lists, or a tensor of shape (tokens,) or
                (batch, tokens)); chat messages (a list of dicts, or a list of such lists).
            layers: fewer layers than the scope reads.
            thinking: for chat messages, opens the assistant's turn with thinking on or off; None reads the messages
                alone.
            errors: also tell how far each token's reconstruction is off (`TextFeatures.errors`).

        Returns:
            A `TextFeatures`; for several inputs, or a (batch, tokens) tensor, a list of them in the order given.

        Raises:
            QwenScopeError: an empty text, one longer than the model's context, a layer that is not there.
        """
        texts, single = tokenize(inputs, self.backbone.tokenizer, thinking=thinking)
        wanted = self.layers if layers is None else self._known(layers)
        found: list[dict[int, SparseFeatures]] = [{} for _ in texts]
        off: list[dict[int, Tensor]] = [{} for _ in texts]
        for order, residuals in read_rows(texts, self.backbone, wanted):
            for layer in wanted:
                sae = self.suite[layer]
                x = residuals.pop(layer).to(sae.device)
                encoded = sae.encode(x)
                error = reconstruction_errors(x, sae.decode(encoded)) if errors else None
                start = 0
                for text in order:
                    end = start + len(texts[text])
                    found[text][layer] = encoded[start:end]
                    if error is not None:
                        off[text][layer] = error[start:end]
                    start = end
        results = [
            text_features(text, by_layer, errors) for text, by_layer, errors in zip(texts, found, off, strict=True)
        ]
        return results[0] if single else results

    def compare(
        self,
        first: str | Sequence[Any],
        second: str | Sequence[Any],
        *,
        layers: Sequence[int] | int | None = None,
        by: By = "rate",
        top: int = 10,
        skip_first: bool = True,
        skip_common_tokens: bool = False,
        skip_common_prefix: bool = False,
    ) -> Comparison:
        """Which features fire otherwise in some texts than in others; see `qwen_scope.comparison.compare`.

        Args:
            first: a text, or a list of texts (or of whatever else `features` takes).
            second: the same, to compare with.
            layers: fewer layers than the scope reads.

        For the other arguments see `qwen_scope.comparison.compare`.

        Raises:
            QwenScopeError: texts that cannot be read, a layer that is not there, or nothing left to count.
        """
        groups = [[group] if isinstance(group, str) else list(group) for group in (first, second)]
        # All at once, so that each layer's SAE is used once.
        read = self.features([text for group in groups for text in group], layers=layers)
        return compare(
            read[: len(groups[0])],
            read[len(groups[0]) :],
            by=by,
            top=top,
            skip_first=skip_first,
            skip_common_tokens=skip_common_tokens,
            skip_common_prefix=skip_common_prefix,
        )

    def check(self, texts: Any = None, *, layers: Sequence[int] | int | None = None) -> CheckReport:
        """How well the SAEs fit the model, and which classic mistake explains it if they do not.

        Args:
            texts: what to read, as for `features`; a small sample of several kinds of text unless given.
            layers: fewer layers than the scope reads.

        Returns:
            A `CheckReport`; its docstring and `LayerCheck`'s define every figure.
        """
        wanted = self.layers if layers is None else self._known(layers)
        tokenized, _ = tokenize(SAMPLE_TEXTS if texts is None else texts, self.backbone.tokenizer)
        return check(self.backbone, self.suite, tokenized, wanted)

    @cached_property
    def maxima(self) -> Maxima:
        """The highest activation of each feature, which strengths such as `2x` are counted in.

        Of the bundled suite, those in the index that comes with it; of another, those in a sample of texts, which are lower
        and lack rare features. `FeatureIndex.scope` has those of its corpus, and another `Maxima` can be put in place.
        """
        return maxima_of(self.backbone, self.suite)

    def changes(self, steering: Any) -> list[Change]:
        """A steering (whatever `Steering.of` takes) made ready, with its strengths in raw units.

        Raises:
            QwenScopeError: edits that contradict each other, features that the suite does not have, or a recipe for another.
        """
        ready = changes(Steering.of(steering, self.suite.name), self.suite, lambda: self.maxima)
        for change in ready:
            self.backbone.check_layer(change.edit.layer)
        return ready

    def generate(
        self,
        inputs: Any,
        steering: Any = None,
        sampling: Sampling | Sequence[Sampling] = Sampling(),
        *,
        thinking: bool | None = None,
        trace: bool = False,
    ) -> Any:
        """Text that continues a prompt, or answers chat messages, while features are steered.

        Args:
            inputs: one prompt or several, as for `features`.
            steering: whatever `Steering.of` takes, for all prompts; or a list with one for each of several prompts. For one
                prompt, a list of lists or of `Steering` and None gives a text for each.
            sampling: how tokens are drawn, or a list with one for each text.
            thinking: for chat messages, thinking on or off, where the model's template knows of it.
            trace: also read each text with and without steering, to tell what it did (see `Trace`).

        Returns:
            A `Generation`; a list of them for several prompts or several steerings. Texts of one seed draw the same tokens
            but where steering tells them apart.

        Raises:
            QwenScopeError: a steering that cannot be, a prompt beyond the model's context, positions beyond the prompt.
        """
        prompts, single = tokenize(inputs, self.backbone.tokenizer, thinking=thinking, reply=True)
        each = isinstance(steering, list | tuple) and (not single or any(_is_whole(item) for item in steering))
        steerings = list(steering) if each else [steering] * len(prompts)
        if single and each:
            prompts, single = prompts * len(steerings), False
        samplings = [sampling] * len(prompts) if isinstance(sampling, Sampling) else list(sampling)
        if single and len(samplings) > 1:
            prompts, steerings, single = prompts * len(samplings), steerings * len(samplings), False
        if not len(prompts) == len(steerings) == len(samplings):
            raise QwenScopeError(
                f"expected as many steerings and samplings as prompts, found {len(prompts)} prompts, {len(steerings)} steerings "
                f"and {len(samplings)} samplings; give one of each, or as many"
            )
        rows = [self.changes(item) for item in steerings]
        results = generate(self.backbone, self.suite, prompts, rows, samplings, trace=trace)
        return results[0] if single else results

    def stream(
        self, inputs: Any, steering: Any = None, sampling: Sampling = Sampling(), *, thinking: bool | None = None
    ) -> Iterator[GeneratedToken]:
        """The same for one prompt, token by token as they are generated. The pieces of the tokens make the text.

        Raises:
            QwenScopeError: what `generate` refuses, or several prompts.
        """
        prompts, single = tokenize(inputs, self.backbone.tokenizer, thinking=thinking, reply=True)
        if not single:
            raise QwenScopeError(f"expected one prompt to stream, found {len(prompts)}; use generate for several")
        return stream(self.backbone, self.suite, prompts[0], self.changes(steering), sampling)

    def side_by_side(
        self, inputs: Any, steering: Any, sampling: Sampling = Sampling(), *, thinking: bool | None = None
    ) -> SideBySide:
        """A prompt continued without and with steering, from one seed, with a trace of what the steering did.

        Raises:
            QwenScopeError: what `generate` refuses, or several prompts.
        """
        _, single = tokenize(inputs, self.backbone.tokenizer, thinking=thinking, reply=True)
        if not single:
            raise QwenScopeError("expected one prompt to continue side by side, found several; pass one at a time")
        steering = Steering.of(steering, self.suite.name)
        plain = self.generate(inputs, None, sampling, thinking=thinking)
        return SideBySide(plain, self.generate(inputs, steering, sampling, thinking=thinking, trace=True))

    def stream_side_by_side(
        self, inputs: Any, steering: Any, sampling: Sampling = Sampling(), *, thinking: bool | None = None
    ) -> Iterator[SideBySide]:
        """The same while it is being generated: after each token what there is so far, at last the whole with its trace.

        Both texts are generated together, and other threads can use the model in between. Whoever stops to ask ends it.

        Raises:
            QwenScopeError: what `generate` refuses, or several prompts.
        """
        prompts, single = tokenize(inputs, self.backbone.tokenizer, thinking=thinking, reply=True)
        if not single:
            raise QwenScopeError("expected one prompt to continue side by side, found several; pass one at a time")
        rows = [[], self.changes(steering)]
        both: list[Generation] = []
        for both in stream_all(self.backbone, self.suite, prompts * 2, rows, [sampling] * 2):
            yield SideBySide(*both)
        plain, changed = both
        ids = [*changed.prompt_ids, *changed.ids]
        found = trace(self.backbone, self.suite, ids, len(changed.prompt_ids), rows[1])
        yield SideBySide(plain, replace(changed, trace=found))

    def steered(self, steering: Any) -> AbstractContextManager[Following]:
        """While the block runs, whatever runs the model is steered: forward passes, `model.generate`, pipelines.

        What the first forward pass reads is the prompt. Other threads wait until the block ends.

        Args:
            steering: whatever `Steering.of` takes, for every row of a batch; or a list of lists or of `Steering` and None, one
                for each row.

        Raises:
            QwenScopeError: a steering that cannot be.
        """
        each = isinstance(steering, list | tuple) and any(_is_whole(item) for item in steering)
        rows = [self.changes(item) for item in steering] if each else [self.changes(steering)]
        return steered(self.backbone, rows, self.suite)

    def save_steering(self, path: str | Path, steering: Any, note: str = "") -> Recipe:
        """Keeps a steering in a file, with the model and suite it is for and its strengths in raw units.

        A `Path` of it is a steering, everywhere one is asked for.

        Raises:
            QwenScopeError: a steering that cannot be, or a file that cannot be written.
        """
        raw = [replace(change.edit, strength=change.strength, unit="raw") for change in self.changes(steering)]
        recipe = Recipe(
            steering=str(Steering(tuple(raw))),
            given=str(Steering.of(steering)),
            units=self.maxima.source,
            model=model_name(self.backbone, self.suite),
            suite=self.suite.name,
            note=note,
            made=datetime.now(UTC).isoformat(timespec="seconds"),
            version=metadata.version("qwen-scope"),
        )
        recipe.save(path)
        return recipe

    def _known(self, layers: Sequence[int] | int) -> list[int]:
        """The layers asked for, in order, each of which both the suite and the model must have."""
        if isinstance(layers, int):
            layers = [layers]
        for layer in layers:
            if layer not in self.suite.layers:
                raise QwenScopeError(
                    f"expected layers out of {ranges(self.suite.layers)} of {self.suite.name}, found {layer!r}; layers are "
                    "counted from 0"
                )
            if layer >= len(self.backbone.layers):
                raise QwenScopeError(
                    f"expected layers that {self.backbone.name} has, 0 to {len(self.backbone.layers) - 1}, found {layer} in "
                    f"{self.suite.name}; use the model the SAEs were trained on"
                )
        if not layers:
            raise QwenScopeError(f"expected at least one layer of {ranges(self.suite.layers)}, found none; name some")
        return sorted(set(layers))

    def __repr__(self) -> str:
        return f"Scope({self.backbone!r}, {self.suite!r}, layers={self.layers})"


@dataclass(frozen=True)
class SideBySide:
    """One prompt continued twice, from one seed."""

    original: Generation
    """Without steering."""
    steered: Generation
    """With it, and a trace where it is whole."""

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values for JSON."""
        return {"original": self.original.to_dict(), "steered": self.steered.to_dict()}

    def __str__(self) -> str:
        return f"original: {self.original.text}\n\nsteered:  {self.steered.text}\n\n{self.steered.trace}"


def _is_whole(item: Any) -> bool:
    """Whether an item of a list is a steering of its own, and not one edit of a single steering."""
    return item is None or isinstance(item, list | tuple | Steering | Path)
