"""`Edit`: what is done to one feature, and the short text that says it, such as `12/6159:-2x@generated`."""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from typing import Any, Literal, get_args

from qwen_scope.errors import QwenScopeError
from qwen_scope.feature_name import parse_feature
from qwen_scope.steering.where import Where

How = Literal["add", "clamp", "scale", "ablate"]
"""What is written into the residual stream h, d being the feature's direction `W_dec[:, f]` and a its value as the SAE reads
it there (0 where it is not among the k kept; below 0 where an SAE of `topk` keeps such a value):

- `add`: `h + strength * d` (the report, section 3);
- `clamp`: `h + (strength - a) * d`, so that the feature contributes as if it had that value;
- `scale`: `h + (strength - 1) * a * d`; 0 takes the feature's contribution away, 2 doubles it;
- `ablate`: `h - (h · d) d / |d|²`, so that nothing along d is left, whatever wrote it (directional ablation).
"""
Unit = Literal["raw", "x"]
"""`raw`: strength in the SAE's own units of activation. `x`: times the highest activation of the feature (see
`qwen_scope.steering.maxima`)."""

_AMOUNT = re.compile(r"(?P<sign>[=*]?)(?P<number>[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)(?P<x>x?)", re.ASCII)
_SIGNS: dict[str, How] = {"": "add", "=": "clamp", "*": "scale"}
FIELDS = ("feature", "how", "strength", "unit", "where")


@dataclass(frozen=True)
class Edit:
    """One feature, what is done to it, and where."""

    layer: int
    """Which decoder layer, from 0."""
    number: int
    """Which feature of the layer."""
    how: How = "add"
    """See `How`."""
    strength: float = 1.0
    """How much: see `How`; no meaning for `ablate`."""
    unit: Unit = "raw"
    """What `strength` is counted in, for `add` and `clamp`; `scale` is a factor."""
    where: Where = Where()
    """Which tokens."""

    def __post_init__(self) -> None:
        if self.how not in get_args(How):
            raise QwenScopeError(
                f"expected a feature to be steered by {', '.join(get_args(How))}, found {self.how!r}; choose one of those"
            )
        if self.unit not in get_args(Unit):
            raise QwenScopeError(f"expected the unit 'raw' or 'x', found {self.unit!r}; choose one of the two")
        if isinstance(self.strength, bool) or not isinstance(self.strength, int | float):
            raise QwenScopeError(f"expected a number as strength of {self.name}, found {self.strength!r}; give one")
        # Not isfinite(), which cannot take an integer beyond the numbers that there are.
        if not abs(self.strength) <= sys.float_info.max:
            raise QwenScopeError(f"expected a finite strength of {self.name}, found {self.strength}; give a number")
        if self.unit == "x" and self.how in ("scale", "ablate"):
            raise QwenScopeError(
                f"expected the unit x with add or clamp, found it with {self.how} of {self.name}; leave the x out"
            )

    @property
    def name(self) -> str:
        """`layer/number`."""
        return f"{self.layer}/{self.number}"

    @staticmethod
    def parse(text: str) -> Edit:
        """Reads `feature[:amount][@where]`.

        The amount is `2` or `-2x` (add; with x, times the feature's maximum), `=5` or `=2x` (clamp), `*0.5` (scale) or
        `ablate`; left out it is `1x`. For what follows `@` see `Where.parse`; left out it is `all`.

        Raises:
            QwenScopeError: anything else.
        """
        rest, at, place = text.partition("@")
        feature, colon, amount = rest.partition(":")
        layer, number = parse_feature(feature)
        where = Where.parse(place) if at else Where()
        amount = amount.strip() if colon else "1x"
        if amount == "ablate":
            return Edit(layer, number, "ablate", where=where)
        match = _AMOUNT.fullmatch(amount)
        if match is None:
            raise QwenScopeError(
                f"expected how to steer {feature.strip()} as 2, -2x, =5, *0.5 or ablate, found {amount[:40]!r}; such as "
                f"{layer}/{number}:2x"
            )
        return Edit(layer, number, _SIGNS[match["sign"]], float(match["number"]), "x" if match["x"] else "raw", where)

    def __str__(self) -> str:
        sign = {"add": "", "clamp": "=", "scale": "*", "ablate": "ablate"}[self.how]
        number = "" if self.how == "ablate" else repr(float(self.strength)).removesuffix(".0")
        place = "" if self.where == Where() else f"@{self.where}"
        return f"{self.name}:{sign}{number}{'x' if self.unit == 'x' else ''}{place}"

    def to_dict(self) -> dict[str, Any]:
        """As plain values for JSON; `from_dict` reads them."""
        strength = {} if self.how == "ablate" else {"strength": self.strength, "unit": self.unit}
        return {"feature": self.name, "how": self.how, **strength, "where": str(self.where)}

    @staticmethod
    def from_dict(given: dict[str, Any]) -> Edit:
        """Reads what `to_dict` gives; all but `feature` may be left out.

        Raises:
            QwenScopeError: an unknown field, or one of another kind.
        """
        unknown = set(given) - set(FIELDS)
        if unknown or not isinstance(given.get("feature"), str):
            found = (
                f"the unknown {sorted(map(str, unknown))[0]!r}" if unknown else f"the feature {given.get('feature')!r}"
            )
            raise QwenScopeError(
                f"expected an edit with a feature such as '12/6159' and perhaps {', '.join(FIELDS[1:])}, found {found}; fix it"
            )
        layer, number = parse_feature(given["feature"])
        how, where = given.get("how", "add"), given.get("where", "all")
        if not isinstance(where, str):
            raise QwenScopeError(f"expected where as text such as 'prompt' or '0,3-7', found {where!r}; correct it")
        bare = how == "add" and "strength" not in given
        return Edit(
            layer,
            number,
            how,
            given.get("strength", 1.0),
            given.get("unit", "x" if bare else "raw"),
            Where.parse(where),
        )
