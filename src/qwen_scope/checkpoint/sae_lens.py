"""SAELens' TopK format: a folder per SAE with `cfg.json` and `sae_weights.safetensors`, matrices transposed to ours.

SAELens encodes `relu` of the k largest of `x @ W_enc + b_enc`, with `b_dec` taken off x first only if
`apply_b_dec_to_input`. Read and checked against sae-lens 6.54.12 (`saes/topk_sae.py`, `saes/sae.py`,
`loading/pretrained_sae_loaders.py`); configs from before version 6 are read as SAELens reads them.
"""

import re
from pathlib import Path
from typing import Any

import torch

from qwen_scope.checkpoint.weights import (
    ForeignConfig,
    Weights,
    check_keys,
    checked,
    read_json,
    subtracting_bias,
    write_json,
)
from qwen_scope.errors import QwenScopeError
from qwen_scope.files import read_safetensors, write_safetensors
from qwen_scope.sae import Activation

WEIGHTS = "sae_weights.safetensors"
_LENS_HOOK = re.compile(r"blocks\.(\d+)\.hook_resid_(post|pre)")
_MODULE_HOOK = re.compile(r"(?:[\w]+\.)*?(?:layers|h)\.(\d+)")


def hook_of(cfg: dict[str, Any]) -> str:
    """The hook name in a SAELens config, under any of the names versions gave it."""
    said = cfg | _metadata(cfg)
    return str(said.get("hook_name") or said.get("hook_point") or said.get("hf_hook_name") or "no hook name")


def layer_of(hook: str) -> int | None:
    """The layer whose output a hook reads: n for `blocks.{n}.hook_resid_post` and `model.layers.{n}`, n - 1 for
    `blocks.{n}.hook_resid_pre` if n >= 1, None for any other."""
    if match := _LENS_HOOK.fullmatch(hook):
        layer = int(match[1]) - (match[2] == "pre")
        return layer if layer >= 0 else None
    match = _MODULE_HOOK.fullmatch(hook)
    return int(match[1]) if match else None


def read_config(path: Path) -> ForeignConfig:
    """What a SAELens `cfg.json` says.

    Raises:
        QwenScopeError: a kind of SAE or a normalisation that a TopK SAE cannot express, or a config that lacks a field.
    """
    cfg = read_json(path)
    metadata = _metadata(cfg)
    old_activation = cfg.get("activation_fn_str", cfg.get("activation_fn"))
    architecture = "topk" if old_activation == "topk" else cfg.get("architecture", "standard")
    # False was how old versions wrote "none".
    normalisation = cfg.get("normalize_activations") or "none"
    for what, found, plain in (
        ("architecture", architecture, "topk"),
        ("normalize_activations", normalisation, "none"),
        ("reshape_activations", cfg.get("reshape_activations", "none"), "none"),
    ):
        if found != plain:
            raise QwenScopeError(
                f"expected {what} = {plain!r} in {path}, found {found!r}, which a TopK SAE cannot express; use SAELens "
                "for this one"
            )
    try:
        k = int(cfg["k"] if "k" in cfg else cfg["activation_fn_kwargs"]["k"])
        d_model, d_sae = int(cfg["d_in"]), int(cfg["d_sae"])
    except (KeyError, TypeError, ValueError) as error:
        raise QwenScopeError(
            f"expected k, d_in and d_sae in {path}, found one missing or no number ({error}); check the file"
        ) from error
    activation: Activation = metadata.get("qwen_scope_activation", "topk_relu")
    return ForeignConfig(
        path,
        k,
        activation,
        d_model,
        d_sae,
        backbone=metadata.get("model_name") or cfg.get("model_name"),
        subtracts_b_dec=cfg.get("apply_b_dec_to_input", True),
        scaled_by_decoder_norm=cfg.get("rescale_acts_by_decoder_norm", False),
    )


def read(path: Path, config: ForeignConfig) -> Weights:
    """The weights in the published convention; the encoder is laid out anew in memory, the rest stays mapped.

    Raises:
        QwenScopeError: see `checked`.
    """
    tensors = read_safetensors(path)[0]
    check_keys(tensors, Weights._fields, path)
    W_enc, W_dec, b_enc, b_dec = (tensors[name] for name in Weights._fields)
    weights = checked({"W_enc": W_enc.T, "W_dec": W_dec.T, "b_enc": b_enc, "b_dec": b_dec}, path)
    weights = weights._replace(W_enc=weights.W_enc.contiguous())
    if config.subtracts_b_dec:
        weights = weights._replace(b_enc=subtracting_bias(weights, -1))
    return _fold_decoder_norm(weights) if config.scaled_by_decoder_norm else weights


def _fold_decoder_norm(weights: Weights) -> Weights:
    # The smallest norm SAELens itself divides by when it folds.
    norm = weights.W_dec.float().norm(dim=0).clamp(min=1e-8)
    return weights._replace(
        W_enc=weights.W_enc.float() * norm[:, None],
        b_enc=weights.b_enc.float() * norm,
        W_dec=weights.W_dec.float() / norm,
    )


def write(folder: Path, weights: Weights, layer: int, k: int, activation: Activation, backbone: str | None) -> None:
    """Writes `folder/blocks.{layer}.hook_resid_post`, each file atomically, the config last."""
    hook = f"blocks.{layer}.hook_resid_post"
    transposed = weights._replace(W_enc=weights.W_enc.T, W_dec=weights.W_dec.T)
    write_safetensors(folder / hook / WEIGHTS, transposed._asdict(), {"format": "pt"})
    config = {
        "architecture": "topk",
        "d_in": weights.d_model,
        "d_sae": weights.d_sae,
        "k": k,
        "dtype": "bfloat16" if weights.W_enc.dtype == torch.bfloat16 else "float32",
        "device": "cpu",
        "apply_b_dec_to_input": False,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "rescale_acts_by_decoder_norm": False,
        "metadata": {
            # Without a version of 6 or later, SAELens reads the config by its older rules.
            "sae_lens_version": "6.0.0",
            "model_name": backbone,
            "hook_name": hook,
            "hf_hook_name": f"model.layers.{layer}",
            # SAELens ignores this; it lets us read back which convention the SAE has.
            "qwen_scope_activation": activation,
        },
    }
    write_json(folder / hook / "cfg.json", config)


def _metadata(cfg: dict[str, Any]) -> dict[str, Any]:
    metadata = cfg.get("metadata")
    return metadata if isinstance(metadata, dict) else {}
