"""What the drop-in's head says of a token is what the model's own logits say, in every family.

The judge is the plain model, not TRL: TRL's own head reads scales and softcaps from the config and
multiplies by the weight of the last layer, which is wrong or fails for some of these.
"""

import copy

import pytest
import torch
import trl_parity
from datasets import Dataset
from families import FAMILIES, batch
from more_families import IMAGE_TEXT, MORE, model

pytestmark = pytest.mark.usefixtures("every_size")


def trainer(method, made, folder, **config):
    """A trainer that is only built, for the head that it gives its model."""
    rows = [{"prompt": "cat", "chosen": " sat", "rejected": " mat"}]

    def build():
        arguments = {"model": made, "train_dataset": Dataset.from_list(rows)}
        if method == "DPO":
            return arguments | {"ref_model": copy.deepcopy(made)}
        return arguments | {"reward_funcs": [lambda completions, **_: [0.0] * len(completions)]}

    return trl_parity.trainer(method, folder, build, config)


def scores(logits, labels):
    """Log-probability, entropy, mean logit, and whether the label is on top; 0 without a label."""
    mask, target = labels[:, 1:] != -100, labels[:, 1:].clamp(min=0)
    logits = logits[:, :-1].float()
    log_p = logits.log_softmax(-1)
    made = {
        "log_probs": log_p.gather(-1, target[..., None])[..., 0],
        "entropy": -(log_p.exp() * log_p).sum(-1),
        "mean_logits": logits.mean(-1).detach(),
        "is_top1": (logits.argmax(-1) == target).float(),
    }
    return {name: value.masked_fill(~mask, 0) for name, value in made.items()}


def gradients(objective, parameters):
    found = torch.autograd.grad(objective, list(parameters.values()), allow_unused=True)
    named = zip(parameters, found, strict=True)
    return {name: g for name, g in named if g is not None and g.any()}


@pytest.mark.parametrize("family", [*FAMILIES, *MORE, *IMAGE_TEXT])
def test_head_says_what_the_logits_say(family, tmp_path):
    made = model(family)
    plain = copy.deepcopy(made)
    inputs = batch()
    built = trainer("DPO", made, tmp_path)
    outputs = built.model(**inputs, fused_lm_head=True)
    labels = inputs.pop("labels")
    expected = scores(plain(**inputs).logits, labels)
    for name, value in expected.items():
        torch.testing.assert_close(getattr(outputs, name).float(), value, rtol=1e-5, atol=1e-5)
    count = (labels[:, 1:] != -100).sum()
    router = outputs.loss + outputs.log_probs.sum() / count  # the loss has the router's too
    expected_router = getattr(made.config, "router_aux_loss_coef", 0.0) * (outputs.aux_loss or 0.0)
    torch.testing.assert_close(router, torch.as_tensor(expected_router), rtol=1e-5, atol=1e-5)

    weights = torch.rand(labels[:, 1:].shape, generator=torch.Generator().manual_seed(2))
    want = gradients((weights * expected["log_probs"]).sum(), dict(plain.named_parameters()))
    have = gradients((weights * outputs.log_probs).sum(), dict(made.named_parameters()))
    assert have.keys() == want.keys()
    for name, gradient in want.items():
        assert (have[name] - gradient).norm() <= 1e-5 * gradient.norm() + 1e-6, name


@pytest.mark.parametrize("family", ["llama", "gemma2", "cohere", "granite"])
def test_temperature_divides_what_the_model_makes_of_its_logits(family, tmp_path):
    made = model(family)
    plain = copy.deepcopy(made)
    inputs = batch()
    config = {"temperature": 0.7, "num_generations": 2}
    outputs = trainer("GRPO", made, tmp_path, **config).model(**inputs, fused_lm_head=True)
    labels = inputs.pop("labels")
    expected = scores(plain(**inputs).logits / 0.7, labels)
    for name in ("log_probs", "entropy"):
        torch.testing.assert_close(getattr(outputs, name), expected[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gemma2", "cohere", "bert", "mixtral"])
def test_without_the_request_the_model_is_as_before(family, tmp_path):
    """Logits, loss and generation do not go through the head's interface."""
    made = model(family)
    plain = copy.deepcopy(made)
    built = trainer("DPO", made, tmp_path)
    inputs = batch()
    got, expected = built.model(**inputs), plain(**inputs)
    torch.testing.assert_close(got.loss, expected.loss, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got.logits, expected.logits, rtol=1e-4, atol=1e-5)


def test_shifted_labels_are_not_shifted_again(tmp_path):
    """As under context parallelism: one more position, none shifted."""
    made = model("gemma2")
    plain = copy.deepcopy(made)
    inputs = batch()
    labels = inputs.pop("labels")
    shifted = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
    built = trainer("DPO", made, tmp_path)
    outputs = built.model(**inputs, shift_labels=shifted, fused_lm_head=True, num_items_in_batch=50)
    expected = scores(plain(**inputs).logits, labels)["log_probs"]
    torch.testing.assert_close(outputs.log_probs[:, :-1], expected, rtol=1e-5, atol=1e-5)
    assert not outputs.log_probs[:, -1].any()
    torch.testing.assert_close(outputs.loss, -expected.sum() / 50, rtol=1e-5, atol=1e-5)
    assert torch.equal(outputs.label_mask, shifted != -100)
