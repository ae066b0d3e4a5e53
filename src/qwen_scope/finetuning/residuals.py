"""The residual stream of a forward pass that somebody else runs, with its gradient."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from qwen_scope.backbone import find_decoder_layers, hidden_of


@contextmanager
def caught(model: nn.Module, layers: Sequence[int]) -> Iterator[dict[int, Tensor]]:
    """While the block runs, keeps the residual after each of some layers, from the first forward pass within it.

    Nothing is computed in the hooks, which gradient checkpointing may run anew in the backward pass; and later passes, such
    as those that only feed metrics, are left alone.

    Args:
        model: a causal LM, without whatever PEFT or accelerate wrapped around it.
        layers: which, from 0.
    """
    found: dict[int, Tensor] = {}

    def keeping(layer: int) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            found.setdefault(layer, hidden_of(output))

        return hook

    decoder = find_decoder_layers(model)
    with ExitStack() as hooks:
        for layer in layers:
            hooks.callback(decoder[layer].register_forward_hook(keeping(layer)).remove)
        yield found


@contextmanager
def caught_last(model: Any) -> Iterator[list[Tensor]]:
    """While the block runs, keeps what the unembedding is given in the first forward pass, as the only item of a list."""
    found: list[Tensor] = []

    def hook(module: nn.Module, args: Any, output: Any) -> None:
        if not found:
            found.append(output[0])

    handle = model.base_model.register_forward_hook(hook)
    try:
        yield found
    finally:
        handle.remove()


def trainable_below(model: nn.Module, layer: int) -> int:
    """How many trainable numbers the residual after a layer depends on: those of the embedding and of the layers up to it.

    0 means that no loss on this residual can change the model.
    """
    embedding: Any = model.get_input_embeddings()  # pyright: ignore[reportCallIssue, reportAttributeAccessIssue]
    modules = [embedding, *find_decoder_layers(model)[: layer + 1]]
    parameters = {parameter for module in modules for parameter in module.parameters()}
    return sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
