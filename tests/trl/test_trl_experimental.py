"""ORPO, CPO, SimPO, TPO, GKD, distillation and GMPO are those of TRL's own trainers."""

import pytest
import trl_parity
from datasets import Dataset
from families import tiny_model

pytestmark = pytest.mark.usefixtures("every_size")


def preference(model=trl_parity.policy, third=False, **more):
    """A function that makes the arguments of ORPO, CPO and (with a third answer) TPO afresh."""

    def build():
        rows = [{"prompt": p, "chosen": c, "rejected": r} for p, c, r in trl_parity.ROWS]
        if third:
            rows = [row | {"reference": " it is" + row["chosen"]} for row in rows]
        data = Dataset.from_list(rows)
        return {
            "model": model(),
            "train_dataset": data,
            "eval_dataset": data.select(range(3)),
        } | more

    return build


def teacher():
    """Wider than the student, with another head."""
    return trl_parity.policy(seed=5, hidden_size=96, num_attention_heads=6)


def chats(**more):
    """A function that makes GKD's arguments afresh."""

    def build():
        rows = [
            [{"role": "user", "content": p}, {"role": "assistant", "content": c.strip()}]
            for p, c, _ in trl_parity.ROWS
        ]
        data = Dataset.from_list([{"messages": messages} for messages in rows])
        return {
            "model": trl_parity.policy(),
            "teacher_model": teacher(),
            "train_dataset": data,
            "eval_dataset": data.select(range(3)),
            **more,
        }

    return build


def prompts(**more):
    """A function that makes the arguments of trainers that sample afresh."""

    def build():
        data = Dataset.from_list([{"prompt": prompt} for prompt, _, _ in trl_parity.ROWS])
        model = trl_parity.policy()
        model.generation_config.eos_token_id = list(range(2, 320, 12))
        return {
            "model": model,
            "train_dataset": data,
            "eval_dataset": data.select(range(2)),
            **more,
        }

    return build


def check(method, build, config, tmp_path, shared=()):
    """Parity, and that the options do something: `shared` are those that the plain run has too."""
    got, expected = trl_parity.parity(method, tmp_path, build, config)
    if config.keys() - set(shared):
        common = {name: config[name] for name in shared}
        plain = trl_parity.run(method, tmp_path / "plain", build, common, flag=False)
        trl_parity.assert_far(expected, plain)
    return got


ORPO = {
    "default": {},
    "beta": {"beta": 0.4},
    "accumulation": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2},
    "truncation": {"max_length": 20},
}


@pytest.mark.parametrize("config", ORPO.values(), ids=ORPO.keys())
def test_orpo(config, tmp_path):
    got = check("ORPO", preference(), config, tmp_path)
    assert {"log_odds_ratio", "nll_loss", "rewards/margins"} <= got.log[0].keys()


CPO = {
    "default": {},
    "beta": {"beta": 0.4},
    "label_smoothing": {"label_smoothing": 0.2},
    "hinge": {"loss_type": "hinge"},
    "ipo": {"loss_type": "ipo"},
    "cpo_alpha": {"cpo_alpha": 0.3},
    "no nll": {"cpo_alpha": 0.0},
    "simpo": {"loss_type": "simpo", "cpo_alpha": 0.0},
    "simpo, gamma": {"loss_type": "simpo", "cpo_alpha": 0.0, "simpo_gamma": 1.5, "beta": 2.0},
    "simpo, smoothed": {"loss_type": "simpo", "cpo_alpha": 0.0, "label_smoothing": 0.1},
    "simpo with nll": {"loss_type": "simpo", "cpo_alpha": 0.5},
    "alpha": {"loss_type": "alphapo", "alpha": 0.25, "cpo_alpha": 0.0},
    "negative alpha": {"loss_type": "alphapo", "alpha": -0.1, "cpo_alpha": 0.0},
    "accumulation": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2},
}


@pytest.mark.parametrize("config", CPO.values(), ids=CPO.keys())
def test_cpo(config, tmp_path):
    check("CPO", preference(), config, tmp_path)


TPO = {
    "default": {},
    "beta": {"beta": 0.2},
    "label_smoothing": {"label_smoothing": 0.2, "beta": 0.2},
    "hinge": {"loss_type": "hinge", "beta": 0.2},
    "ipo": {"loss_type": "ipo"},
    "tpo-l": {"loss_type": "tpo-l", "tpo_l_gamma": 0.3, "beta": 0.2},
    "tpo_alpha": {"tpo_alpha": 0.4},
    "no nll": {"tpo_alpha": 0.0},
}


@pytest.mark.parametrize("config", TPO.values(), ids=TPO.keys())
def test_tpo(config, tmp_path):
    check("TPO", preference(third=True), config, tmp_path)


@pytest.mark.parametrize("method", ["ORPO", "CPO", "TPO"])
def test_lora(method, tmp_path):
    build = preference(third=method == "TPO", peft_config=trl_parity.lora())
    got = check(method, build, {}, tmp_path)
    assert all("lora" in name for name in got.gradients)


@pytest.mark.parametrize("method", ["ORPO", "CPO"])
def test_mixture_of_experts(method, tmp_path):
    def model():
        return trl_parity.sharpen(tiny_model("mixtral", vocab_size=320))

    check(method, preference(model), {}, tmp_path)


GKD = {
    "default": {},
    "forward": {"beta": 0.0},
    "reverse": {"beta": 1.0},
    "beta 0.1": {"beta": 0.1},
    "accumulation": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2},
}


@pytest.mark.parametrize("config", GKD.values(), ids=GKD.keys())
def test_gkd(config, tmp_path):
    check("GKD", chats(), {"lmbda": 0.0, **config}, tmp_path, shared=("lmbda",))


@pytest.mark.parametrize("temperature", [0.9, 2.0])
def test_gkd_on_what_the_student_says(temperature, tmp_path):
    """TRL's temperature is that of sampling; the loss has none."""
    config = {"lmbda": 1.0, "max_new_tokens": 6, "temperature": temperature}
    check("GKD", chats(), config, tmp_path, shared=("lmbda", "max_new_tokens", "temperature"))


DISTILLATION = {
    "default": {},
    "forward": {"beta": 0.0},
    "jensen-shannon": {"beta": 0.5},
    "temperature": {"temperature": 0.7},
    "accumulation": {"gradient_accumulation_steps": 2},
}


@pytest.mark.parametrize("config", DISTILLATION.values(), ids=DISTILLATION.keys())
def test_distillation(config, tmp_path):
    build = prompts()
    config = {"max_completion_length": 6, **config}
    check(
        "Distillation",
        lambda: build() | {"teacher_model": teacher()},
        config,
        tmp_path,
        shared=("max_completion_length",),
    )


def different_characters(completions, **_):
    return [len(set(text)) / max(1, len(text)) for text in completions]


GMPO = {"default": {}, "epsilon": {"epsilon": 0.02}, "temperature": {"temperature": 0.7}}


@pytest.mark.parametrize("config", GMPO.values(), ids=GMPO.keys())
def test_gmpo(config, tmp_path):
    shared = {
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4,
        "num_generations": 4,
        "max_completion_length": 6,
        "steps_per_generation": 2,
        "learning_rate": 1.0,
    }
    build = prompts(reward_funcs=[different_characters])
    check("GMPO", build, shared | config, tmp_path, shared=tuple(shared))
