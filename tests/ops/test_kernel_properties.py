"""Every layer operation and the cross entropy, on shapes, strides, dtypes and options at random.

A few dozen examples each by default; `--hypothesis-profile=thorough` runs thousands.
"""

import functools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from oracle import assert_matches

from liger_trainer.kernels import runtime
from liger_trainer.kernels.layers.gated_rms_norm import gated_rms_norm, gated_rms_norm_reference
from liger_trainer.kernels.layers.glu import geglu, geglu_reference, swiglu, swiglu_reference
from liger_trainer.kernels.layers.layer_norm import layer_norm, layer_norm_reference
from liger_trainer.kernels.layers.rms_norm import rms_norm, rms_norm_reference
from liger_trainer.kernels.layers.rope import rope, rope_reference
from liger_trainer.kernels.logits.cross_entropy import cross_entropy
from liger_trainer.kernels.logits.loss import LossOptions

paths = pytest.mark.parametrize("path", ["torch", "interpreted"])
dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64])
widths = st.integers(1, 70)
epsilons = st.sampled_from([1e-12, 1e-6, 1e-5, 0.1])
layouts = st.sampled_from(["dense", "columns", "rows", "transposed", "expanded"])


@st.composite
def shapes(draw, width=widths):
    return (*draw(st.lists(st.integers(0, 4), max_size=3)), draw(width))


@st.composite
def tensor(draw, shape, dtype=dtypes):
    """A dense tensor, and the function that makes a view of `shape` of it."""
    layout, dtype = draw(layouts), draw(dtype)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    scale = draw(st.sampled_from([1e-2, 1.0, 8.0]))

    def normal(*shape):
        return (torch.randn(shape, generator=generator) * scale).to(dtype)

    if layout == "columns":
        return normal(*shape[:-1], shape[-1] + 3), lambda base: base[..., 1 : shape[-1] + 1]
    if layout == "rows" and len(shape) > 1:
        return normal(2 * shape[0], *shape[1:]), lambda base: base[::2]
    if layout == "transposed" and len(shape) > 1:
        return normal(*shape[::-1]), lambda base: base.permute(*range(base.dim())[::-1])
    if layout == "expanded" and len(shape) > 1:
        return normal(1, *shape[1:]), lambda base: base.expand(shape)
    return normal(*shape), lambda base: base


def check(path, function, reference, operands, size=0.0, **options):
    """`operands`, by name, are results of `tensor`; None is passed on."""
    given = {name: pair for name, pair in operands.items() if pair is not None}
    options |= {name: None for name in operands if name not in given}

    def of(operation):
        def run(**bases):
            views = {name: given[name][1](base) for name, base in bases.items()}
            return operation(**views, **options)

        return run

    torch.manual_seed(0)  # the incoming gradients: an example that fails does so every time
    with runtime.interpreted() if path == "interpreted" else runtime.every_size():
        bases = {name: base for name, (base, _) in given.items()}
        assert_matches(of(function), of(reference), bases, size=size)


@paths
@given(data=st.data())
def test_rms_norm(path, data):
    # Of one channel, the gradient is 0 but for rounding.
    shape = data.draw(shapes(st.integers(2, 70)))
    operands = {
        "x": data.draw(tensor(shape)),
        "weight": data.draw(st.none() | tensor(shape[-1:])),
    }
    options = {
        "eps": data.draw(epsilons),
        "offset": data.draw(st.sampled_from([0.0, 1.0])),
        "cast_first": data.draw(st.booleans()),
    }
    check(path, rms_norm, rms_norm_reference, operands, **options)


@paths
@given(data=st.data())
def test_layer_norm(path, data):
    shape = data.draw(shapes())
    operands = {
        "x": data.draw(tensor(shape)),
        "weight": data.draw(st.none() | tensor(shape[-1:])),
        "bias": data.draw(st.none() | tensor(shape[-1:])),
    }
    check(path, layer_norm, layer_norm_reference, operands, eps=data.draw(epsilons))


@paths
@given(data=st.data())
def test_gated_rms_norm(path, data):
    group = data.draw(st.integers(1, 24))
    shape = data.draw(shapes(st.integers(1, 3).map(lambda n: n * group)))
    operands = {
        "x": data.draw(tensor(shape)),
        "gate": data.draw(tensor(shape)),
        "weight": data.draw(tensor(shape[-1:])),
    }
    options = {
        "eps": data.draw(epsilons),
        "group_size": group,
        "gate_first": data.draw(st.booleans()),
        "cast_first": data.draw(st.booleans()),
        "activation": data.draw(st.sampled_from(["silu", "sigmoid"])),
    }
    check(path, gated_rms_norm, gated_rms_norm_reference, operands, **options)


GLUS = [
    (swiglu, swiglu_reference, {}),
    (geglu, geglu_reference, {"approximate": "none"}),
    (geglu, geglu_reference, {"approximate": "tanh"}),
]


@paths
@given(data=st.data())
def test_gated_linear_units(path, data):
    shape = data.draw(shapes())
    operands = {"gate": data.draw(tensor(shape)), "up": data.draw(tensor(shape))}
    function, reference, options = data.draw(st.sampled_from(GLUS))
    check(path, function, reference, operands, **options)


@paths
@given(data=st.data())
def test_rope(path, data):
    batch, length = data.draw(st.integers(1, 3)), data.draw(st.integers(0, 5))
    heads, kv_heads = data.draw(st.integers(1, 5)), data.draw(st.integers(0, 3))
    rotated = 2 * data.draw(st.integers(1, 9))
    width = rotated + data.draw(st.sampled_from([0, 1, 6]))
    narrow = data.draw(st.booleans())
    table = (data.draw(st.sampled_from([1, batch])), length, rotated // (2 if narrow else 1))
    table_dtype = st.just(data.draw(dtypes))
    operands = {
        "q": data.draw(tensor((batch, heads, length, width))),
        "k": data.draw(tensor((batch, kv_heads, length, width))),
    }
    tables = [data.draw(tensor(table, table_dtype)) for _ in range(2)]
    cos, sin = (view(base) for base, view in tables)
    interleaved = data.draw(st.booleans())
    options = {
        "interleaved": interleaved,
        "split": interleaved and data.draw(st.booleans()),
        "half_table": data.draw(st.booleans()),
        "narrow_table": narrow,
        "inverse": data.draw(st.booleans()),
        "trailing": data.draw(st.booleans()),
        "keep_dtype": data.draw(st.booleans()),
    }

    def of(function):
        def rotate(q, k, **options):  # in fp64 when q is
            tables = (t.double() if q.dtype == torch.float64 else t for t in (cos, sin))
            return function(q, k, *tables, **options)

        return rotate

    check(path, of(rope), of(rope_reference), operands, **options)


def cross_entropy_in_steps(logits, labels, weight, options):
    """The loss, with every step in the dtype of the logits: torch's own sums in fp64 on a CPU."""
    y = options.transform(logits)
    weight = torch.ones_like(y[0]) if weight is None else weight.to(y)
    top = y.amax(-1, keepdim=True).detach()
    log_total = (y - top).exp().sum(-1, keepdim=True).log()
    log_probs = y - top - log_total
    hard = F.nll_loss(log_probs, labels, weight, ignore_index=-100, reduction="none")
    smooth = -(weight * log_probs).mean(-1) * options.label_smoothing
    penalty = options.z_loss * (top + log_total).squeeze(-1).square()
    return (1 - options.label_smoothing) * hard + (smooth + penalty).where(labels != -100, 0.0)


@paths
@given(data=st.data())
def test_cross_entropy(path, data):
    tokens, vocab = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 40))
    logits = data.draw(tensor((tokens, vocab)))
    labels = torch.tensor(
        data.draw(
            st.lists(st.integers(0, vocab - 1) | st.just(-100), min_size=tokens, max_size=tokens)
        )
    )
    weight = data.draw(st.none() | st.just(torch.rand(vocab) + 0.1))
    options = LossOptions(
        label_smoothing=data.draw(st.sampled_from([0.0, 0.1])),
        z_loss=data.draw(st.sampled_from([0.0, 0.01])),
        scale=data.draw(st.sampled_from([1.0, 0.5])),
        softcap=data.draw(st.sampled_from([None, 5.0])),
    )
    reduction = data.draw(st.sampled_from(["none", "sum", "mean"]))

    def ours(logits):
        return cross_entropy(
            logits, labels, class_weight=weight, reduction=reduction, options=options
        )

    def reference(logits):
        loss = cross_entropy_in_steps(logits, labels, weight, options)
        if reduction == "none":
            return loss
        supervised = labels != -100
        weights = torch.ones(vocab) if weight is None else weight
        count = weights.double()[labels.clamp_min(0)][supervised].sum()
        if reduction == "sum" or not supervised.any():
            return loss.sum()
        return loss.sum() / count.to(loss.dtype)

    # The gradient of a likely label is p - 1; capped logits are differences of exponentials.
    check(path, ours, reference, {"logits": logits}, size=2.0 if options.softcap is None else 4.0)


@given(shape=shapes(), other=shapes(), dtype=dtypes)
def test_what_does_not_fit_raises_a_value_error(shape, other, dtype):
    x, y = torch.zeros(shape, dtype=dtype), torch.zeros(other, dtype=dtype)
    norms = [functools.partial(f, eps=1e-6) for f in (rms_norm, layer_norm)]
    calls = [functools.partial(norm, x, y) for norm in norms if y.shape != x.shape[-1:]]
    if x.shape != y.shape:
        calls += [functools.partial(f, x, y) for f in (swiglu, geglu)]
        calls.append(functools.partial(gated_rms_norm, x, y, x.new_zeros(shape[-1:]), eps=1e-6))
    calls += [functools.partial(norm, x.long()) for norm in norms]
    for call in calls:
        with pytest.raises(ValueError, match=r"_norm: |glu: "):
            call()
