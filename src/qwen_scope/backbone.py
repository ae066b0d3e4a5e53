"""`Backbone`: a Hugging Face causal language model whose residual stream can be read and written.

The one place that knows where decoder layers live and what they return.
"""

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from qwen_scope.devices import as_device, as_dtype
from qwen_scope.errors import QwenScopeError, reason
from qwen_scope.files import is_folder

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Towers that read images, sound or video, and heads that guess further tokens, have layers of their own.
NOT_THE_DECODER = {"visual", "vision", "vision_tower", "vision_model", "audio", "audio_tower", "encoder", "mtp"}


class Backbone:
    """A decoder-only causal LM, its decoder layers and, if there is one, its tokenizer.

    `layer` n counts from 0; its residual is the output of the n-th decoder layer's module, before any final norm
    (the card's hook point). `hidden_states[n + 1]` of transformers is the same except for the last layer.

    Args:
        model: any decoder-only `transformers` model: text only, or wrapped for vision and language.
        tokenizer: its tokenizer; without one, only token ids can be read.

    Raises:
        QwenScopeError: no list of decoder layers of the configured length is found.
    """

    def __init__(self, model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase | None" = None):
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.layers = find_decoder_layers(model)
        # Hooks sit on the model itself, so one thread's would fire in another's forward pass.
        self._one_at_a_time = threading.RLock()

    @classmethod
    def from_pretrained(
        cls,
        name: str | None = None,
        *,
        dtype: str | torch.dtype = "float32",
        device: str | torch.device | None = None,
        device_map: Any = None,
        revision: str | None = None,
        cache_dir: str | None = None,
    ) -> "Backbone":
        """Loads a model and its tokenizer by hub id or folder; without a name, or as `bundled`, the bundled one.

        Args:
            dtype: what the model computes in. The card's arithmetic is float32; bfloat16 halves the memory and moves
                features near rank k.
            device: where to put it; the CPU unless told.
            device_map: spread over devices by accelerate, instead of `device`.

        Raises:
            QwenScopeError: the model cannot be found or read, or there is no such device.
        """
        from transformers import AutoModelForCausalLM, AutoTokenizer

        from qwen_scope.hub import is_repo_id, local_mirror

        place = as_device(device or "cpu")
        if name is None or name == "bundled":
            from qwen_scope.bundled import model_folder

            name = str(model_folder())
        source = str(Path(name).expanduser() if is_folder(name) else local_mirror(name) or name)
        if not is_folder(source) and not is_repo_id(source):
            raise QwenScopeError(
                f"expected the folder of a language model at {name}, found no folder there; check the path"
            )
        found: dict[str, Any] = {"revision": revision, "cache_dir": cache_dir}
        computed_in = as_dtype(dtype)
        try:
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                source, dtype=computed_in, device_map=device_map, output_loading_info=True, **found
            )
        # A damaged file or config can make the libraries below raise nearly anything.
        except Exception as error:
            advice = (
                "pass a whole folder with config.json and safetensors, or delete it if it is the bundled model's in the cache"
                if is_folder(source)
                else "pass a hub id or a folder, or set QWEN_SCOPE_MIRROR to a folder laid out as {org}/{name}/files"
            )
            raise QwenScopeError(
                f"expected a causal language model as {name!r}, found none that loads ({reason(error)}); {advice}"
            ) from error
        model, loading = loaded
        if missing := sorted(loading["missing_keys"]):
            # transformers would go on with random numbers in their place.
            raise QwenScopeError(
                f"expected all weights of the model {name!r}, found {len(missing)} missing, such as {missing[0]}; get its "
                "files again"
            )
        try:
            tokenizer = AutoTokenizer.from_pretrained(source, **found)
        except Exception as error:
            raise QwenScopeError(
                f"expected a tokenizer beside the model {name!r}, found none that loads ({reason(error)}); add its "
                "files, or build Scope(model, suite, tokenizer=…) yourself"
            ) from error
        if device_map is None:
            model.to(place)  # pyright: ignore[reportArgumentType]
        return cls(model, tokenizer)

    @property
    def name(self) -> str:
        """What the model was loaded from."""
        return self.model.config.name_or_path or type(self.model).__name__

    @property
    def config(self) -> Any:
        """The configuration of the text model, also where it is nested in a vision-language one."""
        return self.model.config.get_text_config()

    @property
    def d_model(self) -> int:
        """Width of the residual stream."""
        return self.config.hidden_size

    @property
    def context_length(self) -> int | None:
        """The most tokens the model was made for, if its configuration says so."""
        return getattr(self.config, "max_position_embeddings", None)

    @property
    def device(self) -> torch.device:
        """Where token ids must be put."""
        return self.model.get_input_embeddings().weight.device  # pyright: ignore[reportReturnType]

    @cached_property
    def end_tokens(self) -> frozenset[int]:
        """Tokens by which the model ends a text, as its generation config, its configuration and its tokenizer tell."""
        told = [
            getattr(self.model.generation_config, "eos_token_id", None),
            getattr(self.config, "eos_token_id", None),
            getattr(self.tokenizer, "eos_token_id", None),
        ]
        return frozenset(id for ids in told if ids is not None for id in ([ids] if isinstance(ids, int) else ids))

    @cached_property
    def decoder(self) -> nn.Module:
        """The module that runs the layers: it gets token ids (or their embeddings), mask and cache of a forward pass."""
        return next(module for module in self.model.modules() if self.layers in module.children())

    @property
    def unembedding(self) -> Float[Tensor, "vocabulary d_model"]:
        """The matrix that makes logits; models can have more rows than their tokenizer has tokens.

        Raises:
            QwenScopeError: a model without one.
        """
        head: Any = self.model.get_output_embeddings()
        if head is None:
            raise QwenScopeError(
                f"expected a language model with an unembedding, found none in {type(self.model).__name__}; load it as a "
                "causal one"
            )
        return head.weight

    @cached_property
    def final_norm(self) -> nn.Module:
        """What the last layer's residual goes through before the unembedding: the first module called after that layer.

        Found by reading one token; an `nn.Identity` where the unembedding itself comes next, or nothing.
        """
        inside = {module for layer in self.layers for module in layer.modules()}
        last, found = self.layers[-1], []

        def after(module: nn.Module, args: Any, output: Any) -> None:
            found.append(module)

        def next_one(module: nn.Module, args: Any) -> None:
            if found:
                found.append(module)
                raise _LastLayerRead

        with self._one_at_a_time, ExitStack() as hooks:
            hooks.callback(last.register_forward_hook(after).remove)
            for module in self.model.modules():
                if module not in inside:
                    hooks.callback(module.register_forward_pre_hook(next_one).remove)
            try:
                with torch.no_grad():
                    self.model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=self.device), use_cache=False)
            except _LastLayerRead:
                pass
        follows = found[-1]
        return nn.Identity() if follows in (last, self.model.get_output_embeddings()) else follows

    def residuals(
        self,
        input_ids: Int[Tensor, "batch tokens"],
        attention_mask: Int[Tensor, "batch tokens"] | None = None,
        *,
        layers: Iterable[int],
    ) -> dict[int, Float[Tensor, "batch tokens d_model"]]:
        """The residual stream after some layers, from one forward pass that ends after the last of them.

        Rows padded on the right need an `attention_mask`; what comes out at padded positions means nothing.
        The tensors keep the model's dtype and each layer's device, and carry no gradient.

        Raises:
            QwenScopeError: a layer the model does not have.
        """
        wanted = sorted(set(layers))
        for layer in wanted:
            self.check_layer(layer)
        if not wanted:
            return {}
        captured: dict[int, Tensor] = {}

        def keep(layer: int) -> Callable[..., None]:
            def hook(module: nn.Module, args: Any, output: Any) -> None:
                captured[layer] = hidden_of(output).detach()
                if layer == wanted[-1]:
                    raise _LastLayerRead

            return hook

        with self._one_at_a_time, ExitStack() as hooks:
            for layer in wanted:
                hooks.callback(self.layers[layer].register_forward_hook(keep(layer)).remove)
            try:
                with torch.no_grad():
                    self.model(
                        input_ids=input_ids.to(self.device),
                        attention_mask=None if attention_mask is None else attention_mask.to(self.device),
                        use_cache=False,
                    )
            except _LastLayerRead:
                pass
        return captured

    @torch.no_grad()
    def next_token_logits(self, ids: Sequence[int], count: int) -> Float[Tensor, "count vocabulary"]:
        """What the model says would come next after each of the last `count` tokens of a text, from one forward pass."""
        read = torch.tensor([list(ids)], device=self.device)
        with self._one_at_a_time:
            return self.model(input_ids=read, use_cache=False, logits_to_keep=count).logits[0, -count:]

    @contextmanager
    def editing(self, edits: Mapping[int, Callable[[Tensor], Tensor]]) -> Iterator[None]:
        """While the block runs, replaces the residual after each layer n by `edits[n](residual)`.

        Each function gets the (batch, tokens, d_model) residual of one forward pass and returns its replacement. Other
        threads wait meanwhile.

        Raises:
            QwenScopeError: a layer the model does not have.
        """

        def replacing(edit: Callable[[Tensor], Tensor]) -> Callable[..., Any]:
            def hook(module: nn.Module, args: Any, output: Any) -> Any:
                new = edit(hidden_of(output))
                return new if isinstance(output, Tensor) else type(output)((new, *output[1:]))

            return hook

        for layer in edits:
            self.check_layer(layer)
        with self._one_at_a_time, ExitStack() as hooks:
            for layer, edit in edits.items():
                hooks.callback(self.layers[layer].register_forward_hook(replacing(edit)).remove)
            yield

    def check_layer(self, layer: int) -> None:
        """Raises a QwenScopeError unless the model has this layer."""
        if not 0 <= layer < len(self.layers):
            raise QwenScopeError(
                f"expected a layer from 0 to {len(self.layers) - 1} of {self.name}, found {layer}; layers are counted "
                "from 0 (the report counts from 1)"
            )

    def __repr__(self) -> str:
        return f"Backbone({self.name!r}, {len(self.layers)} layers, d_model={self.d_model}, {self.model.dtype})"


class _LastLayerRead(Exception):
    """Ends a forward pass of which nobody asked for the rest."""


def hidden_of(output: Any) -> Tensor:
    """The residual stream in what a decoder layer returned: a tensor, or a tuple that begins with it."""
    return output if isinstance(output, Tensor) else output[0]


def find_decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The decoder layers of a causal LM: the `ModuleList` as long as the text configuration says there are layers.

    Raises:
        QwenScopeError: there is no such list, or this is another kind of model.
    """
    config: Any = model.config
    text = config.get_text_config()
    count = getattr(text, "num_hidden_layers", None)
    if count is None or not hasattr(text, "vocab_size") or config.is_encoder_decoder:
        raise QwenScopeError(
            f"expected a decoder-only language model, found {type(model).__name__}, which "
            f"{'has an encoder' if config.is_encoder_decoder else 'is no language model'}; use a causal one"
        )
    found = [
        (path, module)
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count and not NOT_THE_DECODER & set(path.split("."))
    ]
    if not found:
        raise QwenScopeError(
            f"expected a list of {count} decoder layers in {type(model).__name__}, found none; this needs a "
            "decoder-only language model"
        )
    # The decoder's own list is the outermost one: lists inside its layers have longer paths.
    return min(found, key=lambda item: item[0].count("."))[1]
