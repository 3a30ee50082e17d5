"""Code that somebody patches, in the class of a model's modules or in its source file.

The injected model then computes what the patched plain model does, whenever the patch came.
"""

import copy

import pytest
import torch
import transformers.models.llama.modeling_llama as source
from families import batch, tiny_model
from lives import assert_equal_steps, step

from liger_trainer import inject, restore
from liger_trainer.swap import is_swapped

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
    monkeypatch.setattr(cls, "forward", lambda self, x: source.LlamaRMSNorm.plain(self, x))
    monkeypatch.setattr(cls, "plain", type(model.model.norm)._liger_source._forward, raising=False)
    step(model, batch())
    assert [row.site for row in report.refused] == [r.site for r in report.rows if "norm" in r.rule]
    assert {row.reason for row in report.refused} == {
        "its code was patched after the injection; call inject(model) again"
    }
    assert caplog.text.count("was patched") == 1
    assert not inject(model).refused  # the patch changes nothing
    restore(model)
    assert not any(map(is_swapped, model.modules()))
