"""LoRA as one operation trains as PEFT's layers do, whatever their options."""

import contextlib
import copy
from contextvars import ContextVar

import pytest
import torch
from census import kept_bytes_per_token_and_layer
from families import batch, tiny_model

from liger_trainer import inject
from liger_trainer.injection.rules import lora
from liger_trainer.kernels import runtime

pytest.importorskip("peft")

from lora_models import adapted, assert_trains_alike, count_fused, step

bf16, fp32 = torch.bfloat16, torch.float32
pytestmark = pytest.mark.usefixtures("every_size")


OPTIONS = {
    "default": {},
    "rslora": {"use_rslora": True, "lora_alpha": 3},
    "modules to save": {"modules_to_save": ["embed_tokens"]},
    "bias": {"bias": "all"},
    "two of seven": {"target_modules": ["q_proj", "down_proj"]},
}


@pytest.mark.parametrize("option", OPTIONS)
def test_options(option, monkeypatch):
    ours = adapted(**OPTIONS[option])
    plain = copy.deepcopy(ours)
    report = inject(ours)
    targets = 2 if option == "two of seven" else 7
    assert report.coverage["lora"] == (targets, targets)
    calls = count_fused(monkeypatch)
    assert_trains_alike(ours, plain)
    assert calls == ["lora_linear"] * targets


def test_the_report_shows_the_difference_in_fp32(monkeypatch):
    """Whether a layer is swapped is decided in fp64 and in 16 bits."""
    exact = lora.lora_linear

    def rough(x, *operands):
        y = exact(x, *operands)
        return y + 1e-4 * y.detach().abs().max() if x.dtype == fp32 else y

    monkeypatch.setattr(lora, "lora_linear", rough)
    rows = [row for row in inject(adapted()).rows if row.rule == "lora"]
    assert all(row.swapped for row in rows)
    assert [row.max_error for row in rows] == pytest.approx([1e-4] * len(rows), rel=1e-2)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("adapters", [bf16, fp32])
def test_bf16_base(autocast, adapters):
    ours = adapted().to(bf16)
    for name, parameter in ours.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(adapters)
    plain = copy.deepcopy(ours)
    inject(ours)
    assert_trains_alike(ours, plain, autocast, factor=3.0)


def test_base_weights_that_train_too():
    ours = adapted()
    ours.requires_grad_(True)
    plain = copy.deepcopy(ours)
    inject(ours)
    assert_trains_alike(ours, plain)


def test_ten_steps_of_training():
    ours = adapted(init_lora_weights=True)
    plain = copy.deepcopy(ours)
    inject(ours)
    losses = []
    for model in (ours, plain):
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        losses.append([])
        for _ in range(10):
            loss = model(**batch()).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[-1].append(loss.item())
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-4, atol=1e-4)
    assert losses[0][-1] < losses[0][0] - 0.1


def test_dropout_of_a_model_trains_and_is_off_in_evaluation():
    ours = adapted(lora_dropout=0.5)
    plain = copy.deepcopy(ours)
    assert inject(ours).coverage["lora"] == (7, 7)
    losses = {ours(**batch()).loss.item() for _ in range(3)}
    assert len(losses) == 3
    torch.manual_seed(0)
    direct = step(ours)
    ours.zero_grad()
    ours.gradient_checkpointing_enable({"use_reentrant": False})
    torch.manual_seed(0)
    for name, value in step(ours).items():  # the mask is the same when it is made again
        torch.testing.assert_close(value, direct[name])
    ours.eval(), plain.eval()
    torch.testing.assert_close(ours(**batch()).loss, plain(**batch()).loss)


def test_small_inputs_are_fused_too(monkeypatch):
    monkeypatch.setattr(runtime, "_every_size", ContextVar("every_size", default=False))
    ours = adapted()
    assert inject(ours).coverage["lora"] == (7, 7)
    calls = count_fused(monkeypatch)
    step(ours)
    assert len(calls) == 7


@pytest.mark.parametrize("mode", ["keep", "lean"])
@pytest.mark.parametrize("settings", [{}, {"lora_dropout": 0.1}])
def test_keeps_no_more_than_full_fine_tuning(every_size, mode, settings):
    inputs = batch(length=33)
    del inputs["attention_mask"]

    def full(layers):
        model = tiny_model("llama", num_hidden_layers=layers, intermediate_size=224).to(bf16)
        inject(model, {"activation_memory": mode})
        return model

    def with_lora(layers):
        model = tiny_model("llama", num_hidden_layers=layers, intermediate_size=224).to(bf16)
        model = adapted(model, r=2, **settings)
        inject(model, {"activation_memory": mode})
        return model

    kept = kept_bytes_per_token_and_layer(with_lora, inputs)
    assert kept <= 1.05 * kept_bytes_per_token_and_layer(full, inputs)


@contextlib.contextmanager
def one_process_group():
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        yield torch.distributed.init_device_mesh("cpu", (1,))
    finally:
        torch.distributed.destroy_process_group()


def test_under_fsdp2(every_size):
    from torch.distributed.fsdp import fully_shard

    ours = adapted()
    plain = copy.deepcopy(ours)
    expected = step(plain)
    inject(ours)
    with one_process_group() as mesh:
        for layer in ours.get_base_model().model.layers:
            for unit in (layer.input_layernorm, layer):
                fully_shard(unit, mesh=mesh, reshard_after_forward=True)
        fully_shard(ours, mesh=mesh)  # as accelerate does
        got = step(ours)
        for name, value in expected.items():
            local = got[name].full_tensor() if hasattr(got[name], "full_tensor") else got[name]
            torch.testing.assert_close(local, value, rtol=1e-4, atol=1e-6)
