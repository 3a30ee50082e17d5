import dataclasses
import math

import pytest
import torch
from oracle import assert_matches

from liger_trainer.kernels.logits import divergence as module
from liger_trainer.kernels.logits.divergence import divergence, token_divergence
from liger_trainer.kernels.logits.jensen_shannon import DivergenceOptions, divergence_reference

BETAS = [0.0, 0.1, 1.0]  # forward, a mixture with unequal shares, reverse; 0.5 is the default
CHANGES = {
    "plain": {},
    "student softcap": {"softcap": 4.0},
    "teacher softcap": {"teacher_softcap": 4.0},
    "everything": {
        "temperature": 0.7, "scale": 0.4, "softcap": 5.0,
        "teacher_scale": 1.5, "teacher_softcap": 3.0,
    },
}  # fmt: skip
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    """Several blocks of columns for the small vocabularies here, the last one not full."""
    monkeypatch.setattr(module, "_SIZES", (64, 1))


def problem(device, dtype=torch.float32, tokens=3, vocab=77):
    logits = (torch.randn(2, tokens, vocab) * 3).to(device, dtype)
    return {"student": logits[0], "teacher": logits[1]}


def plain(student, teacher, options):
    """(divergence, entropy) from probabilities, straight from the definition."""

    def probabilities(z, scale, softcap):
        z = z.to(torch.promote_types(z.dtype, torch.float32)) * scale
        z = z if softcap is None else softcap * torch.tanh(z / softcap)
        return torch.softmax(z / options.temperature, -1)

    def kl(p, q):
        return (p * (p / q).log()).sum(-1)

    p_s = probabilities(student, options.scale, options.softcap)
    p_t = probabilities(teacher, options.teacher_scale, options.teacher_softcap).to(p_s.dtype)
    beta = options.beta
    if beta == 0:
        value = kl(p_t, p_s)
    elif beta == 1:
        value = kl(p_s, p_t)
    else:
        m = (1 - beta) * p_s + beta * p_t
        value = beta * kl(p_t, m) + (1 - beta) * kl(p_s, m)
    return value, -(p_s * p_s.log()).sum(-1).detach()


class InPlace(torch.autograd.Function):
    """`token_divergence` whose gradient overwrites (a copy of) the student's logits."""

    @staticmethod
    def forward(ctx, student, teacher, options):
        grad = student.clone()
        mask = torch.ones(len(student), dtype=torch.bool, device=student.device)
        values, entropy = token_divergence(grad, teacher, mask, options, grad)
        ctx.save_for_backward(grad)
        ctx.mark_non_differentiable(entropy)
        return values, entropy

    @staticmethod
    def backward(ctx, g, _):
        return (ctx.saved_tensors[0] * g.unsqueeze(1)).to(ctx.saved_tensors[0].dtype), None, None


def assert_divergence(candidate, tensors, options):
    student, teacher = tensors["student"], tensors["teacher"]

    def with_entropy(fn):
        def run(student):
            values, entropy = fn(student, teacher.to(student.dtype), options)
            assert not entropy.requires_grad
            return values, entropy + 0 * values  # the oracle wants outputs with a gradient

        return run

    # Differences of logarithms survive a probability of 0 but round three times, `plain` once.
    assert_matches(with_entropy(candidate), with_entropy(plain), {"student": student}, factor=5.0)


@pytest.mark.parametrize("beta", [0.0, 0.5])  # the gradient of a mixture is that of reverse KL
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_in_place_matches_fp64(place, beta, change):
    assert_divergence(InPlace.apply, problem(place), DivergenceOptions(beta=beta, **change))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("beta", BETAS)
def test_public_function_matches_fp64(place, dtype, beta):
    options = DivergenceOptions(beta=beta, **CHANGES["everything"])
    tensors = problem(place, dtype)
    before = tensors["student"].clone()
    assert_divergence(divergence, tensors, options)
    assert_divergence(InPlace.apply, tensors, options)
    assert torch.equal(tensors["student"], before)


@pytest.mark.parametrize("beta", BETAS)
def test_without_gradient(place, beta):
    tensors, options = problem(place), DivergenceOptions(beta=beta)
    before = tensors["student"].clone()
    got = divergence(*tensors.values(), options)
    torch.testing.assert_close(got, plain(*tensors.values(), options))
    assert torch.equal(tensors["student"], before)


@pytest.mark.parametrize("vocab", [1, 2, 63, 64, 65, 128])
def test_any_size_of_vocabulary(place, vocab):
    tensors, options = problem(place, vocab=vocab), DivergenceOptions(softcap=6.0)
    leaf, twin = (tensors["student"].clone().requires_grad_() for _ in range(2))
    got = InPlace.apply(leaf, tensors["teacher"], options)
    expected = plain(twin, tensors["teacher"], options)
    torch.testing.assert_close(got, expected)
    got[0].sum().backward()
    expected[0].sum().backward()
    torch.testing.assert_close(leaf.grad, twin.grad)


@pytest.mark.parametrize("beta", BETAS)
def test_masked_rows_are_zero_whatever_they_hold(place, beta):
    options = DivergenceOptions(beta=beta)
    tensors = problem(place)
    mask = torch.tensor([1, 0, 1], device=place).bool()
    broken = {name: t.masked_fill(~mask.unsqueeze(1), float("nan")) for name, t in tensors.items()}
    grad = broken["student"]
    values, entropy = token_divergence(grad, broken["teacher"], mask, options, grad)
    leaf = tensors["student"].requires_grad_()
    expected = plain(leaf, tensors["teacher"], options)
    expected[0].sum().backward()
    for got, want in zip((values, entropy, grad), (*expected, leaf.grad), strict=True):
        keep = mask.view(-1, *[1] * (want.dim() - 1))
        torch.testing.assert_close(got, want.detach().where(keep, 0.0))


@pytest.mark.parametrize("student_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("teacher_dtype", [torch.float32, torch.bfloat16])
def test_dtypes_and_row_strides_of_the_sides_are_independent(place, student_dtype, teacher_dtype):
    options = DivergenceOptions()
    tensors = problem(place, torch.bfloat16)
    memory = tensors["student"].to(student_dtype).repeat(1, 2)
    student = memory[:, :77]
    teacher = tensors["teacher"].to(teacher_dtype).repeat_interleave(3, 0)[::3]
    leaf = tensors["student"].float().requires_grad_()
    expected = plain(leaf, tensors["teacher"], options)
    expected[0].sum().backward()
    mask = torch.ones(len(student), dtype=torch.bool, device=place)
    values, entropy = token_divergence(student, teacher, mask, options, student)
    torch.testing.assert_close((values, entropy), expected)
    torch.testing.assert_close(student, leaf.grad.to(student_dtype), rtol=1e-2, atol=1e-5)
    assert torch.equal(memory[:, 77:], tensors["student"].to(student_dtype))


@pytest.mark.parametrize("beta", BETAS)
def test_vocabulary_masked_on_both_sides_does_not_count(place, beta):
    options, tensors = DivergenceOptions(beta=beta), problem(place)
    student, teacher = (
        torch.cat([t.new_full((3, 70), -torch.inf), t, t.new_full((3, 3), -torch.inf)], 1)
        for t in tensors.values()
    )
    for function in (InPlace.apply, divergence):
        leaf, small = student.clone().requires_grad_(), tensors["student"].clone().requires_grad_()
        got, expected = function(leaf, teacher, options), plain(small, tensors["teacher"], options)
        torch.testing.assert_close(got, expected)
        got[0].sum().backward()
        expected[0].sum().backward()
        torch.testing.assert_close(leaf.grad[:, 70:-3], small.grad)
        assert not leaf.grad[:, :70].any()
        assert not leaf.grad[:, -3:].any()


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("masked", ["student", "teacher"])
@pytest.mark.parametrize("far", [-torch.inf, -1e9])
def test_vocabulary_masked_on_one_side(place, beta, masked, far):
    """The limit of probabilities that go to 0; infinite only where the definition is."""
    options, tensors = DivergenceOptions(beta=beta), problem(place)
    tensors[masked][:, 3] = far
    p = {name: torch.softmax(t.double(), -1) for name, t in tensors.items()}
    log = {name: torch.log_softmax(t.double(), -1) for name, t in tensors.items()}
    m = (1 - beta) * p["student"] + beta * p["teacher"]
    shares = {0.0: (0.0, 1.0), 1.0: (1.0, 0.0)}.get(beta, (1 - beta, beta))
    log_m = {0.0: log["student"], 1.0: log["teacher"]}.get(beta, m.log())
    terms = [
        share * (p[name] * (log[name] - log_m)).masked_fill(p[name] == 0, 0.0).sum(-1)
        for name, share in zip(p, shares, strict=True)
        if share
    ]
    expected = sum(terms).float()
    infinite = far == -torch.inf and (beta, masked) in [(0.0, "student"), (1.0, "teacher")]
    assert bool(torch.isinf(expected).all()) == infinite
    for function in (InPlace.apply, divergence):
        leaf = tensors["student"].clone().requires_grad_()
        values, entropy = function(leaf, tensors["teacher"], options)
        torch.testing.assert_close(values, expected)
        assert torch.isfinite(entropy).all()
        values.sum().backward()
        if not infinite:
            assert torch.isfinite(leaf.grad).all()
            assert leaf.grad[:, 4:].any()


@pytest.mark.parametrize("beta", BETAS)
def test_far_apart_and_equal_distributions(place, beta):
    options = DivergenceOptions(beta=beta)
    student = torch.zeros(3, 40, device=place)
    teacher = torch.zeros(3, 40, device=place)
    student[0, 2] = teacher[0, 5] = 1e4  # each certain of another token
    student[1] = teacher[1] = torch.linspace(-80, 80, 40, device=place)  # equal
    student[2], teacher[2] = -1e4, 1e4  # both uniform
    leaf = student.requires_grad_()
    values, entropy = InPlace.apply(leaf, teacher, options)
    values.sum().backward()
    h = 0.0 if beta in (0, 1) else -(1 - beta) * math.log(1 - beta) - beta * math.log(beta)
    certain = 1e4 if beta in (0, 1) else h
    torch.testing.assert_close(values.cpu(), torch.tensor([certain, 0.0, 0.0]))
    torch.testing.assert_close(entropy[2].item(), math.log(40))
    assert torch.isfinite(leaf.grad).all()
    torch.testing.assert_close(leaf.grad[1:], torch.zeros_like(leaf.grad[1:]), atol=1e-6, rtol=0)


@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("beta", BETAS)
def test_broken_logits_are_never_a_silent_number(place, side, beta):
    tensors = list(problem(place).values())
    tensors[side][1, 5] = float("nan")
    values, _ = divergence(*tensors, DivergenceOptions(beta=beta))
    assert torch.isnan(values[1])
    assert torch.isfinite(values[[0, 2]]).all()


def test_any_strides_and_shapes(place):
    options = DivergenceOptions(beta=0.3)
    student, teacher = torch.randn(2, 2, 40, 3, device=place).transpose(-1, -2)
    leaf, twin = (student.clone().requires_grad_() for _ in range(2))
    got, expected = divergence(leaf, teacher, options), plain(twin, teacher, options)
    assert got[0].shape == got[1].shape == (2, 3)
    torch.testing.assert_close(got, expected)
    weight = torch.rand(2, 3, device=place)
    (got[0] * weight).sum().backward()
    (expected[0] * weight).sum().backward()
    torch.testing.assert_close(leaf.grad, twin.grad)
    assert divergence(student[:0], teacher[:0])[0].shape == (0, 3)


def test_gradient_of_strided_rows(place):
    """Logits that are part of a wider tensor; their gradient is not."""
    wide = torch.randn(3, 100, device=place, requires_grad=True)
    narrow = wide[:, 5:82].detach().clone().requires_grad_()
    teacher = problem(place)["teacher"]
    for student in (wide[:, 5:82], narrow):
        divergence(student, teacher)[0].sum().backward()
    torch.testing.assert_close(wide.grad[:, 5:82], narrow.grad)


@pytest.mark.parametrize("beta", BETAS)
def test_reference_gradient_agrees_with_finite_differences(beta):
    tensors = problem("cpu", torch.float64, tokens=2, vocab=9)
    if beta < 1:
        tensors["teacher"][0, 3] = -torch.inf
    options = DivergenceOptions(beta=beta, softcap=5.0, temperature=1.5)
    assert torch.autograd.gradcheck(
        lambda z: divergence_reference(z, tensors["teacher"], options)[0],
        tensors["student"].requires_grad_(),
    )


def test_compiles_to_one_graph_for_all_lengths(place):
    def step(student, teacher):
        values, entropy = divergence(student, teacher, DivergenceOptions(softcap=7.0))
        return values + entropy

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for tokens in (3, 4, 5):
        student, teacher = problem(place, tokens=tokens).values()
        leaf, twin = (student.clone().requires_grad_() for _ in range(2))
        with torch._dynamo.config.patch(error_on_recompile=tokens != 3):
            compiled(leaf, teacher).sum().backward()
        step(twin, teacher).sum().backward()
        torch.testing.assert_close(leaf.grad, twin.grad)


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_agrees_with_trl(place, beta, temperature):
    gkd = pytest.importorskip("trl.experimental.gkd")
    student, teacher = problem(place).values()
    leaf, twin = (student.clone().requires_grad_() for _ in range(2))
    labels = torch.zeros(len(student), dtype=torch.long, device=place)
    expected = gkd.GKDTrainer.generalized_jsd_loss(
        leaf, teacher, labels, beta=beta, temperature=temperature
    )
    got = divergence(twin, teacher, DivergenceOptions(beta, temperature))[0].mean()
    torch.testing.assert_close(got, expected)
    expected.backward()
    got.backward()
    torch.testing.assert_close(twin.grad, leaf.grad)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"beta": -0.1}, "beta"),
        ({"beta": 1.1}, "beta"),
        ({"beta": float("nan")}, "beta"),
        ({"temperature": 0.0}, "temperature"),
        ({"temperature": float("inf")}, "temperature"),
        ({"softcap": 0.0}, "softcap"),
        ({"teacher_softcap": -1.0}, "softcap"),
        ({"scale": float("inf")}, "scale"),
        ({"teacher_scale": float("nan")}, "scale"),
    ],
)
def test_refuses_options_without_meaning(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(DivergenceOptions(), **change)


def test_refuses_input_that_does_not_fit():
    student, teacher = problem("cpu").values()
    with pytest.raises(ValueError, match="same tokenizer"):
        divergence(student, teacher[:, :-1])
    with pytest.raises(ValueError, match="a row for each token"):
        divergence(student, teacher[:-1])
    with pytest.raises(ValueError, match="student_logits must be floating"):
        divergence(student.long(), teacher)
    with pytest.raises(ValueError, match="teacher_logits must be floating"):
        divergence(student, teacher.long())
    with pytest.raises(ValueError, match="on meta"):
        divergence(student, teacher.to("meta"))
    with pytest.raises(ValueError, match=r"torch\.no_grad"):
        divergence(student, teacher.clone().requires_grad_())


@pytest.mark.gpu
def test_above_two_to_the_31_elements():
    rows, vocab = 16500, 131072
    teacher = torch.empty(rows, vocab, device="cuda", dtype=torch.bfloat16).normal_()
    student = torch.empty_like(teacher).normal_()
    last = student[-2:].clone().requires_grad_()
    mask = torch.ones(rows, dtype=torch.bool, device="cuda")
    options = DivergenceOptions()
    token_divergence(student, teacher, mask, options, student)
    plain(last, teacher[-2:], options)[0].sum().backward()
    torch.testing.assert_close(student[-2:], last.grad, atol=1e-9, rtol=2e-2)
