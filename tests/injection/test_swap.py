"""What a swap does to classes, and how a failed or a repeated one leaves the model."""

import abc
import copy
import threading

import architectures
import pytest
import small_inputs
import torch
import torch.distributed as dist
from families import batch, tiny_model
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.utils import parametrize
from transformers import LlamaForCausalLM, SegformerConfig, SegformerForSemanticSegmentation
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from liger_trainer import inject, restore
from liger_trainer.injection import walk
from liger_trainer.injection.rules import norm, rotary
from liger_trainer.injection.walk import is_injected
from liger_trainer.kernels import runtime


@pytest.fixture
def mesh():
    """A mesh of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_calling_a_swapped_class_makes_a_plain_module():
    model = tiny_model("llama")
    inject(model)
    made = type(model.model.norm)(64, eps=0.5)
    assert type(made) is LlamaRMSNorm
    assert made.variance_epsilon == 0.5
    assert type(type(model)(model.config)) is LlamaForCausalLM

    class Mine(type(model.model.norm)):
        pass

    assert not isinstance(Mine(64), norm.FusedNorm)
    assert isinstance(Mine(64), LlamaRMSNorm)


def test_data_parallel_replicas_stay_swapped():
    model = nn.Sequential(LlamaRMSNorm(64))
    inject(model)
    assert isinstance(model[0]._replicate_for_data_parallel(), norm.FusedNorm)


def test_classes_with_a_metaclass_of_their_own():
    class Abstract(LlamaRMSNorm, abc.ABC):
        pass

    model = nn.Sequential(Abstract(64))
    inject(model, strict=True)
    assert isinstance(model[0], norm.FusedNorm)
    assert type(type(model[0])(64)) is Abstract
    restore(model)
    assert type(model[0]) is Abstract


def states(model):
    return [(type(m), dict(vars(m))) for m in model.modules()]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("after", [0, 3])
def test_an_injection_that_fails_leaves_the_model_as_it_was(error, after, monkeypatch):
    model = tiny_model("llama")
    before, generator = states(model), torch.get_rng_state()
    calls = []

    def failing(*args):
        calls.append(args)
        if len(calls) > after:
            raise error
        return swap(*args)

    swap = walk.swap
    monkeypatch.setattr(walk, "swap", failing)
    with pytest.raises(error):
        inject(model)
    assert states(model) == before
    assert torch.equal(torch.get_rng_state(), generator)


def test_a_probe_that_fails_leaves_the_model_as_it_was(monkeypatch):
    model = tiny_model("llama")
    before, generator = states(model), torch.get_rng_state()

    def failing(*args):
        torch.rand(3)
        raise MemoryError

    monkeypatch.setattr(rotary, "identify", failing)
    with pytest.raises(MemoryError):
        inject(model)
    assert states(model) == before
    assert torch.equal(torch.get_rng_state(), generator)


def phimoe():
    """Its router samples while it trains; dropout acts as well."""
    model = architectures.tiny("causal", "phimoe")
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.3
    return model, small_inputs.text()


def segformer():
    """It drops paths, hidden units, attention weights, and parts of the classifier's input."""
    torch.manual_seed(0)
    config = SegformerConfig(
        hidden_sizes=[32, 32, 64, 64],
        decoder_hidden_size=32,
        drop_path_rate=0.5,
        hidden_dropout_prob=0.3,
        attention_probs_dropout_prob=0.3,
        classifier_dropout_prob=0.3,
    )
    model = SegformerForSemanticSegmentation(config).train()
    inputs = {"pixel_values": torch.randn(2, 3, 32, 32)}
    return model, inputs | {"labels": torch.randint(0, 2, (2, 32, 32))}


@pytest.mark.parametrize("make", [phimoe, segformer])
def test_a_model_that_draws_random_numbers_draws_the_same_after_the_injection(make):
    plain, inputs = make()
    model = copy.deepcopy(plain)
    losses, drawn = {}, {}
    for each in (plain, model):
        torch.manual_seed(5)
        if each is model:
            assert sum(cover.swapped for cover in inject(model).coverage.values())
        with runtime.every_size():
            losses[each] = [each(**inputs).loss for _ in range(2)]
        sum(losses[each]).backward()
        drawn[each] = torch.get_rng_state()
    assert abs(losses[plain][0] - losses[plain][1]) > 1e-3  # the draws matter
    torch.testing.assert_close(losses[model], losses[plain], rtol=1e-5, atol=1e-6)
    assert torch.equal(drawn[model], drawn[plain])
    expected = {name: p.grad for name, p in plain.named_parameters()}
    largest = max(grad.norm() for grad in expected.values() if grad is not None)
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) is (expected[name] is None), name
        if parameter.grad is not None:
            assert (parameter.grad - expected[name]).norm() <= 1e-5 * largest, name


@pytest.mark.parametrize(
    "context",
    [torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16),
     lambda: torch.device("meta")],
    ids=["no_grad", "inference_mode", "autocast", "device"],
)  # fmt: skip
def test_the_callers_modes_do_not_play_in(context):
    model = tiny_model("llama")
    with context():
        report = inject(model, strict=True)
    assert report.coverage["rms_norm"] == (5, 5)
    torch.testing.assert_close(model(**batch()).loss, tiny_model("llama")(**batch()).loss)


def test_the_default_dtype_does_not_play_in():
    model = tiny_model("llama")
    torch.set_default_dtype(torch.float64)
    try:
        report = inject(model, strict=True)
    finally:
        torch.set_default_dtype(torch.float32)
    assert report.coverage["rms_norm"] == (5, 5)


# --- others that change classes too ----------------------------------------------------------


def test_fsdp_on_top_of_a_swap_stays_when_the_swap_goes(mesh):
    model = tiny_model("llama")
    expected = copy.deepcopy(model)(**batch()).loss
    inject(model)
    for module in (*model.model.layers, model.model.norm, model):
        fully_shard(module, mesh=mesh)
    assert isinstance(model.model.norm, norm.FusedNorm)
    torch.testing.assert_close(model(**batch()).loss, expected)
    restore(model)
    assert not is_injected(model)
    for module in (model, model.model.norm, model.model.layers[0]):
        assert isinstance(module, FSDPModule)
    assert isinstance(model.model.norm, LlamaRMSNorm)
    torch.testing.assert_close(model(**batch()).loss, expected)

    report = inject(model)  # what is sharded now
    assert report.coverage["rms_norm"] == (5, 5)
    assert report.coverage["rope"] == (2, 2)
    assert report.coverage["swiglu"] == (2, 2)
    loss = model(**batch()).loss
    loss.backward()
    torch.testing.assert_close(loss, expected)
    restore(model)
    assert isinstance(model, FSDPModule)


def test_a_parametrization_on_top_of_a_swap_stays_when_the_swap_goes():
    class Twice(nn.Module):
        def forward(self, weight):
            return 2 * weight

    model = nn.Sequential(LlamaRMSNorm(64))
    inject(model)
    parametrize.register_parametrization(model[0], "weight", Twice())
    x = torch.randn(3, 64)
    expected = 2 * LlamaRMSNorm(64)(x)
    torch.testing.assert_close(model(x), expected)
    restore(model)
    torch.testing.assert_close(model(x), expected)
    parametrize.remove_parametrizations(model[0], "weight", leave_parametrized=False)
    torch.testing.assert_close(model(x), LlamaRMSNorm(64)(x))


# --- shards ----------------------------------------------------------------------------------


def test_parameters_that_are_dtensors_are_probed_by_their_shape(mesh):
    model = nn.Sequential(LlamaRMSNorm(64), nn.LayerNorm(64))
    x = torch.randn(3, 64)
    expected = model(x)
    for module in model:
        for name, parameter in list(module.named_parameters()):
            sharded = distribute_tensor(parameter.detach(), mesh)
            module.register_parameter(name, nn.Parameter(sharded))
    report = inject(model, strict=True)
    assert report.coverage["rms_norm"] == report.coverage["layer_norm"] == (1, 1)
    result = model(distribute_tensor(x, mesh))
    assert isinstance(result, DTensor)
    torch.testing.assert_close(result.full_tensor(), expected)


def test_parameters_without_elements_are_probed_by_their_whole_shape():
    """As DeepSpeed's ZeRO-3 leaves them until it gathers them."""
    model = nn.Sequential(LlamaRMSNorm(64), nn.LayerNorm(64))
    whole = {p: p.data for p in model.parameters()}
    for parameter, data in whole.items():
        parameter.ds_shape = data.shape
        parameter.data = torch.empty(0)
        parameter.ds_process_group = threading.Lock()  # cannot be copied
    report = inject(model, strict=True)
    assert report.coverage["rms_norm"] == report.coverage["layer_norm"] == (1, 1)
    for parameter, data in whole.items():
        assert parameter.numel() == 0
        parameter.data = data
    x = torch.randn(3, 64)
    torch.testing.assert_close(model(x), nn.LayerNorm(64)(LlamaRMSNorm(64)(x)))


def test_probing_in_one_thread_leaves_the_kernels_choice_to_others():
    seen = []
    with runtime.every_size():
        thread = threading.Thread(target=lambda: seen.append(runtime.pays(torch.ones(1), 2)))
        thread.start()
        thread.join()
        assert runtime.pays(torch.ones(1), 2)
    assert seen == [False]
    assert not runtime.pays(torch.ones(1), 2)
