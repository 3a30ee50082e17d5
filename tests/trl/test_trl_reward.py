"""Reward modeling with the drop-in is that of TRL's own trainer: losses, metrics, gradients."""

import pytest
import tiny
import torch
import trl_parity
from datasets import Dataset
from transformers import LlamaForSequenceClassification

pytestmark = pytest.mark.usefixtures("every_size")

ROWS = [
    ("what is two plus two ?", " four .", " the mat .", 0.5),
    ("cat ?", " the cat sat on the mat and is two", " no", 0.1),
    ("what sat on the mat ? tell the user .", " cat", " think about what the system is .", 1.0),
    ("user", " assistant system", " two plus two is four , user .", 0.0),
]


def arguments(margin=False, **more):
    """A function that makes the trainer's arguments afresh."""

    def build():
        names = ("prompt", "chosen", "rejected", "margin")[: 4 if margin else 3]
        data = Dataset.from_list([dict(zip(names, row, strict=False)) for row in ROWS])
        torch.manual_seed(0)
        model = trl_parity.sharpen(LlamaForSequenceClassification(tiny.config(num_labels=1)))
        return {"model": model, "train_dataset": data, "eval_dataset": data, **more}

    return build


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """TRL's own trainer without any option."""
    return trl_parity.run("Reward", tmp_path_factory.mktemp("plain"), arguments(), flag=False)


OPTIONS = {
    "centred rewards": {"center_rewards_coefficient": 0.1},
    "accumulation": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2},
    "long pairs left out": {"max_length": 20},
}


def test_default(tmp_path):
    got, _ = trl_parity.parity("Reward", tmp_path, arguments())
    assert {"accuracy", "margin", "mean_reward"} <= got.log[0].keys()


@pytest.mark.parametrize("config", OPTIONS.values(), ids=OPTIONS.keys())
def test_option(config, plain, tmp_path):
    _, expected = trl_parity.parity("Reward", tmp_path, arguments(), config)
    trl_parity.assert_far(expected, plain)


def test_margin_in_the_data(plain, tmp_path):
    _, expected = trl_parity.parity("Reward", tmp_path, arguments(margin=True))
    trl_parity.assert_far(expected, plain)


def test_checkpointing(plain, tmp_path):
    got, _ = trl_parity.parity("Reward", tmp_path, arguments(), {"gradient_checkpointing": True})
    trl_parity.assert_same(got, plain)


def test_lora(tmp_path):
    adapter = trl_parity.lora(task_type="SEQ_CLS", modules_to_save=["score"])
    got, _ = trl_parity.parity("Reward", tmp_path, arguments(peft_config=adapter))
    assert any("lora" in name for name in got.gradients)
    assert any("score" in name for name in got.gradients)
