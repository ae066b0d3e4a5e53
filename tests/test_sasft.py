"""SASFT's loss against a dense reference, and its trainer on tiny models of every architecture."""

import warnings

import pytest
import torch
from conftest import D_MODEL, make_tokenizer, random_sae
from datasets import Dataset
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import TrainerCallback

from qwen_scope.errors import QwenScopeError
from qwen_scope.finetuning.reduce import Rows
from qwen_scope.finetuning.restraints import Restrained, Restraints
from qwen_scope.finetuning.sasft_config import SASFTConfig
from qwen_scope.finetuning.sasft_trainer import TAGS, SASFTTrainer
from qwen_scope.suite import Suite

SENTENCES = [
    ("the capital of France is Paris", "en"),
    ("and Rome is the capital of Italy, the capital", "xx"),
    ("Paris", "en"),
    ("is the capital of Italy Rome and is the capital of France", "xx"),
    ("of France and of Italy", "en"),
]


@pytest.fixture
def restrained(suite) -> Restraints:
    """Features of two layers, one of them without a home, whose limits about half of the tokens exceed."""
    features = [
        Restrained("1/5", "xx", {"en": 0.3}),
        Restrained("1/77", "xx", {"en": -1.0}),
        Restrained("2/6", "", {"en": 0.1, "xx": 2.0}),
    ]
    return Restraints.of(features, suite, ["en", "xx"])


def dataset(sentences=SENTENCES) -> Dataset:
    return Dataset.from_list([{"text": text, "language": tag} for text, tag in sentences])


def config(folder, **options) -> SASFTConfig:
    given = {
        "output_dir": str(folder),
        "bf16": False,
        "use_cpu": True,
        "report_to": "none",
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "gradient_checkpointing": False,
        "logging_steps": 1.0,
        "save_strategy": "no",
        "reduce_weight": 1.0,
        "disable_tqdm": True,
        **options,
    }
    return SASFTConfig(**given)


def trainer(model, folder, restraints, suite, peft_config=None, data=None, **options) -> SASFTTrainer:
    return SASFTTrainer(
        model,
        config(folder, **options),
        restraints=restraints,
        suite=suite,
        train_dataset=data or dataset(),
        processing_class=make_tokenizer(),
        peft_config=peft_config,
    )


def lora(**options):
    from peft import LoraConfig

    return LoraConfig(**{"r": 2, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **options})


def test_loss_and_gradient_agree_with_the_dense_dictionary():
    suite = Suite.of({0: random_sae(seed=3)})
    restraints = Restraints.of(
        [Restrained("0/3", "xx", {"en": 0.2}), Restrained("0/100", "yy", {"en": -2.0, "xx": 1.0})], suite
    )
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 7, D_MODEL, generator=generator, dtype=torch.float64, requires_grad=True)
    tags = torch.randint(0, 3, (3, 7), generator=generator)
    counted = torch.rand(3, 7, generator=generator) < 0.7
    found = Rows.of(restraints, suite)[0].excess(x, tags, counted)
    found.total.backward()
    gradient, x.grad = x.grad, None

    sae = suite[0]
    dense = x @ sae.W_enc.double().T + sae.b_enc.double()
    total = torch.zeros((), dtype=torch.float64)
    above = pairs = 0
    for feature, limits in ((3, {"en": 0.2}), (100, {"en": -2.0, "xx": 1.0})):
        for row, token in counted.nonzero().tolist():
            limit = limits.get(restraints.tags[tags[row, token]])
            if limit is not None:
                pairs += 1
                above += int(dense[row, token, feature] > limit)
                # The limits are kept in float32, as the weights.
                total = total + functional.relu(dense[row, token, feature] - float(torch.tensor(limit)))
    total.backward()
    assert torch.allclose(found.total, total, rtol=1e-12)
    assert torch.allclose(gradient, x.grad, rtol=1e-10, atol=1e-12)
    assert (int(found.above), int(found.pairs)) == (above, pairs)
    assert 0 < above < pairs


def test_norm_outliers_add_nothing():
    suite = Suite.of({0: random_sae(seed=3)})
    rows = Rows.of(Restraints.of([Restrained("0/3", "xx", {"en": -50.0})], suite), suite)[0]
    x = torch.randn(2, 9, D_MODEL, generator=torch.Generator().manual_seed(1))
    tags, counted = torch.ones(2, 9, dtype=torch.long), torch.ones(2, 9, dtype=torch.bool)  # tag 1 is en
    without = counted.clone()
    without[1, 4] = False
    expected = rows.excess(x, tags, without)
    x[1, 4] *= 40
    found = rows.excess(x, tags, counted)
    assert torch.equal(found.total, expected.total)
    assert found.pairs == expected.pairs == 17
    assert counted.all(), "what the caller gave is unchanged"
    # One that does not count is no yardstick either.
    x[:, :8] *= 40
    last = torch.zeros(2, 9, dtype=torch.bool)
    last[:, 8] = True
    assert rows.excess(x, tags, last).pairs == 2


def dense_reference(model, suite, restraints, batch, tokens) -> torch.Tensor:
    """L_reduce from the whole dictionaries in float64, on the residuals that transformers gives."""
    given = {name: batch[name] for name in ("input_ids", "attention_mask", "position_ids") if name in batch}
    states = model(**given, output_hidden_states=True).hidden_states
    counted = batch["labels"] != -100
    counted[:, 0] = False
    total = torch.zeros((), dtype=torch.float64)
    for feature in restraints.features:
        sae = suite[feature.layer]
        # The last entry is after the final norm: only layers before it are read so.
        pre = states[feature.layer + 1].double() @ sae.W_enc.double().T + sae.b_enc.double()
        for tag, limit in feature.limits.items():
            held = counted & (batch[TAGS] == restraints.tags.index(tag))
            total = total + functional.relu(pre[..., feature.number] - float(torch.tensor(limit)))[held].sum()
    return total / (tokens * len(restraints.features))


@pytest.mark.parametrize("way", ["padded", "padding-free", "packed"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_step_agrees_with_the_dense_dictionary(make_model, suite, tmp_path, way, checkpointing):
    options = {
        "padded": {},
        "padding-free": {"padding_free": True, "max_length": None},
        "packed": {"packing": True, "max_length": 48, "per_device_train_batch_size": 1},
    }[way]
    restraints = Restraints.of(
        [Restrained("0/5", "xx", {"en": 0.3}), Restrained("1/77", "", {"en": -1.0, "xx": 0.5})], suite, ["en", "xx"]
    )
    model = make_model("llama").double()
    with warnings.catch_warnings():
        # TRL would rather have FlashAttention for rows without padding; sdpa's mask keeps texts apart too.
        warnings.filterwarnings("ignore", message=".*[Ff]lash.*")
        tuned = trainer(model, tmp_path, restraints, suite, gradient_checkpointing=checkpointing, **options)
    batch = next(iter(tuned.get_train_dataloader()))
    model.train()
    found = {}
    for weight in (0.0, 1.0):
        tuned.args.reduce_weight = weight
        model.zero_grad()
        tuned.compute_loss(model, dict(batch), num_items_in_batch=torch.tensor(40)).backward()
        found[weight] = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model.gradient_checkpointing_disable()
    dense_reference(model, suite, restraints, batch, 40).backward()
    expected = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert expected["model.layers.0.mlp.down_proj.weight"].abs().max() > 0
    for name, gradient in found[1.0].items():
        difference = gradient - found[0.0][name]
        wanted = expected.get(name)
        wanted = torch.zeros_like(difference) if wanted is None else wanted
        assert torch.allclose(difference, wanted, rtol=1e-5, atol=1e-6), name


class Widest(TorchDispatchMode):
    """Remembers every size that a tensor had."""

    def __init__(self):
        super().__init__()
        self.sizes: set[int] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for each in result if isinstance(result, tuple | list) else [result]:
            if isinstance(each, torch.Tensor):
                self.sizes |= set(each.shape)
        return result


def test_no_tensor_is_as_wide_as_the_dictionary(make_model, tmp_path):
    suite = Suite.of({1: random_sae(d_sae=997)})
    restraints = Restraints.of([Restrained("1/990", "xx", {"en": -1.0})], suite, ["en", "xx"])
    model = make_model("llama")
    tuned = trainer(model, tmp_path, restraints, suite)
    batch = next(iter(tuned.get_train_dataloader()))
    with Widest() as widest:
        tuned.compute_loss(model, batch).backward()
    assert 32 in widest.sizes
    assert 997 not in widest.sizes


def test_loss_does_not_depend_on_how_a_batch_is_cut(make_model, suite, restrained, tmp_path):
    model = make_model("llama")
    tuned = trainer(model, tmp_path, restrained, suite, per_device_train_batch_size=4)
    rows = [tuned.train_dataset[at] for at in range(4)]
    model.train()
    tokens = torch.tensor(sum(len(row["input_ids"]) - 1 for row in rows))

    def loss(some) -> float:
        return tuned.compute_loss(model, tuned.data_collator(some), num_items_in_batch=tokens).item()

    assert loss(rows) == pytest.approx(sum(loss([row]) for row in rows), rel=1e-5)


@pytest.mark.parametrize("adapters", [False, True], ids=["full", "lora"])
def test_trains_every_architecture(make_model, architecture, restrained, suite, tmp_path, adapters):
    if architecture == "qwen3.5-vl":
        pytest.skip("TRL asks for a processor of images")
    if architecture in ("gpt2", "gpt-neox") and adapters:
        target = {"target_modules": ["c_attn" if architecture == "gpt2" else "query_key_value"]}
        target |= {"fan_in_fan_out": architecture == "gpt2"}
    elif adapters and architecture.endswith("moe"):
        # The experts are no linear layers of PEFT's.
        target = {"target_modules": ["q_proj", "o_proj", "out_proj"]}
    else:
        target = {}
    tuned = trainer(
        make_model(architecture), tmp_path, restrained, suite, lora(**target) if adapters else None, learning_rate=1e-2
    )
    before = {name: p.detach().clone() for name, p in tuned.model.named_parameters() if p.requires_grad}
    tuned.train()
    rows = [row for row in tuned.state.log_history if "loss" in row]
    assert len(rows) == 2
    assert rows[0]["reduce_loss"] > 0
    assert 0 < rows[0]["above_limit"] <= 1
    if tuned._loss_shifts_labels:
        # Of other models transformers counts a token too many in each row, and TRL's loss is that much smaller.
        for row in rows:
            assert row["loss"] - row["reduce_loss"] - row["sft_loss"] == pytest.approx(0, abs=2e-3)
    changed = [
        name for name, p in tuned.model.named_parameters() if p.requires_grad and not torch.equal(p, before[name])
    ]
    assert any("layers.0" in name or "h.0" in name for name in changed), changed


def test_features_go_down_where_they_are_held_and_nowhere_else(make_model, suite, tmp_path):
    restraints = Restraints.of([Restrained("1/5", "xx", {"en": -3.0})], suite, ["en", "xx"])
    logs = {}
    for weight in (0.0, 5.0):
        tuned = trainer(
            make_model("llama"), tmp_path, restraints, suite, reduce_weight=weight, max_steps=20, learning_rate=3e-3
        )
        tuned.train()
        logs[weight] = [row["reduce_loss"] for row in tuned.state.log_history if "reduce_loss" in row]
    assert logs[5.0][0] == pytest.approx(logs[0.0][0], rel=1e-4)
    assert logs[5.0][-1] < 0.5 * logs[5.0][0]
    assert logs[5.0][-1] < 0.7 * logs[0.0][-1]


def test_evaluation_and_conversations_and_completions(make_model, restrained, suite, tmp_path):
    talk = [{"role": "user", "content": "capital?"}, {"role": "assistant", "content": "Rome"}]
    for rows in (
        [{"messages": talk, "language": tag} for tag in ("en", "xx", "en")],
        [{"prompt": "the capital of ", "completion": "Italy is Rome", "language": tag} for tag in ("en", "xx")],
    ):
        data = Dataset.from_list(rows)
        tuned = SASFTTrainer(
            make_model("llama"),
            config(tmp_path),
            restraints=restrained,
            suite=suite,
            train_dataset=data,
            eval_dataset=data,
            processing_class=make_tokenizer(),
        )
        tuned.train()
        found = tuned.evaluate()
        assert found["eval_reduce_loss"] > 0
        assert found["eval_sft_loss"] > 0
    batch = next(iter(tuned.get_train_dataloader()))
    assert (batch["labels"] == -100).any()


def test_token_penalty_lowers_the_probability(make_model, restrained, suite, tmp_path):
    masses = {}
    for weight in (1e-6, 50.0):
        tuned = SASFTTrainer(
            make_model("llama"),
            config(tmp_path, reduce_weight=0.0, token_penalty=weight, max_steps=10, learning_rate=3e-3),
            restraints=restrained,
            suite=suite,
            penalised_tokens=range(50, 150),
            train_dataset=dataset(),
            processing_class=make_tokenizer(),
        )
        tuned.train()
        masses[weight] = [row["penalised_mass"] for row in tuned.state.log_history if "penalised_mass" in row]
    assert masses[1e-6][0] == pytest.approx(masses[50.0][0], rel=1e-3)
    assert masses[50.0][-1] < 0.8 * masses[1e-6][-1]


def test_a_weight_that_does_next_to_nothing_is_told_once(make_model, restrained, suite, tmp_path, caplog):
    for weight in (1e-4, 1.0):
        caplog.clear()
        tuned = trainer(make_model("llama"), tmp_path, restrained, suite, reduce_weight=weight)
        tuned.train()
        told = [record.message for record in caplog.records if "nearly plain fine-tuning" in record.message]
        assert len(told) == (weight == 1e-4)
    caplog.clear()
    first = next(row for row in tuned.state.log_history if "reduce_loss" in row)
    assert first["reduce_loss"] > 0.01 * first["sft_loss"]


def test_a_penalty_needs_logits_of_the_head_alone(make_model, restrained, suite, tmp_path):
    model = make_model("llama")
    model.config.final_logit_softcapping = 30.0
    with pytest.raises(QwenScopeError, match=r"found final_logit_softcapping = 30\.0"):
        SASFTTrainer(
            model,
            config(tmp_path, token_penalty=1.0),
            restraints=restrained,
            suite=suite,
            penalised_tokens=range(50, 150),
            train_dataset=dataset(),
            processing_class=make_tokenizer(),
        )


def test_an_sft_config_is_taken(make_model, restrained, suite, tmp_path, monkeypatch, unchecked):
    from trl import SFTConfig

    monkeypatch.chdir(tmp_path)
    given = SFTConfig(str(tmp_path), bf16=False, use_cpu=True, report_to="none", learning_rate=7e-6, max_length=99)
    tuned = SASFTTrainer(
        make_model("llama"),
        given,
        restraints=restrained,
        suite=suite,
        train_dataset=dataset(),
        processing_class=make_tokenizer(),
    )
    assert isinstance(tuned.args, SASFTConfig)
    assert (tuned.args.learning_rate, tuned.args.max_length, tuned.args.reduce_weight) == (7e-6, 99, 5e-4)


def refused(sentence, make, **options):
    with pytest.raises(QwenScopeError) as error:
        make(**options)
    assert sentence in str(error.value)
    assert str(error.value).startswith("expected ")


def test_what_cannot_be_is_refused_in_a_sentence(make_model, restrained, suite, tmp_path):
    def make(model=None, restraints=restrained, suite=suite, peft_config=None, data=None, tokenizer=None, **options):
        SASFTTrainer(
            model or make_model("llama"),
            config(tmp_path, **options),
            restraints=restraints,
            suite=suite,
            train_dataset=data or dataset(),
            processing_class=tokenizer or make_tokenizer(),
            peft_config=peft_config,
        )

    refused("no tag at sample 1", make, data=dataset([("Paris", "en"), ("Rome", None)]))
    refused("the tag 'de' at sample 0", make, data=dataset([("Paris", "de"), ("Rome", "en")]))
    refused("a column 'language'", make, data=dataset().remove_columns("language"))
    refused("found only xx", make, data=dataset([("Rome", "xx")]), restraints=only_on_english(suite))
    other = Suite.of({layer: random_sae(seed=9 + layer) for layer in range(3)}, name="other")
    refused("other, which has other weights", make, suite=other)
    refused("tiny, which lacks layer 2", make, suite=Suite.of({1: random_sae(seed=1)}, name="tiny"))
    refused("all are frozen", make, peft_config=lora(target_modules=["q_proj"], layers_to_transform=[2]))
    frozen = make_model("llama")
    for name, parameter in frozen.named_parameters():
        parameter.requires_grad_("layers.2" in name or "norm" in name.split(".")[1])
    refused("the features 1/5, 1/77 read", make, model=frozen)
    for option in ({"torch_compile": True}, {"dataset_kwargs": {"skip_prepare_dataset": True}}):
        refused("options that SASFT can follow", make, **option)
    named = dataset().rename_column("language", "labels")
    refused("found tag_column = 'labels'", make, data=named, tag_column="labels")
    refused("penalised_tokens", make, token_penalty=1.0)
    refused("reduce_weight of 0 or more", make, reduce_weight=-1.0)
    refused("max_length with packing", make, packing=True, max_length=None)


def only_on_english(suite) -> Restraints:
    return Restraints.of([Restrained("1/5", "xx", {"en": 0.0})], suite)


def test_another_tokenizer_is_refused(make_model, suite, tmp_path):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    measured = Restraints.of([Restrained("1/5", "xx", {"en": 0.0})], suite, tokenizer=make_tokenizer())
    vocabulary = {"<unk>": 0, "Paris": 1, "</s>": 2}
    other = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>")), eos_token="</s>", pad_token="</s>"
    )
    data = dataset()
    with pytest.raises(QwenScopeError, match="the tokenizer that the limits of 1/5 were measured with"):
        SASFTTrainer(
            make_model("llama"),
            config(tmp_path),
            restraints=measured,
            suite=suite,
            train_dataset=data,
            processing_class=other,
        )
    larger = make_tokenizer()
    larger.add_tokens([f"<more-{n}>" for n in range(100)])
    with pytest.raises(QwenScopeError, match="a tokenizer whose ids are below 320"):
        SASFTTrainer(
            make_model("llama"),
            config(tmp_path),
            restraints=measured,
            suite=suite,
            train_dataset=data,
            processing_class=larger,
        )


def test_nobody_is_told_that_a_trainer_was_made(make_model, restrained, suite, tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr("trl.trainer.base_trainer.send_telemetry", lambda *args, **rest: told.append(args))
    monkeypatch.delenv("CI", raising=False)
    with warnings.catch_warnings():
        # Nor is the user of what only TRL and PEFT could change.
        warnings.simplefilter("error", FutureWarning)
        trainer(make_model("llama"), tmp_path, restrained, suite, lora())
    assert not told


def test_prompt_learning_is_refused(make_model, restrained, suite, tmp_path):
    from peft import PromptTuningConfig

    with pytest.raises(QwenScopeError, match="PROMPT_TUNING"):
        trainer(
            make_model("llama"),
            tmp_path,
            restrained,
            suite,
            PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
        )


def test_a_step_without_label_tokens_has_no_loss(make_model, restrained, suite, tmp_path):
    model = make_model("llama").train()
    tuned = trainer(model, tmp_path, restrained, suite)
    batch = next(iter(tuned.get_train_dataloader()))
    batch["labels"] = torch.full_like(batch["labels"], -100)
    assert tuned.compute_loss(model, batch, num_items_in_batch=torch.tensor(0)).item() == 0
    tuned.train_dataset = tuned.train_dataset.map(lambda row: {"labels": [-100] * len(row["input_ids"])})
    tuned.train()
    assert all(row["reduce_loss"] == 0 for row in tuned.state.log_history if "reduce_loss" in row)


class Spoil(TrainerCallback):
    """Makes a weight infinite after a step, as a bad update would."""

    def __init__(self, at: int):
        self.at = at

    def on_step_end(self, args, state, control, model=None, **rest):
        if state.global_step == self.at:
            with torch.no_grad():
                model.get_input_embeddings().weight.fill_(float("inf"))


def test_a_loss_that_is_no_number_stops_at_the_last_good_checkpoint(make_model, restrained, suite, tmp_path):
    tuned = trainer(
        make_model("llama"), tmp_path, restrained, suite, max_steps=6, save_strategy="steps", save_steps=2.0
    )
    tuned.add_callback(Spoil(3))
    with pytest.raises(QwenScopeError, match=r"expected a finite loss, found nan in step 4.*checkpoint-2"):
        tuned.train()
