"""A rank that holds a part of each row: its masks, and attention that reaches beyond the rank."""

import copy

import pytest
import torch
import torch.nn.functional as F
from families import tiny_model
from packed import positions
from transformers import masking_utils
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from liger_trainer import inject
from liger_trainer.injection.rules import attention
from liger_trainer.injection.rules.masks import lean

PARTS = {
    "second half": torch.arange(6, 12).expand(2, -1),
    "ends of the row": torch.tensor([[0, 1, 2, 9, 10, 11]]).expand(2, -1),
    "middle of the row": torch.tensor([[3, 4, 5, 6, 7, 8]]).expand(2, -1),
    "of packed rows": torch.tensor([[4, 5, 0, 1, 2, 3], [7, 8, 9, 0, 0, 1]]),
    "begins with a document": torch.tensor([[0, 1, 2, 3, 4, 0], [5, 6, 0, 1, 2, 3]]),
    "one position for all": torch.arange(6, 12).unsqueeze(0),
}
IDS = torch.randint(3, 128, (2, 17), generator=torch.Generator().manual_seed(1))
PACKED = {"input_ids": IDS, "labels": IDS, "position_ids": positions((11, 5, 1), (3, 14))}


@pytest.fixture
def attended(monkeypatch):
    """A number for every call of packed attention."""
    calls, own = [], attention.packed_attention

    def spy(*args, **kwargs):
        calls.append(1)
        return own(*args, **kwargs)

    monkeypatch.setattr(attention, "packed_attention", spy)
    return calls


def loss_of(model):
    return model(**PACKED, use_cache=False).loss.detach()


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("given", [None, 6, 12], ids=["no mask", "local mask", "mask of the row"])
@pytest.mark.parametrize("maker", ["create_causal_mask", "create_sliding_window_causal_mask"])
def test_masks_of_a_part_are_those_that_transformers_makes(part, given, maker, every_size):
    config = tiny_model("mistral").config
    config.sliding_window = 4
    make = getattr(masking_utils, maker)
    arguments = {
        "config": config,
        "inputs_embeds": torch.zeros(2, 6, 4),
        "attention_mask": None if given is None else torch.ones(2, given, dtype=torch.long),
        "past_key_values": None,
        "position_ids": PARTS[part],
    }
    expected, got = make(**arguments), lean(make, True)(**arguments)
    assert (got is None) == (expected is None)
    if got is not None:
        assert torch.equal(got.clone(), expected)


def beyond_the_rank(calls):
    """As engines register theirs: it takes no mask, and knows documents by other means."""

    def attend(module, query, key, value, attention_mask, **kwargs):
        calls.append(type(attention_mask).__name__)
        out = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        return out.transpose(1, 2), None

    return attend


@pytest.mark.parametrize("first", ["the kernels", "the function"])
def test_another_attention_function_is_called_with_whatever_mask(
    first,
    every_size,
    attended,
    monkeypatch,
):
    calls, model = [], tiny_model("llama")
    plain = copy.deepcopy(model)
    if first == "the function":
        monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "sdpa", beyond_the_rank(calls))
    inject(model)
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "sdpa", beyond_the_rank(calls))
    attended.clear()
    loss = loss_of(model)
    assert attended == []
    assert len(calls) == model.config.num_hidden_layers
    expected = loss_of(plain)
    torch.testing.assert_close(loss, expected, rtol=2e-6, atol=2e-6)


def test_where_torchs_attention_was_replaced_it_is_what_runs(
    every_size,
    attended,
    monkeypatch,
):
    model = tiny_model("llama")
    plain = copy.deepcopy(model)
    inject(model)
    own, calls = F.scaled_dot_product_attention, []

    def replaced(*args, **kwargs):
        calls.append(1)
        return own(*args, **kwargs)

    attended.clear()
    with monkeypatch.context() as patch:
        patch.setattr(F, "scaled_dot_product_attention", replaced)
        loss = loss_of(model)
        assert attended == []
        assert len(calls) == model.config.num_hidden_layers
    expected = loss_of(plain)
    torch.testing.assert_close(loss, expected, rtol=2e-6, atol=2e-6)
    loss_of(model)
    assert len(attended) == model.config.num_hidden_layers
