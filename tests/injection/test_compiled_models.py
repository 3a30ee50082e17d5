"""Whole models under torch.compile."""

import pytest
import torch
from families import tiny_model
from torch._dynamo import utils as dynamo

from liger_trainer import inject


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def test_dynamo_is_done_after_the_first_steps():
    """Later steps compile nothing and do not try to, nor do those of a second model."""
    ids = torch.randint(0, 64, (2, 12))
    models = [tiny_model("llama", num_hidden_layers=1) for _ in range(2)]
    for model in models:
        inject(model)
    compiled = [torch.compile(model, backend="eager") for model in models]

    def steps():
        before = dynamo.curr_frame
        for model in compiled:
            for _ in range(2):
                model(input_ids=ids, labels=ids).loss.backward()
        return dynamo.curr_frame - before

    assert steps() > 0
    assert steps() == 0
