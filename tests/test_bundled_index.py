"""The feature index that comes with the package: it is of the bundled suite, and answers what the README asks it."""

import pytest

from qwen_scope.fingerprint import fingerprint
from qwen_scope.index import FeatureIndex
from qwen_scope.index.feature_index import bundled_folder
from qwen_scope.suite import Suite


@pytest.fixture(scope="module")
def index() -> FeatureIndex:
    return FeatureIndex.open()


def test_it_is_of_the_bundled_suite(index):
    suite = Suite.from_pretrained()
    assert index.about.layers == {layer: suite[layer].d_sae for layer in suite}
    assert index.about.fingerprint == fingerprint(suite, index.layers)
    assert (index.about.k, index.about.activation, index.about.model) == (suite.k, suite.activation, "bundled")


def test_it_is_small_and_names_no_machine(index):
    assert sum(path.stat().st_size for path in bundled_folder().rglob("*")) < 20e6
    assert index.about.corpus == "corpus/index"
    assert not [
        row for row in index.sql("SELECT place FROM documents").to_pylist() if "corpus/index/" not in row["place"]
    ]


@pytest.mark.parametrize("layer", [7, 15, 23])
def test_its_figures_hang_together(index, layer):
    table = index.table(layer).to_pydict()
    # Some tokens have fewer than k positive pre-activations.
    assert 0.98 * index.about.k < sum(table["density"]) <= index.about.k
    assert [sum(counts) for counts in table["histogram"]] == table["fired"]
    assert sum(table["dead"]) < 0.05 * len(table["dead"])
    assert all(mean <= highest * (1 + 1e-6) for mean, highest in zip(table["mean"], table["max"], strict=True) if mean)
    assert all(example.value <= index[layer, 100].max for example in index[layer, 100].examples)


@pytest.mark.parametrize(
    ("query", "words"),
    [
        (
            "football match",
            {"football", "match", "game", "team", "player", "sport", "league", "goal", "ball", "cup", "season"},
        ),
        ("#", {"#"}),
    ],
)
def test_the_questions_of_the_readme_have_answers(index, query, words):
    hits = index.search(query, layers=15, count=5)
    assert len(hits) == 5
    texts = [" ".join(example.text for example in index[hit.name].examples).lower() for hit in hits]
    assert sum(any(word in text for word in words) for text in texts) >= 4


@pytest.mark.real
def test_its_examples_are_what_the_model_does(index):
    """A top example's own text, read again with less before it, fires the same feature at the same token."""
    again = 0
    for number in range(0, 3000, 150):
        for example in index[15, number].top[:1]:
            found = index.scope.features(example.text, layers=15)[15]
            fires = found.activation(number)
            again += bool(len(fires)) and float(fires.max()) > 0.3 * example.value
    assert again >= 10


@pytest.mark.real
def test_features_of_french_are_found_by_example(index):
    french = ["Il fait froid ce matin.", "Elle lit un livre dans le jardin.", "Nous avons mangé du pain et du fromage."]
    english = ["It is cold this morning.", "She reads a book in the garden.", "We ate some bread and cheese."]
    best = index.find(french, english, layers=15, count=1)[0]
    other = index.scope.features(["Je voudrais deux billets pour le train.", "I would like two tickets for the train."])
    fires = [float((text[15].activation(int(best.name.split("/")[1]))[1:] > 0).float().mean()) for text in other]
    assert fires[0] > fires[1]
