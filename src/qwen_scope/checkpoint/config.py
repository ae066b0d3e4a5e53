"""`SuiteConfig`: the `config.json` beside the layers of a suite we wrote, in either of our two file formats."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

from qwen_scope.errors import QwenScopeError
from qwen_scope.sae import Activation

FORMAT = "qwen-scope suite 1"


@dataclass(frozen=True)
class SuiteConfig:
    """What the layers of one suite have in common, and how wide each is.

    Raises:
        QwenScopeError: numbers below 1, k above a layer's width, a layer below 0, an unknown activation.
    """

    name: str
    """What the suite is called, such as its repository's name."""
    backbone: str | None
    """Hub id of the language model the SAEs were trained on, None if not known."""
    k: int
    """Features kept per token."""
    activation: Activation
    """What becomes of a kept pre-activation below 0, see `qwen_scope.sae.Activation`."""
    d_model: int
    """Width of the residual stream."""
    layers: Mapping[int, int]
    """d_sae of each layer; layers may differ."""
    provenance: Mapping[str, Any] = field(default_factory=dict)
    """How the SAEs came about, in any JSON form: data, tokens, seed, figures. Kept and never interpreted."""

    def __post_init__(self) -> None:
        if self.activation not in get_args(Activation):
            raise QwenScopeError(
                f"expected activation 'topk' or 'topk_relu' in the suite {self.name}, found {self.activation!r}; "
                "choose one"
            )
        if self.k < 1 or self.d_model < 1:
            raise QwenScopeError(
                f"expected k and d_model of at least 1 in the suite {self.name}, found k = {self.k} and d_model = "
                f"{self.d_model}; correct them"
            )
        for layer, d_sae in self.layers.items():
            if layer < 0 or d_sae < self.k:
                raise QwenScopeError(
                    f"expected layers from 0 and at least k = {self.k} features each in the suite {self.name}, found "
                    f"layer {layer} with d_sae = {d_sae}; correct them"
                )

    def to_json(self) -> str:
        """The text of `config.json`."""
        layers = {str(layer): {"d_sae": d_sae} for layer, d_sae in sorted(self.layers.items())}
        shared = {key: getattr(self, key) for key in ("name", "backbone", "k", "activation", "d_model")}
        value = {"format": FORMAT, **shared, "layers": layers, "provenance": dict(self.provenance)}
        return json.dumps(value, indent=2) + "\n"

    @staticmethod
    def from_json(text: str, where: str | Path = "config.json") -> "SuiteConfig":
        """Reads what `to_json` wrote; `where` is named in errors.

        Raises:
            QwenScopeError: no JSON object, another format or version, a field that is missing, unknown or of the
                wrong type, or values that the class refuses.
        """
        try:
            raw = json.loads(text)
        except ValueError as error:
            raise QwenScopeError(
                f"expected JSON in {where}, found text that does not parse ({error}); repair it"
            ) from error
        if not isinstance(raw, dict) or raw.get("format") != FORMAT:
            found = repr(raw.get("format")) if isinstance(raw, dict) else f"a {type(raw).__name__}"
            raise QwenScopeError(
                f"expected the format {FORMAT!r} in {where}, found {found}; read it with the version that wrote it"
            )
        raw = {"provenance": {}, **raw}
        for key, kind in _FIELDS.items():
            # type() and not isinstance: True is an int to Python, not to a reader of the file.
            if key not in raw or type(raw[key]) not in kind:
                found = f"{raw[key]!r}" if key in raw else "nothing"
                kinds = " or ".join({"NoneType": "null"}.get(k.__name__, k.__name__) for k in kind)
                raise QwenScopeError(
                    f"expected {key} in {where} to be of type {kinds}, found {found}; correct the file"
                )
        unknown = sorted(raw.keys() - _FIELDS.keys() - {"format"})
        if unknown:
            raise QwenScopeError(
                f"expected only {', '.join(_FIELDS)} in {where}, found also {', '.join(unknown)}; free notes go into "
                "provenance"
            )
        layers = _layers(raw["layers"], where)
        if raw["activation"] not in get_args(Activation):
            raise QwenScopeError(
                f"expected activation 'topk' or 'topk_relu' in {where}, found {raw['activation']!r}; choose one"
            )
        return SuiteConfig(**{key: raw[key] for key in _FIELDS if key != "layers"}, layers=layers)


_FIELDS: dict[str, tuple[type, ...]] = {
    "name": (str,),
    "backbone": (str, type(None)),
    "k": (int,),
    "activation": (str,),
    "d_model": (int,),
    "layers": (dict,),
    "provenance": (dict,),
}


def _layers(raw: dict[str, Any], where: str | Path) -> dict[int, int]:
    layers = {}
    for layer, entry in raw.items():
        d_sae = entry.get("d_sae") if isinstance(entry, dict) else None
        if not layer.isdecimal() or type(d_sae) is not int:
            raise QwenScopeError(
                f'expected layers such as "5": {{"d_sae": 4608}} in {where}, found {layer!r}: {entry!r}; correct the '
                "file"
            )
        layers[int(layer)] = d_sae
    return layers
