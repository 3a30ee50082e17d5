"""Models that a device_map has placed, offloaded ones, and stages of a pipeline."""

import copy
import functools

import pytest
import torch
from families import batch, tiny_model
from lives import assert_equal_steps, assert_fused_and_exact, step
from torch import nn
from torch.distributed.pipelining import SplitPoint, pipeline
from torch.nn import functional as F
from transformers import AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from liger_trainer import inject, loss_scope, restore
from liger_trainer.deferred import Deferred

accelerate = pytest.importorskip("accelerate")
hooks = pytest.importorskip("accelerate.hooks")

PARTS = ["model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm", "lm_head"]
HERE = {**dict.fromkeys(PARTS, "cpu"), "model.rotary_emb": "cpu"}


def placed(model, folder):
    return accelerate.dispatch_model(model, HERE, main_device="cpu", force_hooks=True)


def offloaded_to_memory(model, folder):
    return accelerate.cpu_offload(model, execution_device="cpu")


def offloaded_to_disk(model, folder):
    return accelerate.disk_offload(model, str(folder), execution_device="cpu")


def partly_on_disk(model, folder):
    places = {**HERE, "model.layers.1": "disk", "lm_head": "disk"}
    return accelerate.dispatch_model(
        model, places, main_device="cpu", offload_dir=str(folder), force_hooks=True
    )


def state_of(model):
    return [
        (type(m), {k: v for k, v in vars(m).items() if "forward" in k}) for m in model.modules()
    ]


@pytest.mark.parametrize(
    "place", [placed, offloaded_to_memory, offloaded_to_disk, partly_on_disk],
    ids=lambda place: place.__name__,
)  # fmt: skip
@pytest.mark.parametrize("order", ["injected first", "placed first"])
def test_a_placed_model_is_swapped_beneath_the_hooks(place, order, tmp_path, every_size):
    plain = tiny_model("llama").eval()
    model = copy.deepcopy(plain)
    if order == "injected first":
        report = inject(model)
        model = place(model, tmp_path)
    else:
        model = place(model, tmp_path)
        before = state_of(model)
        report = inject(model)
    assert not report.refused
    with torch.no_grad():
        got, expected = model(**batch()), plain(**batch())
        assert isinstance(got.logits, Deferred)
        assert got.logits._value is None
        torch.testing.assert_close(got.loss, expected.loss)
        assert torch.equal(got.logits.argmax(-1), expected.logits.argmax(-1))
        torch.testing.assert_close(got.logits + 0, expected.logits)
        ids = batch()["input_ids"]
        torch.testing.assert_close(model(input_ids=ids).logits, plain(input_ids=ids).logits)
    restore(model)
    if order == "placed first":
        assert state_of(model) == before
    with torch.no_grad():
        torch.testing.assert_close(model(**batch()).loss, expected.loss, rtol=0, atol=0)


def test_a_placed_model_trains_and_its_hooks_may_go():
    plain = tiny_model("llama")
    model = placed(copy.deepcopy(plain), None)
    inject(model, strict=True)
    assert_fused_and_exact(model, plain, batch())
    twin = copy.deepcopy(model)
    hooks.remove_hook_from_submodules(model)
    assert_fused_and_exact(model, plain, batch())
    restore(model)
    assert_equal_steps(step(model, batch()), step(plain, batch()))
    assert_fused_and_exact(twin, plain, batch())
    inject(model, strict=True)  # what is left of the hooks is the modules' own forward
    assert_fused_and_exact(model, plain, batch())


def test_from_pretrained_with_a_device_map(tmp_path):
    plain = tiny_model("llama").eval()
    plain.save_pretrained(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", device_map={**HERE, "lm_head": "disk"}, offload_folder=tmp_path
    )
    assert model.lm_head.weight.is_meta
    inject(model, strict=True)
    with torch.no_grad():
        got = model(**batch())
        torch.testing.assert_close(got.loss, plain(**batch()).loss)
        assert got.logits._value is None


def test_a_forward_of_somebody_else_is_refused_and_says_what_to_do(caplog):
    model = tiny_model("llama")
    plain = copy.deepcopy(model)
    for each in (model, plain):
        norm, own = each.model.norm, each.model.norm.forward
        norm.forward = functools.partial(lambda own, x: own(x), own)
    report = inject(model)
    (row,) = report.refused
    assert (row.site, row.reason[:22]) == ("model.norm", "its forward is replace")
    assert "not swapped" in caplog.text
    assert_fused_and_exact(model, plain, batch())


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_over_two_devices(family, every_size):
    if torch.cuda.device_count() < 2:
        pytest.skip("one device")
    plain = tiny_model(family, "cuda:0")
    places = {**dict.fromkeys(PARTS[:2], 0), **dict.fromkeys(PARTS[2:], 1), "model.rotary_emb": 0}
    if plain.config.tie_word_embeddings:
        places["lm_head"] = 0  # as accelerate places it, beside the embedding
    model = accelerate.dispatch_model(copy.deepcopy(plain), places)
    placed_plain = accelerate.dispatch_model(copy.deepcopy(plain), places)
    inject(model, strict=True)
    assert_fused_and_exact(model, placed_plain, batch("cuda:0"))
    losses = []
    for each in (model, placed_plain):
        inputs = batch("cuda:0")
        labels = inputs.pop("labels")
        with loss_scope():
            logits = each(**inputs).logits
            assert logits.device == torch.device("cuda:0")
            losses.append(F.cross_entropy(logits.flatten(0, 1), labels.flatten()))
    torch.testing.assert_close(*losses)


# --- pipelines ------------------------------------------------------------------------------------


def stage(model, first: bool):
    """Half of a model, as torchtitan and others cut it: the same class without the rest."""
    half = copy.deepcopy(model)
    layers = half.model.layers
    half.model.layers = nn.ModuleList(list(layers)[:1] if first else list(layers)[1:])
    if first:
        half.model.norm, half.lm_head = nn.Identity(), None
    else:
        half.model.embed_tokens = None
    return half


def test_stages_of_a_pipeline_swap_what_they_hold(every_size):
    model = tiny_model("llama")
    first, last = stage(model, True), stage(model, False)
    reports = [inject(first), inject(last)]
    assert [r.coverage["rms_norm"] for r in reports] == [(2, 2), (3, 3)]
    assert not any(report.refused for report in reports)
    (row,) = [row for row in reports[0].rows if row.rule == "fused_linear_cross_entropy"]
    assert (row.swapped, row.eligible) == (False, False)
    inputs = batch()
    labels = inputs.pop("labels")
    hidden = first.model(**inputs).last_hidden_state
    inputs.pop("input_ids")
    out = last(inputs_embeds=hidden, labels=labels, **inputs)
    out.loss.backward()
    assert out.logits._value is None
    _, grads, _ = step(model, batch())
    torch.testing.assert_close(out.loss, model(**batch()).loss)
    torch.testing.assert_close(
        first.model.embed_tokens.weight.grad, grads["model.embed_tokens.weight"]
    )
    torch.testing.assert_close(last.lm_head.weight.grad, grads["lm_head.weight"])


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.norm, self.mlp = LlamaRMSNorm(config.hidden_size), LlamaMLP(config)

    def forward(self, x):
        return x + self.mlp(self.norm(x))


@pytest.mark.parametrize("when", ["before", "after"])
def test_traced_stages_of_a_pipeline(when):
    """The trace of a swapped module is that of the plain one, and there is nothing left to swap."""
    config = tiny_model("llama").config
    plain = nn.Sequential(Block(config), Block(config))
    model, x = copy.deepcopy(plain), torch.randn(2, 5, config.hidden_size)
    if when == "before":
        assert inject(model).coverage["rms_norm"] == (2, 2)
    pipe = pipeline(model, mb_args=(x,), split_spec={"1": SplitPoint.BEGINNING})
    stages = [pipe.get_stage_module(i) for i in range(pipe.num_stages)]
    assert len(stages) == 2
    if when == "after":
        assert not any(inject(each).refused for each in stages)
    hidden = stages[0](x)
    hidden = hidden if isinstance(hidden, tuple) else (hidden,)
    torch.testing.assert_close(stages[1](*hidden), plain(x))
