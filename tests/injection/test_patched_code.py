"""Code that somebody patches, in the class of a model's modules or in its source file.

The injected model then computes what the patched plain model does, whenever the patch came.
"""

import copy

import pytest
import torch
import transformers.models.llama.modeling_llama as source
from families import batch, tiny_model
from lives import adapted, assert_equal_steps, step
from torch import nn

from liger_trainer import inject, restore
from liger_trainer.swap import PATCHED, is_swapped

pytestmark = pytest.mark.usefixtures("every_size")


def scaled(forward):
    """A forward whose result is half as much again."""

    def patched(self, *args, **kwargs):
        found = forward(self, *args, **kwargs)
        if torch.is_tensor(found):
            return 1.5 * found
        if isinstance(found, tuple):
            return 1.5 * found[0], *found[1:]
        name = next(n for n in ("loss", "last_hidden_state", "logits") if n in found)
        found[name] = 1.5 * found[name]
        return found

    return patched


def unrotated(q, k, cos, sin, **options):
    return q, k


def of_four_tokens(config, inputs_embeds, **others):
    length = inputs_embeds.shape[1]
    allowed = torch.ones(length, length).tril() * torch.ones(length, length).triu(-3)
    return torch.zeros(length, length).masked_fill(allowed == 0, -1e9)[None, None]


class Louder:
    def get_interface(self, *names):
        attend = source.sdpa_of_transformers(*names)

        def louder(*args, **kwargs):
            found, weights = attend(*args, **kwargs)
            return 1.5 * found, weights

        return louder


CLASSES = ["LlamaRMSNorm", "LlamaAttention", "LlamaMLP", "LlamaModel", "LlamaForCausalLM"]
GLOBALS = {
    "apply_rotary_pos_emb": unrotated,
    "create_causal_mask": of_four_tokens,
    "ALL_ATTENTION_FUNCTIONS": Louder(),
}


def patch(monkeypatch, name):
    if name in GLOBALS:
        interface = source.ALL_ATTENTION_FUNCTIONS.get_interface
        monkeypatch.setattr(source, "sdpa_of_transformers", interface, raising=False)
        monkeypatch.setattr(source, name, GLOBALS[name])
    else:
        cls = getattr(source, name)
        monkeypatch.setattr(cls, "forward", scaled(cls.forward))


def half_turned(x):
    return torch.cat([x[..., x.shape[-1] // 2 :], -x[..., : x.shape[-1] // 2]], -1)


def backbone_step(model, inputs):
    """Return the loss and gradients of the backbone alone, as a trainer calls it."""
    model.zero_grad()
    states = model.model(input_ids=inputs["input_ids"]).last_hidden_state
    states.square().mean().backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return states.detach(), grads


@pytest.mark.parametrize("name", ["LlamaRMSNorm", "LlamaAttention", "LlamaModel", *GLOBALS])
def test_a_backbone_that_is_called_directly_runs_what_is_patched(name, monkeypatch, caplog):
    plain = tiny_model("llama", num_hidden_layers=1)
    model = copy.deepcopy(plain)
    report = inject(model)
    unpatched = backbone_step(model, batch())
    patch(monkeypatch, name)
    expected = backbone_step(plain, batch())
    assert not torch.allclose(unpatched[0], expected[0], rtol=1e-4)
    assert_equal_steps(backbone_step(model, batch()), expected)
    assert_equal_steps(backbone_step(copy.deepcopy(model), batch()), expected)
    assert {row.reason for row in report.refused} == {PATCHED}
    monkeypatch.undo()
    assert_equal_steps(backbone_step(model, batch()), unpatched)


def test_a_part_of_a_layer_that_is_called_directly(monkeypatch):
    plain = tiny_model("llama", num_hidden_layers=1)
    model = copy.deepcopy(plain)
    inject(model)
    x = torch.randn(2, 5, 64, requires_grad=True)
    for name, part in (("LlamaRMSNorm", lambda m: m.model.norm),):
        patch(monkeypatch, name)
        torch.testing.assert_close(part(model)(x), part(plain)(x))
    monkeypatch.setattr(nn.SiLU, "forward", scaled(nn.SiLU.forward))
    mlps = [each.model.layers[0].mlp for each in (model, plain)]
    torch.testing.assert_close(*[mlp(x) for mlp in mlps])


def test_an_adapter_that_is_called_directly(monkeypatch):
    model = adapted(tiny_model("llama", num_hidden_layers=1), target_modules=["q_proj"])
    plain = copy.deepcopy(model)
    inject(model)
    x = torch.randn(2, 5, 64)
    layers = [each.get_submodule("base_model.model.model.layers.0.self_attn.q_proj")
              for each in (model, plain)]  # fmt: skip
    assert is_swapped(layers[0])
    cls = type(layers[1])
    monkeypatch.setattr(cls, "forward", scaled(cls.forward))
    torch.testing.assert_close(layers[0](x), layers[1](x))


def test_a_function_that_a_rotary_function_calls_is_part_of_its_code(monkeypatch):
    plain = tiny_model("llama", num_hidden_layers=1)
    model = copy.deepcopy(plain)
    inject(model)
    monkeypatch.setattr(source, "rotate_half", half_turned)
    assert_equal_steps(step(model, batch()), step(plain, batch()))


def test_a_method_that_a_norm_calls_is_part_of_its_code(monkeypatch):
    plain = tiny_model("gemma3_text", num_hidden_layers=1)
    model = copy.deepcopy(plain)
    inject(model)
    norm = type(plain.model.norm)
    monkeypatch.setattr(norm, "_norm", lambda self, x: x / (1 + x.abs().mean(-1, keepdim=True)))
    assert_equal_steps(step(model, batch()), step(plain, batch()))


@pytest.mark.parametrize("name", ["LlamaRMSNorm", "LlamaAttention"])
def test_a_copy_that_is_made_after_the_patch(name, monkeypatch):
    plain = tiny_model("llama", num_hidden_layers=1)
    model = copy.deepcopy(plain)
    inject(model)
    patch(monkeypatch, name)
    assert_equal_steps(step(copy.deepcopy(model), batch()), step(plain, batch()))


@pytest.mark.parametrize("name", [*CLASSES, *GLOBALS])
@pytest.mark.parametrize("when", ["after", "in a copy", "between"])
def test_what_is_patched_is_what_runs(name, when, monkeypatch):
    plain = tiny_model("llama", num_hidden_layers=1)
    model, before = copy.deepcopy(plain), copy.deepcopy(plain)
    inject(before)  # classes that were made for the code as it was
    unpatched = step(before, batch())
    if when != "between":
        inject(model)
    if when == "in a copy":
        model = copy.deepcopy(model)
    patch(monkeypatch, name)
    if when == "between":
        inject(model)
    expected = step(plain, batch())
    assert not torch.allclose(unpatched[0], expected[0], rtol=1e-4)
    assert_equal_steps(step(model, batch()), expected)
    with torch.no_grad():  # without labels, too
        ids = batch()["input_ids"]
        torch.testing.assert_close(model(input_ids=ids).logits, plain(input_ids=ids).logits)
    assert any(map(is_swapped, model.modules()))  # what is not patched stays fused


def test_the_report_tells_of_it_and_a_new_injection_mends_it(monkeypatch, caplog):
    model = tiny_model("llama", num_hidden_layers=1)
    report = inject(model)
    cls = source.LlamaRMSNorm
    plain = cls.forward
    monkeypatch.setattr(cls, "forward", lambda self, x: source.LlamaRMSNorm.plain(self, x))
    monkeypatch.setattr(cls, "plain", plain, raising=False)
    step(model, batch())
    assert [row.site for row in report.refused] == [r.site for r in report.rows if "norm" in r.rule]
    assert {row.reason for row in report.refused} == {PATCHED}
    assert caplog.text.count("was patched") == 1
    assert not inject(model).refused  # the patch changes nothing
    restore(model)
    assert not any(map(is_swapped, model.modules()))
