"""Gradients of gradients through every layer operation, also of incoming ones that are constant,
and what else looks into a backward or forward: batched gradients, `torch.func`, forward mode."""

import contextlib
import functools

import pytest
import torch
from torch.autograd import forward_ad

from liger_trainer.kernels.layers.glu import geglu, geglu_reference, swiglu, swiglu_reference
from liger_trainer.kernels.layers.layer_norm import layer_norm, layer_norm_reference
from liger_trainer.kernels.layers.lora_linear import Adapter, lora_linear
from liger_trainer.kernels.layers.rms_norm import rms_norm, rms_norm_reference
from liger_trainer.kernels.layers.rope import rope, rope_reference
from liger_trainer.kernels.linear.cross_entropy import linear_cross_entropy
from liger_trainer.kernels.linear.divergence import linear_divergence
from liger_trainer.kernels.linear.log_prob_loss import linear_log_prob_loss
from liger_trainer.kernels.linear.log_probs import linear_log_probs
from liger_trainer.kernels.recompute import recomputing

ROW, WIDTH, HEADS, TABLE = (3, 8), (8,), (2, 4, 3, 8), (2, 3, 6)
GEMMA = {"eps": 1e-6, "offset": 1.0, "cast_first": False}


def of_angles(function, **options):
    """As a function of q and k alone: tables that require a gradient go to the reference."""
    torch.manual_seed(1)
    cos, sin = torch.randn(TABLE), torch.randn(TABLE)
    return lambda q, k: function(q, k, cos.to(q.device), sin.to(q.device), **options)


OPERATIONS = {
    "rms_norm": (rms_norm, rms_norm_reference, {"eps": 1e-6}, (ROW, WIDTH)),
    "rms_norm without weight": (rms_norm, rms_norm_reference, {"eps": 1e-6}, (ROW,)),
    "rms_norm of gemma": (rms_norm, rms_norm_reference, GEMMA, (ROW, WIDTH)),
    "layer_norm": (layer_norm, layer_norm_reference, {"eps": 1e-6}, (ROW, WIDTH, WIDTH)),
    "layer_norm alone": (layer_norm, layer_norm_reference, {"eps": 1e-6}, (ROW,)),
    "swiglu": (swiglu, swiglu_reference, {}, (ROW, ROW)),
    "geglu": (geglu, geglu_reference, {}, (ROW, ROW)),
    "geglu tanh": (geglu, geglu_reference, {"approximate": "tanh"}, (ROW, ROW)),
    "rope": (of_angles(rope), of_angles(rope_reference), {}, (HEADS, HEADS)),
}


def leaves(shapes, device) -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [torch.randn(shape).to(device).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("constant", [True, False], ids=["constant", "variable"])
def test_a_gradient_penalty_is_that_of_torch(kernel_device, operation, constant):
    function, reference, options, shapes = OPERATIONS[operation]
    results = []
    for each in (function, reference):
        inputs = leaves(shapes, kernel_device)
        outputs = each(*inputs, **options)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        value = sum((o if constant else o.sin()).sum() for o in outputs)
        grads = torch.autograd.grad(value, inputs, create_graph=True)
        penalty = sum(g.square().sum() for g in grads)
        if penalty.requires_grad:
            found = torch.autograd.grad(penalty, inputs, allow_unused=True)
        else:  # linear
            found = [None] * len(inputs)
        results.append([g if g is not None else torch.zeros(()) for g in (*grads, *found)])
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("operation", [n for n in OPERATIONS if len(OPERATIONS[n][-1]) > 1])
@pytest.mark.parametrize("constant", [True, False], ids=["constant", "variable"])
def test_one_operand_alone_requires_a_gradient(kernel_device, operation, constant):
    function, reference, options, shapes = OPERATIONS[operation]
    for index in range(len(shapes)):
        results = []
        for each in (function, reference):
            inputs = [t.detach() for t in leaves(shapes, kernel_device)]
            inputs[index].requires_grad_()
            outputs = each(*inputs, **options)
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            value = sum((o if constant else o.sin()).sum() for o in outputs)
            (grad,) = torch.autograd.grad(value, inputs[index], create_graph=True)
            found = torch.zeros(())
            if grad.requires_grad:
                grads = torch.autograd.grad(grad.square().sum(), inputs[index], allow_unused=True)
                found = found if grads[0] is None else grads[0]
            results.append([grad, found])
        torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_many_gradients_at_once(kernel_device, operation):
    function, reference, options, shapes = OPERATIONS[operation]
    results = []
    for each in (function, reference):
        inputs = leaves(shapes, kernel_device)
        outputs = each(*inputs, **options)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        seeds = [torch.linspace(-1, 1, 5 * o.numel()).view(5, *o.shape).to(o) for o in outputs]
        results.append(torch.autograd.grad(outputs, inputs, seeds, is_grads_batched=True))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("recomputes", [False, True], ids=["keeps", "recomputes"])
def test_function_transforms_and_forward_mode(kernel_device, operation, recomputes):
    function, reference, options, shapes = OPERATIONS[operation]
    inputs = [t.detach() for t in leaves(shapes, kernel_device)]
    tangents = tuple(t.cos() for t in inputs)
    wanted = tuple(range(len(inputs)))

    def value(each, *tensors):
        with recomputing() if recomputes else contextlib.nullcontext():
            outputs = each(*tensors, **options)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        return sum(o.sin().sum() for o in outputs)

    results = []
    for each in (functools.partial(value, function), functools.partial(value, reference)):
        found = [*torch.func.grad(each, wanted)(*inputs)]
        with forward_ad.dual_level():
            dual = map(forward_ad.make_dual, inputs, tangents)
            found.append(forward_ad.unpack_dual(each(*dual)).tangent)
        found.append(torch.func.jvp(each, tuple(inputs), tangents)[1])
        found.append(torch.func.vmap(each)(*(torch.stack([t, 2 * t]) for t in inputs)))
        results.append(found)
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


def test_operands_that_come_from_each_other(kernel_device):
    """The gradient of one must not contain what goes through the other."""
    results = []
    for function in (swiglu, swiglu_reference):
        (x,) = leaves((ROW,), kernel_device)
        gate = x.sin()
        (dx,) = torch.autograd.grad(function(gate, gate.cos()).sum(), x, create_graph=True)
        results.append(torch.autograd.grad(dx.square().sum(), x))
    torch.testing.assert_close(*results)


def test_frozen_operands(kernel_device):
    x, weight = leaves((ROW, WIDTH), kernel_device)
    weight.requires_grad_(False)
    results = []
    for function in (rms_norm, rms_norm_reference):
        y = functools.partial(function, eps=1e-6)(x, weight)
        (dx,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        results.append(torch.autograd.grad(dx.square().sum(), x))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


# --- operations without a second derivative ------------------------------------------------------


def cross_entropy_of_a_head(x, weight):
    return linear_cross_entropy(x, weight, labels(x))


def log_probs_of_a_head(x, weight):
    return linear_log_probs(x, weight, labels(x)).log_probs.sum()


def loss_of_log_probs(x, weight):
    def loss(scores, mask, groups):
        return scores.log_probs.sum((1, 2))

    return linear_log_prob_loss(x[None], weight, labels(x)[None], loss)[0]


def divergence_of_a_head(x, weight):
    teacher = weight.detach().flip(0)
    return linear_divergence(x, weight, x.detach(), teacher, labels(x) >= 0)[0].sum()


def adapters(x, weight):
    up = torch.ones(len(weight), 2, device=x.device)
    return lora_linear(x, up @ up.t(), None, [Adapter(weight[:2], up, 0.5)]).sin().sum()


def second_adapter_matrix(x, weight):
    down = torch.ones(2, x.shape[-1], device=x.device)
    base = torch.ones(len(weight), x.shape[-1], device=x.device)
    return lora_linear(x, base, None, [Adapter(down, weight[:, :2], 0.5)]).sum()


def labels(x):
    return torch.arange(len(x), device=x.device)


@pytest.mark.parametrize(
    "function",
    [cross_entropy_of_a_head, log_probs_of_a_head, loss_of_log_probs, divergence_of_a_head,
     adapters, second_adapter_matrix],
)  # fmt: skip
@pytest.mark.parametrize("wanted", [(0,), (1,), (0, 1)], ids=["x", "weight", "both"])
def test_where_there_is_none_asking_for_it_raises(kernel_device, function, wanted):
    """Also for `torch.autograd.grad`, which runs only what leads to its inputs."""
    inputs = leaves((ROW, ROW), kernel_device)
    inputs[1] = torch.randn(8, 8, device=kernel_device).requires_grad_()
    grads = torch.autograd.grad(function(inputs[0].sin(), inputs[1]), inputs, create_graph=True)
    penalty = sum(grad.square().sum() for grad in grads)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(penalty, [inputs[i] for i in wanted], allow_unused=True)
