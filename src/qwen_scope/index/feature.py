"""`Feature`: everything an index knows about one feature."""

from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple


class Token(NamedTuple):
    """A token of the vocabulary and what it has to do with a feature."""

    token: str
    """Its text."""
    id: int
    """Its number."""
    value: float
    """In `Feature.top_tokens`: the share of the feature's examples that peak at it. In `promoted` and `suppressed`: its logit
    effect."""


class Neighbour(NamedTuple):
    """Another feature of the same layer."""

    feature: int
    """Its number."""
    value: float
    """How near it is, see `Feature.similar` and `Feature.together`."""
    label: str | None = None
    """What it is about, if anybody has said so; not in the files, but looked up when a feature is read."""


@dataclass(frozen=True)
class Example:
    """A place in the corpus where a feature fires, with the tokens around it."""

    kind: Literal["top", "range"]
    """`top`: among its strongest. `range`: drawn at random from one part of its range of activations."""
    rank: int
    """From 0, strongest first, within the kind."""
    value: float
    """The feature's activation at the peak, the highest of its piece of text for `top`."""
    document: int
    """Which document of the corpus, in the order in which they were read, from 0."""
    position: int
    """The peak's position in the piece of text that the model read at once; 0 is never an example."""
    start: int
    """The peak token is characters [start, end) of the document (of its rendered text, for chat messages)."""
    end: int
    """See `start`."""
    window_start: int
    """The tokens shown are characters [window_start, window_end) of the document."""
    window_end: int
    """See `window_start`."""
    peak: int
    """Which of `tokens` is the peak."""
    tokens: list[str]
    """The peak and its surroundings, a text each."""
    values: list[float]
    """The feature's activation at each of them, 0 where it does not fire."""

    @property
    def text(self) -> str:
        """The tokens joined."""
        return "".join(self.tokens)


@dataclass(frozen=True)
class Label:
    """What somebody or some model says a feature is about."""

    text: str
    """The label."""
    by: str
    """`hand`, or the name of the model that wrote it."""
    score: float | None = None
    """How well the label tells held-out examples from others, see `qwen_scope.index.scoring`; None if not scored."""
    control: float | None = None
    """The same score with labels of other features in its place: what a label says beyond chance is the difference."""
    prompt: str | None = None
    """Version of the prompt that it was asked with."""
    time: str = ""
    """When it was written, ISO 8601."""


@dataclass(frozen=True, repr=False)
class Feature:
    """One feature. Statistics are over the corpus's kept tokens: neither at position 0 nor of extreme norm."""

    layer: int
    """Which decoder layer, from 0."""
    number: int
    """Which feature of the layer."""
    label: Label | None
    """What it is about, if anybody has said so; labels by hand come first."""
    fired: int
    """Kept tokens at which its value is above 0."""
    density: float
    """`fired` as a share of the kept tokens."""
    mean: float | None
    """Mean value where it fires; None if it never does, and so for the next two."""
    max: float | None
    """Highest value."""
    first_seen: int | None
    """How many tokens of the corpus came before the first at which it fires."""
    histogram: list[int]
    """Tokens at which it fires by value, in half octaves (see `qwen_scope.index.layout.HALF_OCTAVES`)."""
    dead: bool
    """It never fires."""
    always_on: bool
    """It fires at 90 % of the kept tokens or more."""
    top_tokens: list[Token]
    """Where its examples peak, most frequent first; `value` is the share of examples."""
    promoted: list[Token]
    """Tokens whose logits its direction raises most: `value` is the entry of `W_U (g * d)`, centred over the vocabulary, where
    d is the decoder direction, g the final norm's scale and W_U the unembedding. What later layers do with it is left out."""
    suppressed: list[Token]
    """Those whose logits it lowers most, lowest first."""
    similar: list[Neighbour]
    """Features of the nearest decoder directions; `value` is the cosine."""
    together: list[Neighbour]
    """Features that fire at the same tokens; `value` is the share of tokens at which both fire among those at which
    either does (Jaccard), over a sample of the tokens."""
    examples: list[Example]
    """Top examples, then those across the range of its activations."""

    @property
    def name(self) -> str:
        """`layer/number`."""
        return f"{self.layer}/{self.number}"

    @property
    def top(self) -> list[Example]:
        """The strongest examples."""
        return [example for example in self.examples if example.kind == "top"]

    @property
    def range(self) -> list[Example]:
        """Examples across the range of its activations, strongest first."""
        return [example for example in self.examples if example.kind == "range"]

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values for JSON."""
        plain = asdict(self)
        for field in ("top_tokens", "promoted", "suppressed", "similar", "together"):
            plain[field] = [item._asdict() for item in getattr(self, field)]
        return {"name": self.name, **plain}

    def __repr__(self) -> str:
        from qwen_scope.index.show import feature_text

        return feature_text(self)

    def _repr_html_(self) -> str:
        from qwen_scope.index.pages import feature_html

        return feature_html(self)
