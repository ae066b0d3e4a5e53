"""Control vectors: a steering that only adds, in files that other engines apply.

llama.cpp's convention, as its source has it (common/common.cpp `common_control_vector_load_one`, src/llama-adapter.cpp
`llama_adapter_cvec`, and `build_cvec(cur, il)` at the end of each layer in src/models/*.cpp): a GGUF file of architecture
`controlvector` holds float32 tensors `direction.N`, each of d_model numbers, and the one of N is added to the output of layer N,
counted from 0, after its feed-forward part. That is the residual that we call layer N, so the numbers are the same. There is
never one for layer 0: such a file is refused. Nothing checks `controlvector.model_hint`.

llama.cpp and others add the vector at every token, position 0 too, which our own steering leaves alone unless told. Where that
first token is an attention sink, its extreme norm hides what is added.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from qwen_scope.backbone import Backbone
from qwen_scope.errors import QwenScopeError
from qwen_scope.files import expanded, replacing, write_safetensors
from qwen_scope.steering.changes import Change
from qwen_scope.steering.recipe import model_name
from qwen_scope.suite import Suite

FORMAT = "qwen-scope control vectors 1"
_HINTS = {"mistral": "llama", "mixtral": "llama"}
"""Kinds of model that llama.cpp runs as another one."""


def control_vectors(changes: Sequence[Change]) -> dict[int, Float[Tensor, " d_model"]]:
    """What a steering adds to the residual stream after each of its layers, float32 on the CPU; several edits of a layer summed.

    Args:
        changes: edits made ready, as `Scope.changes` gives them.

    Raises:
        QwenScopeError: nothing to steer, or an edit that is no vector: one that clamps, scales or ablates, or that is not made at
            all tokens.
    """
    vectors: dict[int, Tensor] = {}
    for change in changes:
        edit = change.edit
        if edit.how != "add":
            raise QwenScopeError(
                f"expected edits that add, which a control vector can do, found {edit}, which depends on the text; leave it out"
            )
        if not (edit.where.prompt and edit.where.generated):
            raise QwenScopeError(
                f"expected edits at all tokens, where a control vector is added, found {edit}; leave out what follows the @"
            )
        added = change.strength * change.direction.double().cpu()
        vectors[edit.layer] = vectors[edit.layer] + added if edit.layer in vectors else added
    if not vectors:
        raise QwenScopeError(
            "expected features to make control vectors of, found none; name some, such as '15/1037:2x'"
        )
    found = {layer: vectors[layer].float() for layer in sorted(vectors)}
    for layer, vector in found.items():
        if not vector.isfinite().all():
            raise QwenScopeError(
                f"expected strengths that float32 can hold, found too large a vector at layer {layer}; use smaller ones"
            )
    return found


def save_vectors(path: str | Path, changes: Sequence[Change], backbone: Backbone, suite: Suite) -> None:
    """Writes the control vectors of a steering: as GGUF for llama.cpp if the name ends in .gguf, or as safetensors.

    Raises:
        QwenScopeError: what `control_vectors` and `save_gguf` refuse, another ending, or a file that cannot be written.
    """
    place, vectors = expanded(path), control_vectors(changes)
    steering = " ".join(str(change.edit) for change in changes)
    model = model_name(backbone, suite)
    if place.suffix == ".gguf":
        save_gguf(place, vectors, model_hint(backbone), f"{steering} of {suite.name} on {model}")
    elif place.suffix == ".safetensors":
        about = {"steering": steering, "suite": suite.name, "model": model}
        about["layers"] = "direction.N is added to the output of decoder layer N, counted from 0"
        tensors = {f"direction.{layer}": vector for layer, vector in vectors.items()}
        write_safetensors(place, tensors, {"format": FORMAT, **about})
    else:
        raise QwenScopeError(f"expected a file that ends in .gguf or .safetensors, found {place.name!r}; name it so")


def save_gguf(
    path: str | Path, vectors: Mapping[int, Float[Tensor, " d_model"]], model_hint: str, description: str = ""
) -> None:
    """Writes control vectors as llama.cpp reads them, atomically; see the top of this module.

    Args:
        vectors: by layer, counted from 0.
        model_hint: what llama.cpp calls this kind of model (see `model_hint`).
        description: what they are, for people.

    Raises:
        QwenScopeError: a vector for layer 0, or a file that cannot be written.
    """
    from gguf import GGUFWriter

    if 0 in vectors:
        raise QwenScopeError(
            "expected control vectors of layers from 1, all that llama.cpp has, found one of layer 0; steer another layer, or "
            "write safetensors"
        )
    with replacing(expanded(path)) as temporary:
        writer = GGUFWriter(temporary, "controlvector")
        writer.add_string("controlvector.model_hint", model_hint)
        writer.add_int32("controlvector.layer_count", len(vectors))
        if description:
            writer.add_description(description)
        for layer, vector in sorted(vectors.items()):
            writer.add_tensor(f"direction.{layer}", vector.to("cpu", torch.float32).contiguous().numpy())
        try:
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
        finally:
            writer.close()


def model_hint(backbone: Backbone) -> str:
    """What llama.cpp calls this kind of model, such as `qwen3moe` for `qwen3_moe`; the kind itself where it knows none."""
    from gguf import MODEL_ARCH_NAMES

    kind = str(backbone.config.model_type).removesuffix("_text")
    known = {_letters(name): name for name in MODEL_ARCH_NAMES.values()}
    return _HINTS.get(kind) or known.get(_letters(kind), kind)


def _letters(name: str) -> str:
    return "".join(filter(str.isalnum, name))
