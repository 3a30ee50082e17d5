"""KTO with the drop-in is KTO with TRL's own trainer: losses, metrics, gradients, weights."""

import pytest
import trl_parity
from datasets import Dataset
from families import tiny_model

pytestmark = pytest.mark.usefixtures("every_size")

ROWS = [
    ("what is two plus two ?", " four .", True),
    ("cat ?", " the cat sat on the mat and is two", False),
    ("what sat on the mat ? tell the user .", " cat", True),
    ("user", " assistant system", True),
    ("the", " cat sat on", False),
    ("two plus", " two plus two plus two plus two", False),
    ("mat", " think", True),
    ("what is the system ?", " a cat on the mat .", False),
]
SIZES = {"per_device_train_batch_size": 4, "per_device_eval_batch_size": 4}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the references are saved that TRL loads for a policy without an explicit one."""
    return tmp_path_factory.mktemp("reference")


@pytest.fixture(scope="module")
def arguments(folder):
    """Makes functions that make the trainer's arguments afresh."""

    def make(model=trl_parity.policy, ref_model=None, **more):
        def build():
            names = ("prompt", "completion", "label")
            data = Dataset.from_list([dict(zip(names, row, strict=True)) for row in ROWS])
            return {
                "model": trl_parity.policy_with_reference(folder, model),
                "ref_model": ref_model and ref_model(),
                "train_dataset": data,
                "eval_dataset": data.select(range(4)),
                **more,
            }

        return build

    return make


@pytest.fixture(scope="module")
def plain(arguments, tmp_path_factory):
    """TRL's own trainer without any option."""
    return trl_parity.run("KTO", tmp_path_factory.mktemp("plain"), arguments(), SIZES, flag=False)


@pytest.fixture(scope="module")
def reference(folder, plain):
    """Loads the reference that TRL loads."""
    return lambda: trl_parity.policy().from_pretrained(folder / "llama")


OPTIONS = {
    "apo_zero_unpaired": {"loss_type": "apo_zero_unpaired"},
    "beta": {"beta": 0.3},
    "desirable_weight": {"desirable_weight": 1.5},
    "undesirable_weight": {"undesirable_weight": 0.6},
    "both weights": {"desirable_weight": 0.5, "undesirable_weight": 1.4, "beta": 0.2},
    "weighted apo_zero_unpaired": {"loss_type": "apo_zero_unpaired", "undesirable_weight": 0.5},
    "accumulation": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
    "truncation": {"max_length": 9},
    "moving reference": {"sync_ref_model": True, "ref_model_sync_steps": 1},
}


def test_default(arguments, tmp_path):
    got, _ = trl_parity.parity("KTO", tmp_path, arguments(), SIZES)
    assert {"kl", "rewards/margins", "logps/chosen", "logits/rejected"} <= got.log[0].keys()
    assert any(entry.get("kl", 0) > 0 for entry in got.log), "the KL term is not clamped away"


@pytest.mark.parametrize("config", OPTIONS.values(), ids=OPTIONS.keys())
def test_option(config, arguments, plain, tmp_path):
    _, expected = trl_parity.parity("KTO", tmp_path, arguments(), SIZES | config)
    trl_parity.assert_far(expected, plain)


@pytest.mark.parametrize(
    "config",
    [{"gradient_checkpointing": True}, {"pad_to_multiple_of": 16}],
    ids=["checkpointing", "padding"],
)
def test_option_that_changes_no_number(config, arguments, plain, tmp_path):
    got, _ = trl_parity.parity("KTO", tmp_path, arguments(), SIZES | config)
    got.log[2]["total_flos"] = plain.log[2]["total_flos"]  # counts padding
    trl_parity.assert_same(got, plain)


def test_explicit_reference_equals_the_loaded_one(arguments, plain, reference, tmp_path):
    got, _ = trl_parity.parity("KTO", tmp_path, arguments(ref_model=reference), SIZES)
    trl_parity.assert_same(got, plain)


@pytest.mark.parametrize("loss_type", ["kto", "apo_zero_unpaired"])
def test_reference_ahead_of_training(loss_type, arguments, reference, tmp_path, monkeypatch):
    """With a given reference, the same as computing it in every step."""
    build = arguments(ref_model=reference)
    options = SIZES | {"loss_type": loss_type}
    trainer_class, _ = trl_parity.classes("KTO", flag=True)
    compute, batches = trainer_class.compute_ref_log_probs, []

    def counted(self, model, inputs):
        batches.append(type(self))
        return compute(self, model, inputs)

    monkeypatch.setattr(trainer_class, "compute_ref_log_probs", counted)
    got, _ = trl_parity.parity("KTO", tmp_path, build, options | {"precompute_ref_log_probs": True})
    assert batches == [trainer_class] * 3, "2 batches to train on and 1 to evaluate, no cached ones"
    in_every_step = trl_parity.run("KTO", tmp_path, build, options, flag=False)
    trl_parity.assert_same(got, in_every_step)


@pytest.mark.parametrize(
    "config", [{}, {"precompute_ref_log_probs": True}], ids=["", "precomputed"]
)
def test_lora(config, arguments, tmp_path):
    """The reference is the model without its adapter."""
    build = arguments(peft_config=trl_parity.lora())
    got, _ = trl_parity.parity("KTO", tmp_path, build, SIZES | config)
    assert got.trainer.ref_model is None
    assert all("lora" in name for name in got.gradients)
    assert abs(got.log[0]["rewards/chosen"]) > 1e-3


def test_batch_of_one_kind(arguments, tmp_path):
    """TRL then logs nothing of the other kind."""
    build = arguments()

    def of_one_kind():
        made = build()
        data = made["train_dataset"].filter(lambda row: row["label"])
        return made | {"train_dataset": data, "eval_dataset": data}

    got, _ = trl_parity.parity("KTO", tmp_path, of_one_kind, SIZES)
    assert "rewards/rejected" not in got.log[0]


@pytest.mark.parametrize("coefficient", [None, 0.5])
def test_mixture_of_experts(coefficient, arguments, tmp_path):
    def model():
        return trl_parity.sharpen(tiny_model("qwen3_moe", vocab_size=320))

    config = SIZES | {"router_aux_loss_coef": coefficient}
    _, expected = trl_parity.parity("KTO", tmp_path, arguments(model), config)
    assert "aux_loss" in expected.log[0]


def test_runs_of_other_options_are_told_apart(arguments, plain, tmp_path):
    """The comparison is not satisfied by anything."""
    config = SIZES | {"desirable_weight": 1.001}
    slightly = trl_parity.run("KTO", tmp_path, arguments(), config)
    with pytest.raises(AssertionError, match="tolerances away"):
        trl_parity.assert_same(slightly, plain)
