"""What `qwen-scope demo` shows."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qwen_scope.scope import Scope
    from qwen_scope.text_features import TextFeatures

SENTENCES = [
    "The capital of France is Paris, on the river Seine.",
    "def area(radius):\n    return 3.14159 * radius ** 2",
    "Bonjour, je voudrais deux billets pour le train de Lyon.",
]
LAYER = 15


def demo(scope: "Scope") -> None:
    """Reads three sentences, shows the features of each and those that set it apart, and says what to try next."""
    print(f"{scope.backbone}\n{scope.suite}\n")
    results = scope.features(SENTENCES)
    print(f"Layer {LAYER}, the three strongest features at each token of the first sentence:\n")
    print(results[0][LAYER].top(3))
    print(
        "\nPosition 0 is an attention sink: its values mean little and are left out below.\n\n"
        f"The features of layer {LAYER} that fire most in one of the sentences and nowhere in the others:"
    )
    for i, result in enumerate(results):
        others = [other for j, other in enumerate(results) if j != i]
        print(f"\n  {result.text!r}")
        for name, value, at in own_features(result, others):
            print(f"    {name:<10} {value:8.2f}  at {result.tokens[at]!r}")
    print(
        "\nNext:\n"
        '  qwen-scope features "any text of yours" --layer 15 --top 5   features of each token; --json for programs\n'
        '  qwen-scope search "football match" --layer 15                which features are about something\n'
        "  qwen-scope show 15/123                                       what a feature does\n"
        "  qwen-scope check                                             how faithful the SAEs are, in figures\n"
        "  qwen-scope suites                                            the published suites for Qwen3 and Qwen3.5\n"
        '  qwen-scope features "…" --suite qwen3.5-2b-k50 --layer 12    the same on Qwen3.5-2B (downloads it)\n'
        "and in Python:\n"
        "  from qwen_scope import Scope\n"
        "  scope = Scope.from_pretrained()\n"
        '  scope.features("any text of yours")[15].top(5)'
    )


def own_features(result: "TextFeatures", others: "list[TextFeatures]", n: int = 4) -> list[tuple[str, float, int]]:
    """The strongest features of a text that fire nowhere in the others, position 0 left out everywhere."""
    elsewhere = {name for other in others for name, _, _ in other[LAYER].strongest(other[LAYER].d_sae)}
    found = result[LAYER].strongest(result[LAYER].d_sae)
    return [feature for feature in found if feature[0] not in elsewhere][:n]
