"""DPO with the drop-in is DPO with TRL's own trainer: losses, metrics, gradients, weights."""

import pytest
import tiny
import torch
import trl_parity
from datasets import Dataset
from families import tiny_model
from peft import get_peft_model

pytestmark = pytest.mark.usefixtures("every_size")

ROWS = [
    ("what is two plus two ?", " four .", " the mat ."),
    ("cat ?", " the cat sat on the mat and is two", " no"),
    ("what sat on the mat ? tell the user .", " cat", " think about what the system is ."),
    ("user", " assistant system", " two plus two is four , user ."),
    ("the", " cat sat on", " user think ?"),
    ("two plus", " two", " two plus two plus two plus two"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the references are saved that TRL loads for a policy without an explicit one."""
    return tmp_path_factory.mktemp("reference")


@pytest.fixture(scope="module")
def arguments(folder):
    """Makes functions that make the trainer's arguments afresh."""

    def make(model=trl_parity.policy, ref_model=None, **more):
        def build():
            rows = [dict(zip(("prompt", "chosen", "rejected"), row, strict=True)) for row in ROWS]
            data = Dataset.from_list(rows)
            return {
                "model": trl_parity.policy_with_reference(folder, model),
                "ref_model": ref_model and ref_model(),
                "train_dataset": data,
                "eval_dataset": data.select(range(3)),
                **more,
            }

        return build

    return make


@pytest.fixture(scope="module")
def plain(arguments, tmp_path_factory):
    """TRL's own trainer with no option but the sizes of the batches."""
    folder, made = tmp_path_factory.mktemp("plain"), {}

    def get(config=()):
        sizes = {key: config[key] for key in config if "batch_size" in key}
        if (key := str(sizes)) not in made:
            made[key] = trl_parity.run("DPO", folder, arguments(), sizes, flag=False)
        return made[key]

    return get


@pytest.fixture(scope="module")
def reference(folder, plain):
    """Loads the reference that TRL loads."""
    plain()
    return lambda: trl_parity.policy().from_pretrained(folder / "llama")


LOSSES = {
    "hinge": {},
    "ipo": {},
    "exo_pair": {"label_smoothing": 0.01},
    "nca_pair": {},
    "robust": {"label_smoothing": 0.2},
    "bco_pair": {},
    "sppo_hard": {},
    "aot": {"per_device_train_batch_size": 6},  # of few pairs, sorting may change none
    "aot_unpaired": {"per_device_train_batch_size": 6},
    "apo_zero": {},
    "apo_down": {},
    "discopop": {},
    "sft": {},
    "sigmoid_norm": {},
}
OPTIONS = {
    "beta": {"beta": 0.3},
    "forward_kl": {"f_divergence_type": "forward_kl"},
    "js_divergence": {"f_divergence_type": "js_divergence"},
    "alpha_divergence": {"f_divergence_type": "alpha_divergence"},
    "alpha 0.8": {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.8},
    "forward_kl and ipo": {"f_divergence_type": "forward_kl", "loss_type": ["ipo"]},
    "js_divergence and sft": {
        "f_divergence_type": "js_divergence",
        "loss_type": ["sigmoid", "sft"],
    },
    "discopop_tau": {"loss_type": ["discopop"], "discopop_tau": 0.5},
    "aot smoothed": {"loss_type": ["aot"], "label_smoothing": 0.1},
    "aot_unpaired smoothed": {"loss_type": ["aot_unpaired"], "label_smoothing": 0.1},
    "robust, flipped labels": {"loss_type": ["robust"], "label_smoothing": 0.4},
    "ld_alpha": {"ld_alpha": 0.4},
    "ld_alpha 0": {"ld_alpha": 0.0},
    "weighting": {"use_weighting": True},
    "weighted ipo": {"use_weighting": True, "loss_type": ["ipo"]},
    "two losses": {"loss_type": ["sigmoid", "sft"]},
    "three weighted losses": {
        "loss_type": ["sigmoid", "bco_pair", "sft"],
        "loss_weights": [0.8, 0.2, 1.0],
    },
    # Not with hinge: TRL multiplies the result of its relu in place, and its backward fails.
    "weighting of two losses": {"loss_type": ["sigmoid", "nca_pair"], "use_weighting": True},
    "accumulation": {"gradient_accumulation_steps": 3, "per_device_train_batch_size": 1},
    "truncation": {"max_length": 9},
    "moving reference": {"sync_ref_model": True, "ref_model_sync_steps": 1},
}


def test_default(arguments, tmp_path):
    got, _ = trl_parity.parity("DPO", tmp_path, arguments())
    assert {"logps/chosen", "rewards/margins", "entropy", "logits/rejected"} <= got.log[0].keys()


def test_token_accuracy_that_is_not_zero(arguments, tmp_path):
    """Answers that begin with what the policy itself would say."""
    tokenizer, policy = tiny.tokenizer(), trl_parity.policy()
    rows = []
    for prompt in ("on the mat", "system", "user", "two plus"):
        logits = policy(**tokenizer(prompt, return_tensors="pt")).logits
        said = tokenizer.decode(logits[0, -1:].argmax(-1))
        rows.append({"prompt": prompt, "chosen": f"{said} cat", "rejected": " mat"})
    build = arguments(train_dataset=Dataset.from_list(rows))
    _, expected = trl_parity.parity("DPO", tmp_path, build)
    assert 0 < expected.log[0]["mean_token_accuracy"] < 1


@pytest.mark.parametrize("loss_type", LOSSES)
def test_loss(loss_type, arguments, plain, tmp_path):
    config = {"loss_type": [loss_type], **LOSSES[loss_type]}
    # DiscoPOP divides the log-ratio by 0.05, and rounding with it.
    tolerance = trl_parity.Tolerance(relative=1e-4 if loss_type == "discopop" else 2e-5)
    _, expected = trl_parity.parity("DPO", tmp_path, arguments(), config, tolerance)
    trl_parity.assert_far(expected, plain(config))


@pytest.mark.parametrize("config", OPTIONS.values(), ids=OPTIONS.keys())
def test_option(config, arguments, plain, tmp_path):
    _, expected = trl_parity.parity("DPO", tmp_path, arguments(), config)
    trl_parity.assert_far(expected, plain(config))


@pytest.mark.parametrize(
    "config",
    [
        {"gradient_checkpointing": True},
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
        {"pad_to_multiple_of": 16},
        {"padding_free": True},  # TRL warns that it is not there, and pads
    ],
    ids=["checkpointing", "reentrant checkpointing", "padding", "padding_free"],
)
def test_option_that_changes_no_number(config, arguments, plain, tmp_path):
    got, _ = trl_parity.parity("DPO", tmp_path, arguments(), config)
    got.log[2]["total_flos"] = plain().log[2]["total_flos"]  # counts padding
    trl_parity.assert_same(got, plain())


def test_explicit_reference_equals_the_loaded_one(arguments, plain, reference, tmp_path):
    got, _ = trl_parity.parity("DPO", tmp_path, arguments(ref_model=reference))
    trl_parity.assert_same(got, plain())


@pytest.mark.parametrize("options", [{}, {"ld_alpha": 0.4}], ids=["", "ld_alpha"])
def test_reference_ahead_of_training(options, arguments, reference, tmp_path, monkeypatch):
    """With a given reference, the same as computing it in every step."""
    build = arguments(ref_model=reference)
    config = {"precompute_ref_log_probs": True, **options}
    trainer_class, _ = trl_parity.classes("DPO", flag=True)
    compute, batches = trainer_class.compute_ref_log_probs, []

    def counted(self, model, inputs):
        batches.append(type(self))
        return compute(self, model, inputs)

    monkeypatch.setattr(trainer_class, "compute_ref_log_probs", counted)
    got, _ = trl_parity.parity("DPO", tmp_path, build, config)
    assert batches == [trainer_class] * 5, "3 batches to train on and 2 to evaluate, no cached ones"
    in_every_step = trl_parity.run("DPO", tmp_path, build, options, flag=False)
    trl_parity.assert_same(got, in_every_step)


@pytest.mark.parametrize(
    "config",
    [{}, {"precompute_ref_log_probs": True}, {"gradient_checkpointing": True}],
    ids=["", "precomputed", "checkpointing"],
)
def test_lora(config, arguments, tmp_path):
    """The reference is the model without its adapter."""
    got, _ = trl_parity.parity("DPO", tmp_path, arguments(peft_config=trl_parity.lora()), config)
    assert got.trainer.ref_model is None
    assert all("lora" in name for name in got.gradients)
    assert abs(got.log[0]["rewards/chosen"]) > 1e-3


def test_trained_adapter_is_its_own_reference(arguments, tmp_path):
    """TRL copies a given adapter and switches between both."""
    build = arguments()

    def build_with_adapter():
        made = build()
        torch.manual_seed(3)
        return made | {"model": get_peft_model(made["model"], trl_parity.lora())}

    got, _ = trl_parity.parity("DPO", tmp_path, build_with_adapter)
    assert "ref" in got.trainer.model.peft_config


@pytest.mark.parametrize("coefficient", [None, 0.0, 0.5])
def test_mixture_of_experts(coefficient, arguments, tmp_path):
    def model():
        return trl_parity.sharpen(tiny_model("qwen3_moe", vocab_size=320))

    config = {"gradient_accumulation_steps": 2, "router_aux_loss_coef": coefficient}
    _, expected = trl_parity.parity("DPO", tmp_path, arguments(model), config)
    assert ("aux_loss" in expected.log[0]) == (coefficient != 0.0)


def test_bf16_autocast_is_as_near_to_fp32(arguments, tmp_path):
    config = {"max_steps": 1}
    truth = trl_parity.run("DPO", tmp_path, arguments(), config, flag=False)
    config["bf16"] = True
    expected = trl_parity.run("DPO", tmp_path, arguments(), config, flag=False)
    got = trl_parity.run("DPO", tmp_path, arguments(), config)
    trl_parity.assert_same(got, expected, trl_parity.Tolerance(0.05, 0.1, 0.05))

    got, expected = (trl_parity.typical_error(run, truth) for run in (got, expected))
    assert 0 < got <= 1.3 * expected


def test_runs_of_other_options_are_told_apart(arguments, plain, tmp_path):
    """The comparison is not satisfied by anything."""
    slightly = trl_parity.run("DPO", tmp_path, arguments(), {"beta": 0.1001})
    with pytest.raises(AssertionError, match="tolerances away"):
        trl_parity.assert_same(slightly, plain())
