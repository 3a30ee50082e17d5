"""GRPO and RLOO with the drop-in are those of TRL's own trainers, on the same completions."""

import math

import pytest
import torch
import trl_parity
from datasets import Dataset
from families import tiny_model

pytestmark = pytest.mark.usefixtures("every_size")

PROMPTS = ["what is two plus two ?", "cat", "tell the user what sat", "the mat ?"]
STOPS = list(range(2, 320, 12))  # so many ends of a completion that some come in time
GRPO = {
    "per_device_train_batch_size": 4,
    "per_device_eval_batch_size": 4,
    "num_generations": 4,
    "max_completion_length": 8,
    "steps_per_generation": 2,  # every second step has moved away from what was sampled
    "max_steps": 4,
    "learning_rate": 0.5,
}


class Reward:
    """The share of different characters; keeps every completion that it saw."""

    __name__ = "different_characters"

    def __init__(self):
        self.seen = []

    def __call__(self, completions, **_):
        self.seen += completions
        return [len(set(text)) / max(1, len(text)) for text in completions]


def length(completions, **_):
    return [math.sqrt(len(text)) for text in completions]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the reference is saved that TRL loads when there is a KL term."""
    return tmp_path_factory.mktemp("reference")


@pytest.fixture(scope="module")
def arguments(folder):
    """Makes functions that make the trainer's arguments afresh."""

    def make(model=trl_parity.policy, rewards=(Reward,), **more):
        def build():
            data = Dataset.from_dict({"prompt": PROMPTS})
            policy = trl_parity.policy_with_reference(folder, model)
            policy.generation_config.eos_token_id = STOPS
            return {
                "model": policy,
                "reward_funcs": [r() if isinstance(r, type) else r for r in rewards],
                "train_dataset": data,
                "eval_dataset": data.select(range(1)),
                **more,
            }

        return build

    return make


@pytest.fixture(scope="module")
def plain(arguments, tmp_path_factory):
    """TRL's own GRPO without any option."""
    return trl_parity.run("GRPO", tmp_path_factory.mktemp("plain"), arguments(), GRPO, flag=False)


def parity(method, tmp_path, build, config):
    got, expected = trl_parity.parity(method, tmp_path, build, config)
    assert completions(got) == completions(expected), "not the same completions"
    return got, expected


def completions(run) -> list[str]:
    return run.trainer.reward_funcs[0].seen


LOSSES = {
    "grpo": {},
    "bnpo": {},
    "dr_grpo": {},
    "luspo": {},
    "cispo": {"epsilon_high": 5.0},
    "sapo": {},
    "vespo": {},
}
OPTIONS = {
    "sequence importance": {"importance_sampling_level": "sequence"},
    "sequence importance and luspo": {
        "importance_sampling_level": "sequence",
        "loss_type": "luspo",
    },
    "kl": {"beta": 0.1},
    "kl without correction": {"beta": 0.1, "use_bias_correction_kl": False},
    "entropy bonus": {"entropy_coef": 0.1},
    "adaptive entropy bonus": {
        "entropy_coef": 0.1,
        "use_adaptive_entropy": True,
        "entropy_target": 9.0,  # never reached, so that the bonus is there in every step
    },
    "half of the tokens": {"top_entropy_quantile": 0.5},
    "entropy bonus on half of the tokens": {"top_entropy_quantile": 0.5, "entropy_coef": 0.1},
    "delta": {"delta": 1.05},
    "epsilon_high": {"epsilon_high": 0.4},
    "epsilon": {"epsilon": 0.02},
    "two iterations": {"num_iterations": 2},
    "truncated completions masked": {"mask_truncated_completions": True},
    "batch scale": {"scale_rewards": "batch"},
    "no scale": {"scale_rewards": "none"},
    "temperature": {"temperature": 0.7},
    "temperature, kl and entropy": {"temperature": 1.3, "beta": 0.1, "entropy_coef": 0.1},
    "off-policy mask": {"off_policy_mask_threshold": 0.001},
    "accumulation": {"gradient_accumulation_steps": 2},
    "accumulation, kl and grpo": {
        "gradient_accumulation_steps": 2,
        "beta": 0.1,
        "loss_type": "grpo",
    },
    "moving reference": {"beta": 0.1, "sync_ref_model": True, "ref_model_sync_steps": 1},
}


def test_default(plain, arguments, tmp_path):
    got, expected = parity("GRPO", tmp_path, arguments(), GRPO)
    seen = completions(expected)
    assert len(set(seen)) > len(seen) // 2, "completions that tell nothing"
    lengths = [entry.get("completions/min_length") for entry in got.log]
    assert lengths[0] < GRPO["max_completion_length"], "no completion ends before the limit"
    assert got.log[1]["clip_ratio/low_mean"] > 0
    assert got.log[3]["clip_ratio/high_mean"] > 0


def test_evaluation_samples_too(plain):
    assert "eval_reward" in plain.log[-1]


@pytest.mark.parametrize("loss_type", LOSSES)
def test_loss(loss_type, arguments, plain, tmp_path):
    config = GRPO | {"loss_type": loss_type, **LOSSES[loss_type]}
    if loss_type == "vespo":
        config["vllm_importance_sampling_mode"] = "token_truncate"  # TRL asks for it, unused here
    _, expected = parity("GRPO", tmp_path, arguments(), config)
    trl_parity.assert_far(expected, plain)


@pytest.mark.parametrize("config", OPTIONS.values(), ids=OPTIONS.keys())
def test_option(config, arguments, plain, tmp_path):
    _, expected = parity("GRPO", tmp_path, arguments(), GRPO | config)
    trl_parity.assert_far(expected, plain)


@pytest.mark.parametrize(
    "config",
    [{"gradient_checkpointing": True}, {"cast_lm_head_to_fp32": True}],
    ids=["checkpointing", "head in fp32"],
)
def test_option_that_changes_no_number(config, arguments, plain, tmp_path):
    got, _ = parity("GRPO", tmp_path, arguments(), GRPO | config)
    trl_parity.assert_same(got, plain)


@pytest.mark.parametrize("aggregation", ["sum_then_normalize", "normalize_then_sum"])
def test_two_rewards(aggregation, arguments, tmp_path):
    build = arguments(rewards=(Reward, length))
    config = GRPO | {"reward_weights": [1.0, 0.3], "multi_objective_aggregation": aggregation}
    got, _ = parity("GRPO", tmp_path, build, config)
    assert "rewards/length/mean" in got.log[0]


@pytest.mark.parametrize("method", ["GRPO", "RLOO"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_lora(method, checkpointing, arguments, tmp_path):
    """The reference is the model without its adapter."""
    build = arguments(peft_config=trl_parity.lora())
    config = GRPO | {"beta": 0.1, "gradient_checkpointing": checkpointing}
    got, _ = parity(method, tmp_path, build, config)
    assert all("lora" in name for name in got.gradients)
    assert got.log[0]["kl"] > 1e-3


@pytest.mark.parametrize("method", ["GRPO", "RLOO"])
def test_mixture_of_experts(method, arguments, tmp_path):
    def model():  # TRL asks for the router's logits; in generation they are in the way
        family = tiny_model("qwen3_moe", vocab_size=320, output_router_logits=False)
        return trl_parity.sharpen(family)

    got, _ = parity(method, tmp_path, arguments(model), GRPO | {"beta": 0.1})
    assert "aux_loss" in got.log[0]


@pytest.mark.parametrize("cast", [False, True])
def test_scores_in_bf16(cast, arguments, tmp_path):
    """What the losses get from the head, under autocast: as near to fp32 as TRL's own head."""
    ids = torch.randint(3, 320, (3, 12), generator=torch.Generator().manual_seed(1))

    def scores(flag, **config):
        config = GRPO | {"temperature": 0.8, "cast_lm_head_to_fp32": cast, **config}
        trainer = trl_parity.trainer("GRPO", tmp_path, arguments(), config, flag)
        mask = torch.ones_like(ids)
        score = trainer._get_per_token_logps_and_entropies
        return torch.stack(score(trainer.model, ids, mask, 9, compute_entropy=True)[:2])

    truth, expected = scores(flag=False), scores(flag=False, bf16=True)
    error = (scores(flag=True, bf16=True) - truth).norm()
    assert 0 < error <= 1.3 * (expected - truth).norm()


RLOO = {
    "": {},
    "kl": {"beta": 0.3},
    "no kl": {"beta": 0.0},
    "normalized advantages": {"normalize_advantages": True},
    "clipped rewards": {"reward_clip_range": (0.3, 0.9)},
    "two iterations": {"num_iterations": 2},
    "epsilon": {"epsilon": 0.02, "epsilon_high": 0.3},
    "truncated completions masked": {"mask_truncated_completions": True},
    "temperature": {"temperature": 0.7},
    "accumulation": {"gradient_accumulation_steps": 2},
}


@pytest.fixture(scope="module")
def plain_rloo(arguments, tmp_path_factory):
    return trl_parity.run("RLOO", tmp_path_factory.mktemp("plain"), arguments(), GRPO, flag=False)


@pytest.mark.parametrize("config", RLOO.values(), ids=RLOO.keys())
def test_rloo(config, arguments, plain_rloo, tmp_path):
    _, expected = parity("RLOO", tmp_path, arguments(), GRPO | config)
    if config:
        trl_parity.assert_far(expected, plain_rloo)


def test_runs_of_other_options_are_told_apart(arguments, plain, tmp_path):
    """The comparison is not satisfied by anything."""
    config = GRPO | {"entropy_coef": 1e-4}
    slightly = trl_parity.run("GRPO", tmp_path, arguments(), config)
    error, _ = trl_parity.distance(slightly._replace(log=[]), plain._replace(log=[]))
    assert error > 1
