"""Every family: full coverage or a stated reason, and the loss and gradients of the plain model."""

import copy

import pytest
import torch
from families import FAMILIES, batch, tiny_model
from shapes import Shapes

from liger_trainer import inject, restore
from liger_trainer.kernels.linear import head as linear_head
from liger_trainer.report import Status

ACTIVATION_RULE = {
    **dict.fromkeys(FAMILIES, "swiglu"),
    **dict.fromkeys(("gemma", "gemma2", "gemma3_text"), "geglu"),
    "gpt2": None,
}
NORM_RULE = {**dict.fromkeys(FAMILIES, "rms_norm"), "cohere": "layer_norm", "gpt2": "layer_norm"}


pytestmark = pytest.mark.usefixtures("every_size")


def loss_and_gradients(model, inputs):
    model.zero_grad()
    outputs = model(**inputs)
    outputs.loss.backward()
    return outputs, {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("family", FAMILIES)
def test_covered_and_equal_to_the_plain_model(family, device):
    model = tiny_model(family, device)
    plain = copy.deepcopy(model)
    report = inject(model, strict=True)

    layers = model.config.num_hidden_layers
    expected = {NORM_RULE[family], "fused_linear_cross_entropy"}
    if family != "gpt2":  # learned positions
        expected.add("rope")
        assert report.coverage["rope"] == (layers, layers)
    if rule := ACTIVATION_RULE[family]:
        expected.add(rule)
        assert report.coverage[rule] == (layers, layers)
    norms = sum("norm" in name or "ln_" in name for name, _ in model.named_parameters())
    norms -= sum(name.endswith(".bias") and "ln_" in name for name, _ in model.named_parameters())
    assert report.coverage[NORM_RULE[family]] == (norms, norms)
    of_the_model = {"activation_memory", "attention"}  # not of its parts
    covered = {rule for rule, c in report.coverage.items() if c.eligible}
    assert covered - of_the_model == expected
    assert not report.refused

    inputs = batch(device)
    outputs, gradients = loss_and_gradients(model, inputs)
    expected_outputs, expected_gradients = loss_and_gradients(plain, inputs)
    torch.testing.assert_close(outputs.loss, expected_outputs.loss, rtol=2e-6, atol=2e-6)
    assert outputs.logits._value is None, "nobody looked at the logits"
    for name, expected_gradient in expected_gradients.items():
        error = (gradients[name] - expected_gradient).norm() / expected_gradient.norm()
        assert error < 1e-5, name
    torch.testing.assert_close(outputs.logits, expected_outputs.logits, rtol=1e-4, atol=1e-5)


def test_gpt2_says_why_its_activation_stays():
    report = inject(tiny_model("gpt2"))
    rows = {(row.status, row.reason) for row in report.rows if not row.swapped}
    assert rows == {(Status.NOT_APPLICABLE, "NewGELUActivation has no gate")}


@pytest.mark.parametrize("family", FAMILIES)
def test_low_precision_is_as_good_as_the_plain_model(family, device):
    """bf16: nearer to the fp32 model, or at most a little farther, than the plain bf16 model."""
    exact = tiny_model(family, device)
    plain = copy.deepcopy(exact).to(torch.bfloat16)
    model = copy.deepcopy(plain)
    exact.load_state_dict(plain.state_dict())  # the same rounded weights
    inject(model)
    inputs = batch(device)
    _, truth = loss_and_gradients(exact, inputs)
    _, expected = loss_and_gradients(plain, inputs)
    outputs, got = loss_and_gradients(model, inputs)
    assert outputs.loss.dtype == torch.float32

    def error(gradients):
        pairs = [(gradients[name].float() - t).norm() / t.norm() for name, t in truth.items()]
        return torch.stack(pairs)

    # A router may pick another expert for a token in either model: compare the typical tensor.
    assert error(got).median() <= 1.3 * error(expected).median()


@pytest.mark.parametrize("family", ["llama", "gemma2", "cohere", "gpt2", "mixtral"])
def test_autocast_matches_the_plain_model(family, device):
    model = tiny_model(family, device)
    plain = copy.deepcopy(model)
    inject(model)
    inputs = batch(device)
    with torch.autocast(device, torch.bfloat16):
        outputs, got = loss_and_gradients(model, inputs)
        expected_outputs, expected = loss_and_gradients(plain, inputs)
    _, truth = loss_and_gradients(plain, inputs)
    assert outputs.logits.dtype == expected_outputs.logits.dtype
    error, allowed = (
        torch.stack([(g[name] - t).norm() / t.norm() for name, t in truth.items()]).median()
        for g in (got, expected)
    )
    assert error <= 1.3 * allowed


@pytest.mark.parametrize("family", FAMILIES)
def test_training_step_builds_no_full_logits(family, device, monkeypatch):
    """Neither forward nor backward holds a [tokens, vocabulary] tensor."""
    model = tiny_model(family, device, vocab_size=160)
    inject(model)
    inputs = batch(device)
    monkeypatch.setattr(linear_head, "workspace_rows", lambda *_, **__: 4)
    with Shapes() as shapes:
        model(**inputs).loss.backward()
    assert shapes.largest(160) <= 64, "64 is the transposed weight of the head"
    assert inputs["labels"].numel() * 160 > max(
        (
            s.numel()
            for s in shapes.seen
            if s and s[-1] == 160 and s != model.lm_head.weight.t().shape
        ),
        default=0,
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_restore_is_bit_identical_and_others_are_untouched(family):
    model = tiny_model(family)
    other = copy.deepcopy(model)
    inputs = batch()
    before, gradients = loss_and_gradients(model, inputs)
    inject(model)
    beside, beside_gradients = loss_and_gradients(other, inputs)
    restore(model)
    after, after_gradients = loss_and_gradients(model, inputs)
    for outputs, grads in ((beside, beside_gradients), (after, after_gradients)):
        assert type(outputs.logits) is torch.Tensor
        assert torch.equal(outputs.loss, before.loss)
        assert torch.equal(outputs.logits, before.logits)
        assert all(torch.equal(grads[name], gradients[name]) for name in gradients)
    assert [type(m) for m in model.modules()] == [type(m) for m in other.modules()]
    assert all(vars(a).keys() == vars(b).keys()
               for a, b in zip(model.modules(), other.modules(), strict=True))  # fmt: skip


@pytest.mark.parametrize("family", ["llama", "gemma2", "cohere"])
def test_packed_sequences_and_their_positions(family, device):
    """Positions that restart, one row of positions per sample."""
    model = tiny_model(family, device)
    plain = copy.deepcopy(model)
    inject(model)
    inputs = batch(device)
    del inputs["attention_mask"]
    positions = torch.arange(17, device=device).repeat(2, 1)
    positions[0, 6:] -= 6
    positions[1, 11:] -= 11
    inputs["position_ids"] = positions
    outputs, got = loss_and_gradients(model, inputs)
    expected_outputs, expected = loss_and_gradients(plain, inputs)
    torch.testing.assert_close(outputs.loss, expected_outputs.loss, rtol=2e-6, atol=2e-6)
    for name, gradient in expected.items():
        assert (got[name] - gradient).norm() <= 1e-5 * gradient.norm(), name


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen3_moe"])
def test_gradient_checkpointing(family, reentrant, device):
    model = tiny_model(family, device)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    plain = copy.deepcopy(model)
    for each in (model, plain):
        each.enable_input_require_grads()
    inject(model)
    inputs = batch(device)
    outputs, got = loss_and_gradients(model, inputs)
    expected_outputs, expected = loss_and_gradients(plain, inputs)
    torch.testing.assert_close(outputs.loss, expected_outputs.loss, rtol=2e-6, atol=2e-6)
    for name, gradient in expected.items():
        assert (got[name] - gradient).norm() <= 1e-5 * gradient.norm(), name


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_generates_the_same_text(family, device):
    model = tiny_model(family, device).eval()
    plain = copy.deepcopy(model)
    inject(model)
    prompt = batch(device)["input_ids"][:, :6]
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(prompt, **settings), plain.generate(prompt, **settings))
