"""What the drop-in's head says of a token is what the model's own logits say, in every family.

The judge is the plain model, not TRL: TRL's own head reads scales and softcaps from the config and
multiplies by the weight of the last layer, which is wrong or fails for some of these.
"""

import copy

import pytest
import torch
import trl_parity
from datasets import Dataset
from families import _SMALL, FAMILIES, batch, tiny_model
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
)

pytestmark = pytest.mark.usefixtures("every_size")

_DECODER = {"is_decoder": True, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
MORE = {
    "falcon_h1": {
        "lm_head_multiplier": 0.5,
        "mamba_d_ssm": 64,
        "mamba_n_heads": 4,
        "mamba_d_head": 16,
        "mamba_n_groups": 1,
        "mamba_d_state": 16,
        "mamba_chunk_size": 16,
    },
    "hyperclovax": {"logits_scaling": 0.5},
    "minicpm3": {
        "dim_model_base": 16,
        "num_key_value_heads": 4,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8,
        "v_head_dim": 16,
    },
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "nanochat": {},
    # TRL's own head is wrong for those below. A scale that the config has and the model ignores:
    "mpt": {"logit_scale": 0.5},
    # A softcap or scale under a name of its own:
    "recurrent_gemma": {
        "num_hidden_layers": 3,
        "lru_width": 64,
        "attention_window_size": 8,
        "logits_soft_cap": 5.0,
    },
    "xlstm": {"num_heads": 4, "qk_dim_factor": 1.0, "output_logit_soft_cap": 5.0},
    "inkling_text": {
        "logits_mup_width_multiplier": 4.0,
        "moe_intermediate_size": 32,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "head_dim": 16,
        "swa_head_dim": 16,
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 2,
        "sliding_window_size": 8,
    },
    # A backbone under a name of its own:
    "llama4_text": {"num_local_experts": 4},
    # A dense layer before the last one:
    "modernbert-decoder": {},
    "bert": _DECODER,
    "roberta": _DECODER,
    "rembert": _DECODER,
}


def chameleon():
    """Masks the tokens of images after the head, which TRL's own head does not."""
    quantizer = {"embed_dim": 16, "num_embeddings": 8, "base_channels": 32, "resolution": 16}
    quantizer |= {"channel_multiplier": [1], "num_res_blocks": 1, "latent_channels": 16}
    images = {f"IMGIMG{letter}Z": 100 + i for i, letter in enumerate("ABCDEFGH")}
    sizes = _SMALL | {"vq_config": quantizer, "vocabulary_map": {"<image>": 5, **images}}
    return AutoConfig.for_model("chameleon", **sizes)


def gemma3():
    """Has a softcap in its config which it does not apply, but TRL's own head does."""
    text = _SMALL | {"head_dim": 16, "sliding_window": 8, "final_logit_softcapping": 5.0}
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    vision |= {"num_attention_heads": 2, "image_size": 16, "patch_size": 8}
    sizes = {"text_config": text, "vision_config": vision, "mm_tokens_per_image": 4}
    return AutoConfig.for_model("gemma3", **sizes)


IMAGE_TEXT = {"chameleon": chameleon, "gemma3": gemma3}


def model(family):
    torch.manual_seed(0)
    if family in IMAGE_TEXT:
        made = AutoModelForImageTextToText.from_config(IMAGE_TEXT[family]())
    elif family in MORE:
        if family not in CONFIG_MAPPING:
            pytest.skip("this release of transformers does not have it")
        config = AutoConfig.for_model(family, **_SMALL | MORE[family])
        made = AutoModelForCausalLM.from_config(config)
    else:
        made = tiny_model(family)
    return trl_parity.sharpen(made.train(), scale=0.5)


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
