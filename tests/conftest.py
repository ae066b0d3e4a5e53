"""What the tests share: tiny random language models of every architecture, a tiny tokenizer, random SAEs.

Nothing here needs a network. The one large thing, `bundled`, is the package's own model; tests that use it are marked
`real`.
"""

import os
from collections.abc import Callable

import hypothesis
import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported, which transformers does
import transformers
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel, PreTrainedTokenizerFast

from qwen_scope.backbone import Backbone
from qwen_scope.sae import Activation, TopKSAE
from qwen_scope.suite import Suite

transformers.logging.set_verbosity_error()
# The same examples in every run, and no time limit on a busy machine.
hypothesis.settings.register_profile(
    "tests",
    derandomize=True,
    deadline=None,
    database=None,
    max_examples=60,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("tests")
# The tensors here are small: a second thread costs more than it gives.
torch.set_num_threads(1)

VOCABULARY = 320
D_MODEL = 32
# A large initialisation, so that layers really change the residual stream and mistakes show.
SHARED = {
    "vocab_size": VOCABULARY,
    "hidden_size": D_MODEL,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
DENSE = {**SHARED, "num_hidden_layers": 3, "intermediate_size": 64}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
# Layers 0 to 2 have linear attention, layer 3 full attention.
HYBRID = {
    **SHARED,
    "num_hidden_layers": 4,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
# As many blocks as the decoder has layers, so that finding the wrong ones is possible.
VISION = {
    "depth": 4,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_heads": 2,
    "out_hidden_size": D_MODEL,
    "num_position_embeddings": 16,
}
NEOX = {key: value for key, value in DENSE.items() if key not in ("num_key_value_heads", "head_dim")}
GPT2 = {
    "vocab_size": VOCABULARY,
    "n_embd": D_MODEL,
    "n_layer": 3,
    "n_head": 4,
    "n_positions": 256,
    "initializer_range": 0.2,
    "bos_token_id": 0,
    "eos_token_id": 1,
}

CONFIGS: dict[str, Callable[[], transformers.PreTrainedConfig]] = {
    "qwen3": lambda: transformers.Qwen3Config(**DENSE),
    "qwen3-moe": lambda: transformers.Qwen3MoeConfig(**DENSE, **EXPERTS),
    "qwen3.5": lambda: transformers.Qwen3_5TextConfig(**HYBRID, intermediate_size=64),
    "qwen3.5-moe": lambda: transformers.Qwen3_5MoeTextConfig(**HYBRID, **EXPERTS, shared_expert_intermediate_size=32),
    "qwen3.5-vl": lambda: transformers.Qwen3_5Config(
        text_config={**HYBRID, "intermediate_size": 64}, vision_config=VISION
    ),
    "llama": lambda: transformers.LlamaConfig(**DENSE),
    "gemma3": lambda: transformers.Gemma3TextConfig(**DENSE, sliding_window=4, layer_types=GEMMA_LAYERS),
    "gpt2": lambda: transformers.GPT2Config(**GPT2),
    "gpt-neox": lambda: transformers.GPTNeoXConfig(**NEOX),
}
GEMMA_LAYERS = ["sliding_attention", "full_attention", "sliding_attention"]
ARCHITECTURES = list(CONFIGS)

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message.role not in ('system', 'user', 'assistant') %}{{ raise_exception('unknown role') }}{% endif %}"
    "<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}"
    # As Qwen's: thinking is looked at only where the assistant's turn is opened.
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
SPECIAL = ["<|bos|>", "<|im_end|>", "<|pad|>", "<|im_start|>"]


@pytest.fixture
def unchecked(monkeypatch):
    """Turns off the run-time check of shapes, which only tests have, so that wrong arguments meet what users meet."""
    monkeypatch.setattr("jaxtyping.config.jaxtyping_disable", True)


def pytest_collection_modifyitems(items):
    for item in items:
        if "bundled" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.real)


def build(config: transformers.PreTrainedConfig) -> PreTrainedModel:
    wrapped = isinstance(config, transformers.Qwen3_5Config)
    auto = AutoModelForImageTextToText if wrapped else AutoModelForCausalLM
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return auto.from_config(config).eval()


@pytest.fixture(scope="session")
def make_model() -> Callable[..., PreTrainedModel]:
    """A new tiny model of an architecture, always with the same weights."""
    return lambda architecture: build(CONFIGS[architecture]())


@pytest.fixture(scope="session", params=ARCHITECTURES)
def architecture(request) -> str:
    return request.param


@pytest.fixture(scope="session")
def model(architecture) -> PreTrainedModel:
    """One tiny model of each architecture; not to be changed."""
    return build(CONFIGS[architecture]())


@pytest.fixture(scope="session")
def llama() -> PreTrainedModel:
    """The tiny model for tests that do not depend on the architecture; not to be changed."""
    return build(CONFIGS["llama"]())


def make_tokenizer(**options) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with Qwen's normaliser, of as many tokens as the tiny models know."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(["the capital of France is Paris, and the capital of Italy is Rome"] * 4, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=SPECIAL[0],
        eos_token=SPECIAL[1],
        pad_token=SPECIAL[2],
        additional_special_tokens=SPECIAL[3:],
        **{"chat_template": CHAT_TEMPLATE, **options},
    )


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


@pytest.fixture(scope="session")
def make_tokenizer_with() -> Callable[..., PreTrainedTokenizerFast]:
    """A new tokenizer with other options of `PreTrainedTokenizerFast`."""
    return make_tokenizer


def random_sae(
    d_model: int = D_MODEL, d_sae: int = 128, k: int = 8, activation: Activation = "topk", seed: int = 0
) -> TopKSAE:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((d_sae, d_model), (d_model, d_sae), (d_sae,), (d_model,))
    return TopKSAE(*(torch.randn(shape, generator=generator) for shape in shapes), k=k, activation=activation)


@pytest.fixture(scope="session")
def make_sae() -> Callable[..., TopKSAE]:
    return random_sae


@pytest.fixture(scope="session")
def suite() -> Suite:
    """Random SAEs for every layer of the tiny models with three layers."""
    return Suite.of({layer: random_sae(seed=layer) for layer in range(3)}, name="tiny suite")


@pytest.fixture(scope="session")
def bundled() -> Backbone:
    """The model that comes with the package; whoever uses it is marked `real`."""
    return Backbone.from_pretrained()


@pytest.fixture(scope="session")
def app(bundled, tmp_path_factory):
    """The web app on the bundled model: an `app_browser.App`."""
    app_browser = pytest.importorskip("app_browser", reason="the web app's packages are not installed")
    with app_browser.served(bundled, tmp_path_factory.mktemp("labels")) as served:
        yield served


@pytest.fixture(scope="module")
def chromium():
    """A headless browser, of one module: while it runs, no other event loop can run in this thread."""
    app_browser = pytest.importorskip("app_browser", reason="the web app's packages are not installed")
    with app_browser.chromium() as browser:
        yield browser


@pytest.fixture
def visit(app, chromium):
    """Opens the app as a new visitor; `visit("#tab=compare", color_scheme="dark")`. Gives the page, closed with the test."""
    import app_browser

    pages = []

    def visited(link: str = "", **context):
        pages.append(app_browser.opened(chromium, f"{app.address}/{link}", **context))
        return pages[-1]

    yield visited
    for page in pages:
        app_browser.closed(page)
