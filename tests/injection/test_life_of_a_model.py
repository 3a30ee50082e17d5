"""What happens to a model after its injection: it stays fused and exact, or says why not."""

import copy
import functools
import gc
import io
import pickle
import weakref

import pytest
import torch
from families import batch, tiny_model
from lives import adapted, assert_fused_and_exact, injected_pair, step
from torch import nn
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from liger_trainer import inject, restore
from liger_trainer.injection.walk import is_injected

WARNED = "liger_trainer"


def resize(model):
    torch.manual_seed(3)
    model.resize_token_embeddings(140)


def load(model):
    torch.manual_seed(3)
    model.load_state_dict({n: torch.randn_like(t) * 0.1 for n, t in model.state_dict().items()})


def load_by_assignment(model):
    torch.manual_seed(3)
    state = {n: torch.randn_like(t) * 0.1 for n, t in model.state_dict().items()}
    model.load_state_dict(state, assign=True)


def another_weight(model):
    torch.manual_seed(3)
    model.lm_head.weight = nn.Parameter(0.1 * torch.randn(128, 64))


def another_head(model):
    torch.manual_seed(3)
    model.lm_head = nn.Linear(64, 128, bias=True)


def another_output_embedding(model):
    torch.manual_seed(3)
    model.set_output_embeddings(nn.Linear(64, 128, bias=False))


def tie(model):
    model.config.tie_word_embeddings = True
    model._tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    model.lm_head.weight = model.model.embed_tokens.weight
    model.tie_weights()
    assert model.lm_head.weight is model.model.embed_tokens.weight


def half(model):
    model.double()


def frozen(model):
    model.lm_head.requires_grad_(False)


def added_bias(model):
    model.lm_head.bias = nn.Parameter(torch.linspace(-1, 1, 128))


CHANGES = [
    resize, load, load_by_assignment, another_weight, another_head, another_output_embedding, tie,
    half, frozen, added_bias,
]  # fmt: skip


@pytest.mark.parametrize("tied", [False, True], ids=["", "tied"])
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_changed_model_stays_fused_and_exact(change, tied, caplog):
    model, plain, report = injected_pair(tie_word_embeddings=tied)
    inputs = batch()
    step(model, inputs)  # used before and after
    for each in (model, plain):
        change(each)
    assert_fused_and_exact(model, plain, inputs)
    assert not report.refused
    assert not [r for r in caplog.records if r.name.startswith(WARNED)]


# --- adapters -------------------------------------------------------------------------------------


HEADS = {
    "attention only": {"target_modules": ["q_proj"]},
    "head": {},
    "saved head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
}


@pytest.mark.parametrize("settings", HEADS.values(), ids=HEADS.keys())
def test_the_life_of_an_adapter_that_came_after_the_injection(settings):
    import peft

    model, plain, _ = injected_pair()
    model, plain = (adapted(m, **settings) for m in (model, plain))
    inputs = batch()
    assert_fused_and_exact(model, plain, inputs)
    for each in (model, plain):
        torch.manual_seed(2)
        second = {**settings, "r": 2, "task_type": "CAUSAL_LM", "init_lora_weights": False}
        second.setdefault("target_modules", ["q_proj", "lm_head"])
        each.add_adapter("second", peft.LoraConfig(**second))
        each.set_adapter("second")
    assert_fused_and_exact(model, plain, inputs)
    for each in (model, plain):
        each.set_adapter("default")
    assert_fused_and_exact(model, plain, inputs)
    with torch.no_grad(), model.disable_adapter(), plain.disable_adapter():
        got, expected = model(**inputs), plain(**inputs)
        torch.testing.assert_close(got.loss, expected.loss)
        assert got.logits._value is None
    if "modules_to_save" not in settings:
        for each in (model, plain):
            each.merge_adapter()
        torch.testing.assert_close(model(**inputs).loss, plain(**inputs).loss)
        for each in (model, plain):
            each.unmerge_adapter()
        assert_fused_and_exact(model, plain, inputs)
    merged = [each.merge_and_unload() for each in (model, plain)]
    for each in merged:
        each.requires_grad_(True)
    assert_fused_and_exact(*merged, inputs)
    restore(merged[0])
    assert not is_injected(merged[0])


def test_unloading_an_adapter_gives_back_a_fused_model():
    model, plain, _ = injected_pair()
    unloaded = []
    for each in (adapted(model), adapted(plain)):
        step(each, batch())
        unloaded.append(each.unload().requires_grad_(True))
    assert_fused_and_exact(*unloaded, batch())


# --- copies and files -----------------------------------------------------------------------------


def copied(model):
    return copy.deepcopy(model)


def pickled(model):
    return pickle.loads(pickle.dumps(model))


def saved(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("duplicate", [copied, pickled, saved], ids=lambda f: f.__name__)
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_a_copy_is_fused_on_its_own(duplicate, family):
    model = tiny_model(family, num_hidden_layers=1)
    plain = copy.deepcopy(model)
    inject(model)
    step(model, batch())
    twin = duplicate(model)
    restore(model)
    assert is_injected(twin)
    assert_fused_and_exact(twin, plain, batch())
    restore(twin)
    assert [type(m) for m in twin.modules()] == [type(m) for m in plain.modules()]
    assert not [n for m in twin.modules() for n in vars(m) if n.startswith("_liger")]


@pytest.mark.parametrize("tied", [False, True], ids=["", "tied"])
def test_saved_files_are_the_plain_models(tied, tmp_path):
    model, plain, _ = injected_pair(tie_word_embeddings=tied)
    for name, each in (("ours", model), ("plain", plain)):
        each.save_pretrained(tmp_path / name)
    for file in (tmp_path / "plain").iterdir():
        assert (tmp_path / "ours" / file.name).read_bytes() == file.read_bytes()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "ours").train()
    assert type(loaded) is LlamaForCausalLM
    inject(loaded)
    assert_fused_and_exact(loaded, plain, batch())


def test_the_representation_is_that_of_the_plain_model():
    model, plain, report = injected_pair()
    step(model, batch())
    assert repr(model) == repr(plain)
    assert len(repr(report)) < 4000


@pytest.mark.parametrize("wrap", [lambda model: model, adapted], ids=["", "adapted"])
def test_a_step_leaves_nothing_to_the_garbage_collector(wrap):
    """A cycle would keep hidden states, and the graph behind them, for a while."""
    model = wrap(tiny_model("llama", num_hidden_layers=1))
    inject(model)
    step(model, batch())
    gc.collect()
    gc.disable()
    try:
        inputs = 1.0 * torch.randn(2, 17, 64, requires_grad=True)
        marker = nn.Identity()  # lives as long as the graph does
        inputs.register_hook(functools.partial(lambda marker, grad: None, marker))
        lives = weakref.ref(marker)
        step(model, {"inputs_embeds": inputs, "labels": batch()["labels"]})
        del inputs, marker
        assert lives() is None
    finally:
        gc.enable()


def test_a_retained_gradient_of_the_logits_keeps_nothing_alive():
    """A tensor's `grad` that refers to the tensor is never freed: no collector looks there."""
    model = tiny_model("llama", num_hidden_layers=1)
    inject(model)
    out = model(**batch(), output_hidden_states=True)
    lives = weakref.ref(out.hidden_states[-1])
    out.logits.retain_grad()
    out.loss.backward()
    assert out.logits.retains_grad
    assert out.logits.grad.any()
    del out
    gc.collect()
    assert lives() is None
