"""Distillation takes each model's logits as its own forward makes them.

The judge is the divergence of the plain models' whole logits: TRL reads scales and softcaps from
the configurations, where some models have them under other names, or have some that they ignore.
"""

import copy

import pytest
import torch
import trl_parity
from datasets import Dataset
from more_families import model

from liger_trainer.kernels.logits.divergence import divergence
from liger_trainer.kernels.logits.jensen_shannon import DivergenceOptions

pytestmark = pytest.mark.usefixtures("every_size")

KEPT = 5


def inputs():
    torch.manual_seed(1)
    ids = torch.randint(10, 90, (2, 4 + KEPT))
    mask = torch.ones(2, KEPT, dtype=torch.long)
    mask[0, 3:] = 0
    prompt = {"prompt_ids": ids[:, :4], "prompt_mask": torch.ones(2, 4, dtype=torch.long)}
    return prompt | {"completion_ids": ids[:, 4:], "completion_mask": mask}


def expected(student, teacher, given, beta, temperature):
    ids = torch.cat([given["prompt_ids"], given["completion_ids"]], 1)
    attended = torch.cat([given["prompt_mask"], given["completion_mask"]], 1)
    logits = [
        m(input_ids=ids, attention_mask=attended).logits[:, -KEPT - 1 : -1].float()
        for m in (student, teacher)
    ]
    options = DivergenceOptions(beta=beta, temperature=temperature)
    mask = given["completion_mask"].bool()
    values, entropy = divergence(logits[0], logits[1].detach(), options)
    return values[mask].mean(), entropy[mask].sum()


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("pair", ["gemma2 llama", "recurrent_gemma cohere", "mpt granite"])
def test_any_head(pair, beta, tmp_path):
    student, teacher = (model(family).eval() for family in pair.split())
    plain = copy.deepcopy(student), copy.deepcopy(teacher)
    trainer = trl_parity.trainer(
        "Distillation",
        tmp_path,
        lambda: {
            "model": student,
            "teacher_model": teacher,
            "train_dataset": Dataset.from_list([{"prompt": "cat"}]),
        },
        {"beta": beta, "temperature": 0.7},
    )
    given = inputs()
    loss, entropy, count = trainer._compute_loss(trainer.model, given, None)
    want, want_entropy = expected(*plain, given, beta, 0.7)
    assert count == given["completion_mask"].sum()
    torch.testing.assert_close(loss, want)
    torch.testing.assert_close(entropy, want_entropy)
    loss.backward()
    want.backward()
    for (name, got), truth in zip(
        trainer.model.named_parameters(), plain[0].parameters(), strict=True
    ):
        if truth.grad is not None:
            torch.testing.assert_close(got.grad, truth.grad, rtol=1e-4, atol=1e-6, msg=name)
