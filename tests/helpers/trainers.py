"""Trainers of a tiny model on random sequences, for a few steps."""

import torch
from families import tiny_model
from torch.utils.data import Dataset
from transformers import TrainingArguments


class Sequences(Dataset):
    """Random token ids, each sequence with another number of labels."""

    def __init__(self, number=12, length=16, position_ids=False):
        generator = torch.Generator().manual_seed(1)
        self.ids = torch.randint(3, 128, (number, length), generator=generator)
        self.position_ids = position_ids

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, i):
        labels = self.ids[i].clone()
        labels[: (5 * i) % 13] = -100
        item = {"input_ids": self.ids[i], "labels": labels}
        if self.position_ids:  # two sequences packed into one
            item["position_ids"] = torch.cat([torch.arange(6), torch.arange(len(labels) - 6)])
        return item


def arguments(tmp_path, device="cpu", **changes):
    settings = {
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_steps": 3,
        "logging_steps": 1,
        "optim": "sgd",  # Adam turns the rounding of a gradient near zero into a whole step
        "learning_rate": 0.1,
        "lr_scheduler_type": "constant",
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": device == "cpu",
        "use_liger_kernel": True,
        **changes,
    }
    return TrainingArguments(str(tmp_path), **settings)


def build(cls, tmp_path, device="cpu", model=None, data=None, trainer_kwargs=None, **changes):
    return cls(
        model=model if model is not None else tiny_model("llama", device),
        args=arguments(tmp_path, device, **changes),
        train_dataset=data or Sequences(),
        eval_dataset=Sequences(6),
        **(trainer_kwargs or {}),
    )


def train(*args, **kwargs):
    trainer = build(*args, **kwargs)
    trainer.train()
    return trainer


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def assert_same_run(got, expected, tolerance=2e-4):
    torch.testing.assert_close(losses(got), losses(expected), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(
        got.evaluate()["eval_loss"],
        expected.evaluate()["eval_loss"],
        rtol=tolerance,
        atol=tolerance,
    )
