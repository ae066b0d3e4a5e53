"""A small sample of several kinds of text, for a first look without data of one's own. Written for this project."""

from collections.abc import Iterator
from dataclasses import replace

import torch

from qwen_scope.backbone import Backbone
from qwen_scope.features import SparseFeatures
from qwen_scope.outliers import norm_outliers
from qwen_scope.reading import read_rows
from qwen_scope.suite import Suite
from qwen_scope.tokens import tokenize

SAMPLE_TEXTS = [
    "The city council voted on Tuesday to close the old bridge for repairs until the spring. Engineers had found cracks "
    "in two of its steel supports during a routine inspection last month. Buses will be sent over the northern "
    "crossing, which adds about ten minutes to most journeys, and shopkeepers near the river fear for their trade.",
    "Photosynthesis turns light into chemical energy. In the leaves of a plant, chlorophyll absorbs mostly red and blue "
    "light; water is split, oxygen is given off, and the energy is stored in molecules that later build sugar out of "
    "carbon dioxide. Almost all food on Earth begins with this reaction.",
    'def moving_average(values, window):\n    """Mean of each run of `window` neighbouring values."""\n    if window < 1:\n'
    "        raise ValueError('window must be at least 1')\n    total = sum(values[:window])\n    means = [total / window]\n"
    "    for old, new in zip(values, values[window:]):\n        total += new - old\n        means.append(total / window)\n"
    "    return means\n",
    "User: My bread comes out flat and heavy. What am I doing wrong?\nAssistant: Most often the dough has not risen long "
    "enough, or the yeast is old. Let it stand in a warm place until it has doubled, and try a fresh packet of yeast. If "
    "that does not help, use a little less flour next time.\nUser: Thank you, I will try that tomorrow.",
    "She had kept the letter in the drawer for eleven years without opening it. On the morning of the funeral she took "
    "it out, turned it over twice, and laid it on the table beside the cold tea, as though it might speak first.",
    "La bibliothèque ouvre à neuf heures du matin et ferme à six heures du soir, sauf le dimanche. Les enfants peuvent "
    "emprunter cinq livres à la fois.",
    "Der Zug nach Hamburg fährt heute von Gleis sieben ab. Reisende werden gebeten, ihre Fahrkarten bereitzuhalten und "
    "auf die Ansagen zu achten.",
    "Write a short recipe for tomato soup. Use a list of ingredients first, then numbered steps, and keep it under "
    "one hundred words.\n\n"
    "Ingredients:\n- 1 kg ripe tomatoes\n- 1 onion\n- 2 cloves of garlic\n- salt, pepper, olive oil\n\n1. Fry the "
    "chopped onion and garlic gently in the oil.\n2. Add the tomatoes and simmer for twenty minutes.\n3. Blend, season "
    "and serve.",
    "If a train travels 180 kilometres in two and a half hours, its average speed is 180 / 2.5 = 72 kilometres an hour. "
    "At that speed it would need 100 / 72, or about 1.39 hours, for the next hundred kilometres.",
    "The tenant shall pay the rent in advance on the first day of each month. If any payment is more than fourteen days "
    "late, the landlord may terminate this agreement by written notice, without prejudice to any other remedy available "
    "under the applicable law.",
]
"""Ten texts: news, science, code, dialogue, fiction, French, German, instructions, arithmetic and law."""


@torch.no_grad()
def sample_features(backbone: Backbone, suite: Suite, layer: int) -> Iterator[SparseFeatures]:
    """The features of a layer at the tokens of the sample but position 0 and norm outliers, some texts at a time, on the CPU.

    Of a model with a short context, as much of each text as it can read.

    Raises:
        QwenScopeError: a model without a tokenizer.
    """
    whole, _ = tokenize(SAMPLE_TEXTS, backbone.tokenizer)
    texts = [replace(text, ids=text.ids[: backbone.context_length]) for text in whole]
    sae = suite[layer]
    for order, residuals in read_rows(texts, backbone, [layer]):
        x = residuals[layer]
        first = torch.zeros(len(x), dtype=torch.bool)
        first[torch.tensor([0, *(len(texts[text]) for text in order[:-1])]).cumsum(0)] = True
        kept = ~norm_outliers(x) & ~first.to(x.device)
        yield sae.encode(x[kept].to(sae.device)).to("cpu")
