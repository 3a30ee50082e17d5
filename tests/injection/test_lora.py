"""LoRA as one operation computes what PEFT's layers compute, whatever their options."""

import contextlib
import copy
from contextvars import ContextVar

import pytest
import torch
import torch.nn.functional as F
from census import kept_bytes_per_token_and_layer
from families import batch, tiny_model
from oracle import assert_close_to_truth, assert_matches, run
from torch import nn

from liger_trainer import inject, restore
from liger_trainer.injection.rules import lora
from liger_trainer.kernels import runtime
from liger_trainer.kernels.layers import lora_linear as kernel
from liger_trainer.kernels.layers.lora_linear import Adapter, add_adapters, lora_linear

peft = pytest.importorskip("peft")
bf16, fp32 = torch.bfloat16, torch.float32
pytestmark = pytest.mark.usefixtures("every_size")


def operands(device, dtype, adapter_dtype, rows=(3, 17), width=48, out=40):
    torch.manual_seed(0)
    shapes = {
        "x": (*rows, width), "weight": (out, width), "bias": (out,),
        "A": (5, width), "B": (out, 5), "A2": (3, width), "B2": (out, 3),
    }  # fmt: skip
    return {
        name: (torch.randn(shape, device=device) * shape[-1] ** -0.5).to(
            adapter_dtype if name[0] in "AB" else dtype
        )
        for name, shape in shapes.items()
    }


def two_adapters(function):
    def called(x, weight, bias, A, B, A2, B2):
        return function(x, weight, bias, [Adapter(A, B, 0.7), Adapter(A2, B2, 1.5)])

    return called


def around(x, weight, bias, adapters):
    return add_adapters(F.linear(x, weight, bias), x, adapters)


@pytest.mark.parametrize("function", [lora_linear, around])
@pytest.mark.parametrize(
    ("dtype", "adapter_dtype"),
    [(fp32, fp32), (bf16, bf16), (bf16, fp32), (torch.float16, fp32)],
)
def test_as_exact_as_peft_s_formula(kernel_device, function, dtype, adapter_dtype):
    assert_matches(
        two_adapters(function),
        two_adapters(kernel.lora_linear_reference),
        operands(kernel_device, dtype, adapter_dtype),
    )


def test_no_rows(kernel_device):
    tensors = operands(kernel_device, bf16, fp32, rows=(2, 0))
    outputs, grads, _ = run(two_adapters(lora_linear), tensors)
    assert outputs[0].shape == (2, 0, 40)
    assert not any(grads[name].any() for name in ("A", "B", "weight"))


def test_three_parts_hold_every_bit(kernel_device):
    matrix = torch.randn(5, 70, device=kernel_device) * torch.logspace(-6, 6, 70).to(kernel_device)
    other = torch.randn(33, 5, device=kernel_device)
    first, second = kernel._split_pair(matrix, other.t())
    parts = first.double().view(3, 5, 70).sum(0)
    torch.testing.assert_close(parts, matrix.double(), rtol=2**-24, atol=0)
    columns = second.double().view(4, 5, 33)
    assert torch.equal(columns[0], columns[1])
    assert torch.equal(columns[0], columns[2])
    torch.testing.assert_close(columns[0] + columns[3], other.double().t(), rtol=2**-15, atol=0)


@pytest.mark.parametrize("adapter_dtype", [bf16, fp32])
def test_dropout_is_its_mask(device, monkeypatch, adapter_dtype):
    monkeypatch.setattr(kernel, "_draw_seed", lambda: 7)
    tensors = operands(device, bf16, adapter_dtype)
    del tensors["A2"], tensors["B2"]
    keep = kernel.dropout_mask(tensors["x"], 7, 0.3)
    assert 0 < keep.sum() < keep.numel()
    assert_matches(
        lambda x, weight, bias, A, B: lora_linear(x, weight, bias, [Adapter(A, B, 0.7, 0.3)]),
        lambda x, weight, bias, A, B: kernel.lora_linear_reference(
            x, weight, bias, [Adapter(A, B, 0.7, 0.3)], keeps=[keep]
        ),
        tensors,
    )


def test_dropout_masks_are_fair_and_follow_the_seed(device):
    x = torch.empty(200, 500, device=device)
    one, again, other = (kernel.dropout_mask(x, seed, 0.25) for seed in (1, 1, 2))
    assert torch.equal(one, again)
    assert abs(one.float().mean().item() - 0.75) < 0.01
    assert abs((one == other).float().mean().item() - (0.75**2 + 0.25**2)) < 0.01
    torch.manual_seed(3)
    drawn = [kernel._draw_seed() for _ in range(2)]
    torch.manual_seed(3)
    assert [kernel._draw_seed() for _ in range(2)] == drawn
    assert drawn[0] != drawn[1]


# --- PEFT's layers --------------------------------------------------------------------------------


def adapted(model=None, **settings):
    model = tiny_model("llama", num_hidden_layers=1) if model is None else model
    defaults = {"task_type": "CAUSAL_LM", "init_lora_weights": False, "r": 4}
    config = peft.LoraConfig(**{**defaults, "target_modules": "all-linear", **settings})
    return peft.get_peft_model(model, config)


def step(model, autocast=False):
    with torch.autocast("cpu", bf16, enabled=autocast):
        loss = model(**batch()).loss
    loss.backward()
    return {"loss": loss.detach()} | {
        name: p.grad for name, p in model.named_parameters() if p.grad is not None
    }


def assert_trains_alike(ours, plain, autocast=False, factor=2.0):
    """Every gradient is as near to fp64's as PEFT's, which the same parameters get."""
    truth, expected, got = step(copy.deepcopy(plain).double()), step(plain, autocast), None
    got = step(ours, autocast)
    assert list(got) == list(expected) == list(truth)
    for name, value in expected.items():
        assert_close_to_truth(name, got[name], value, truth[name], factor=factor, input_eps=2e-2)


def count_fused(monkeypatch):
    calls = []
    for name in ("lora_linear", "add_adapters"):
        original = getattr(lora, name)

        def spy(*args, original=original, name=name):
            calls.append(name)
            return original(*args)

        monkeypatch.setattr(lora, name, spy)
    return calls


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


def test_adapters_that_come_go_and_change(monkeypatch):
    ours = adapted()
    ours.add_adapter(
        "second", peft.LoraConfig(r=2, init_lora_weights=False, target_modules="all-linear")
    )
    plain = copy.deepcopy(ours)
    inject(ours)
    calls = count_fused(monkeypatch)
    both = (ours, plain)

    def compare(fused: bool):
        calls.clear()
        a, b = (model(**batch()).loss for model in both)
        torch.testing.assert_close(a, b)
        assert bool(calls) is fused

    compare(fused=True)
    first = ours(**batch()).loss
    for model in both:
        model.set_adapter("second")
    compare(fused=True)
    assert not torch.equal(ours(**batch()).loss, first)
    for model in both:
        model.base_model.set_adapter(["default", "second"])
    compare(fused=True)
    with ours.disable_adapter(), plain.disable_adapter():
        compare(fused=False)
    for model in both:
        model.merge_adapter()
    compare(fused=False)
    for model in both:
        model.unmerge_adapter()
    compare(fused=True)
    for model in both:
        for module in model.modules():
            if hasattr(module, "set_scale"):
                module.set_scale("second", 0.5)
    compare(fused=True)
    config = peft.LoraConfig(
        r=2, init_lora_weights=False, use_dora=True, target_modules="all-linear"
    )
    for model in both:
        torch.manual_seed(5)
        model.add_adapter("variant", config)
        model.set_adapter("variant")
    compare(fused=False)


def test_merge_and_unload_and_saving(tmp_path):
    ours = adapted()
    plain = copy.deepcopy(ours)
    inject(ours)
    assert list(ours.state_dict()) == list(plain.state_dict())
    ours.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(tiny_model("llama", num_hidden_layers=1), tmp_path)
    torch.testing.assert_close(loaded(**batch()).loss, plain(**batch()).loss)
    merged, expected = ours.merge_and_unload(), plain.merge_and_unload()
    assert not any(isinstance(m, lora.FusedLoRA) for m in merged.modules())
    torch.testing.assert_close(merged(**batch()).loss, expected(**batch()).loss)


def test_peft_after_injection():
    model = tiny_model("llama", num_hidden_layers=1)
    plain = copy.deepcopy(model)
    inject(model)
    torch.manual_seed(1)
    ours = adapted(model)
    torch.manual_seed(1)
    plain = adapted(plain)
    torch.testing.assert_close(ours(**batch()).loss, plain(**batch()).loss)
    assert inject(ours).coverage["lora"] == (7, 7)
    assert_trains_alike(ours, plain)
    restore(ours)
    assert not any(isinstance(m, lora.FusedLoRA) for m in ours.modules())


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


class QuantisedLinear(nn.Linear):
    """Stands in for a quantized layer: its weight is none, its forward is its own."""

    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype) * 0.5, self.bias)


@pytest.mark.parametrize("hooked", [False, True])
def test_a_base_with_a_forward_of_its_own_is_called(monkeypatch, hooked):
    ours, called = adapted(), []
    for module in list(ours.modules()):
        if hasattr(module, "base_layer"):
            if hooked:
                module.base_layer.register_forward_hook(lambda *args: called.append(1))
            else:
                module.base_layer.__class__ = QuantisedLinear
    plain = copy.deepcopy(ours)
    inject(ours)
    calls = count_fused(monkeypatch)
    assert_trains_alike(ours, plain)
    assert calls == ["add_adapters"] * 7
    assert bool(called) is hooked


def test_hooks_on_an_adapter_are_run(monkeypatch):
    ours, seen = adapted(), []
    inject(ours)
    layer = ours.base_model.model.model.layers[0].self_attn.q_proj
    layer.lora_A["default"].register_forward_pre_hook(lambda *args: seen.append(1))
    calls = count_fused(monkeypatch)
    step(ours)
    assert seen == [1]
    assert len(calls) == 6


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"use_dora": True}, "the variant DoraLinearVariant"),
        ({"lora_bias": True}, "a bias of the adapter"),
    ],
)
def test_variants_are_refused_and_run_as_they_are(settings, reason):
    ours = adapted(target_modules=["q_proj"], **settings)
    plain = copy.deepcopy(ours)
    report = inject(ours)
    (row,) = [row for row in report.rows if row.rule == "lora"]
    assert not row.swapped
    assert row.eligible
    assert reason in row.reason
    assert_trains_alike(ours, plain)


def test_a_look_alike_is_refused():
    class Halved(peft.tuners.lora.Linear):
        def forward(self, x, *args, **kwargs):
            return super().forward(x, *args, **kwargs) * 0.5

    ours = adapted(target_modules=["q_proj"])
    layer = ours.base_model.model.model.layers[0].self_attn.q_proj
    layer.__class__ = Halved
    (row,) = [row for row in inject(ours).rows if row.rule == "lora"]
    assert not row.swapped
    assert "differs by" in row.reason


def test_small_inputs_run_as_they_are(monkeypatch):
    monkeypatch.setattr(runtime, "_every_size", ContextVar("every_size", default=False))
    ours = adapted()
    assert inject(ours).coverage["lora"] == (7, 7)
    calls = count_fused(monkeypatch)
    step(ours)
    assert not calls


def test_switched_off_and_the_head_left_to_its_own_rule():
    ours = adapted(target_modules=["q_proj", "lm_head"])
    (row,) = [row for row in inject(ours).rows if row.rule == "lora"]
    assert row.site.endswith("q_proj")
    assert row.swapped
    (row,) = [row for row in inject(ours, {"lora": False}).rows if row.rule == "lora"]
    assert row.reason == "switched off in liger_kernel_config"


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
