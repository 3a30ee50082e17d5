"""Models attend as they did, without the masks that transformers makes for them."""

import copy
import pickle

import pytest
import torch
from families import FAMILIES, tiny_model
from masked import batch, loss_and_gradients
from packed import positions
from transformers import masking_utils

from liger_trainer import inject, restore
from liger_trainer.injection.rules import attention, masks
from liger_trainer.kernels.layers import packed_attention as kernel

PACKED = {"position_ids": positions((11, 5, 1), (3, 14))}

PLAIN = {}

COUNTED = {"position_ids": torch.arange(17).unsqueeze(0)}


@pytest.fixture
def attended(monkeypatch):
    """(documents, window) of every call of packed attention; an injection's probe makes some."""
    calls = []

    def spy(q, k, v, documents, window, scale):
        calls.append((len(documents.bounds) - 1, window))
        return kernel.packed_attention(q, k, v, documents, window=window, scale=scale)

    monkeypatch.setattr(attention, "packed_attention", spy)
    return calls


@pytest.fixture
def made(monkeypatch):
    """Shapes of the masks that transformers makes; an injection compares some of 7 x 7."""
    shapes, real = [], masking_utils.sdpa_mask

    def spy(*args, **kwargs):
        mask = real(*args, **kwargs)
        shapes.append(None if mask is None else tuple(mask.shape))
        return mask

    monkeypatch.setitem(masking_utils.AttentionMaskInterface._global_mapping, "sdpa", spy)
    return shapes


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - {"gemma2"}))
def test_packed_rows_attend_by_bounds_and_give_the_plain_models_gradients(
    family, every_size, attended, made
):
    model = tiny_model(family)
    plain = copy.deepcopy(model)
    report = inject(model, strict=True)
    made.clear()
    attended.clear()
    layers = model.config.num_hidden_layers
    assert report.coverage["attention"] == (layers + 1, layers + 1)
    loss, gradients = loss_and_gradients(model, batch(**PACKED))
    assert [n for n, _ in attended] == [5] * layers
    assert not made, "no mask was made"
    expected_loss, expected = loss_and_gradients(plain, batch(**PACKED))
    torch.testing.assert_close(loss, expected_loss, rtol=2e-6, atol=2e-6)
    for name, gradient in expected.items():
        assert (gradients[name] - gradient).norm() <= 1e-5 * gradient.norm(), name
    windowed = any(window is not None for _, window in attended)
    assert windowed == (family in ("mistral", "gemma3_text"))


def test_a_model_on_another_implementation_says_so():
    report = inject(tiny_model("llama", attn_implementation="eager"))
    reasons = {row.reason for row in report.rows if row.rule == "attention"}
    assert {reason.split(":")[0] for reason in reasons} == {"attention implementation eager"}
    assert report.coverage["attention"] == (0, 0)


@pytest.mark.parametrize("inputs", [PLAIN, COUNTED], ids=["no positions", "positions that count"])
def test_plain_rows_need_no_mask_and_no_bounds(inputs, every_size, attended, made):
    model = tiny_model("llama")
    inject(model)
    made.clear()
    attended.clear()
    model(**batch(**inputs)).loss.backward()
    assert attended == []
    assert made == []


def test_windows_of_plain_rows_go_by_bounds_too(every_size, attended, made):
    model = tiny_model("mistral")
    plain = copy.deepcopy(model)
    inject(model)
    made.clear()
    attended.clear()
    loss, gradients = loss_and_gradients(model, batch())
    assert attended == [(2, 8)] * 2
    assert made == []
    expected_loss, expected = loss_and_gradients(plain, batch())
    torch.testing.assert_close(loss, expected_loss, rtol=2e-6, atol=2e-6)
    for name, gradient in expected.items():
        assert (gradients[name] - gradient).norm() <= 1e-5 * gradient.norm(), name
    attended.clear()
    model(**batch(length=8))  # the window holds all of it
    assert attended == []


def test_on_a_cpu_packed_rows_keep_their_mask(attended, made):
    model = tiny_model("llama")
    report = inject(model)
    made.clear()
    attended.clear()
    assert report.coverage["attention"] == (1, 1)
    model(**batch(**PACKED))
    assert attended == []
    assert made == [(2, 1, 17, 17)]


@pytest.mark.parametrize(
    "more",
    [
        {"attention_mask": torch.ones(2, 17, dtype=torch.long)},
        {"attention_mask": torch.ones(2, 17, dtype=torch.long).tril(14)},
        {"use_cache": True},
        {"attention_mask": torch.ones(17, 17, dtype=torch.bool).tril().expand(2, 1, 17, 17)},
    ],
    ids=["full mask", "padding", "cache", "own mask"],
)
def test_other_masks_are_left_to_transformers(more, every_size, attended):
    model = tiny_model("llama")
    plain = copy.deepcopy(model)
    inject(model)
    attended.clear()
    with torch.no_grad():
        got, expected = model(**batch(**more)).logits, plain(**batch(**more)).logits
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    assert attended == []


def test_whoever_looks_at_a_packed_mask_gets_the_mask(every_size):
    config = tiny_model("llama").config
    kwargs = {
        "config": config,
        "inputs_embeds": torch.zeros(2, 17, 8),
        "attention_mask": None,
        "past_key_values": None,
        **PACKED,
    }
    mask = masks.lean(masking_utils.create_causal_mask, True)(**kwargs)
    assert isinstance(mask, masks.PackedMask)
    assert mask.shape == (2, 1, 17, 17)
    assert mask.dtype == torch.bool
    assert mask._value is None, "its metadata cost nothing"
    expected = masking_utils.create_causal_mask(**kwargs)
    assert torch.equal(torch.where(mask, 1.0, 0.0), expected.float())
    assert torch.equal(mask[:, :, :3, :5], expected[:, :, :3, :5])


def test_overlays_are_left_to_transformers(every_size):
    config = tiny_model("llama").config
    kwargs = {
        "config": config,
        "inputs_embeds": torch.zeros(2, 6, 8),
        "attention_mask": None,
        "past_key_values": None,
        "position_ids": torch.arange(6).unsqueeze(0),
        "block_sequence_ids": torch.tensor([[0, 0, -1, -1, -1, -1]]).expand(2, -1),
    }
    got = masks.lean(masking_utils.create_causal_mask, False)(**kwargs)
    assert got[0, 0, 0, 1], "an image sees itself whole"


def test_bounds_are_read_once_for_all_layers_and_steps(every_size, monkeypatch):
    """The device is waited for when a batch is new, or changed in place."""
    reads = []
    real = masks.documents_of
    monkeypatch.setattr(masks, "documents_of", lambda ids: reads.append(1) or real(ids))
    model = tiny_model("gemma3_text", layer_types=["full_attention", "sliding_attention"])
    inject(model)
    reads.clear()
    position_ids = PACKED["position_ids"].clone()
    model(**batch(position_ids=position_ids))
    assert len(reads) == 1
    model(**batch(position_ids=position_ids))
    assert len(reads) == 1
    position_ids[0] = torch.arange(17)
    model(**batch(position_ids=position_ids))
    assert len(reads) == 2


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_layers_attend_by_bounds(reentrant, every_size, attended, made):
    model = tiny_model("llama")
    plain = copy.deepcopy(model)
    inject(model)
    made.clear()
    attended.clear()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    _, gradients = loss_and_gradients(model, batch(**PACKED))
    assert len(attended) == 4
    assert made == []
    _, expected = loss_and_gradients(plain, batch(**PACKED))
    for name, gradient in expected.items():
        assert (gradients[name] - gradient).norm() <= 1e-5 * gradient.norm(), name


def test_under_peft_and_in_evaluation(every_size, attended, made):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules="all-linear")
    model = peft.get_peft_model(tiny_model("llama"), config).eval()
    expected = copy.deepcopy(model)(**batch(**PACKED)).logits
    made.clear()
    inject(model)
    made.clear()
    attended.clear()
    with torch.no_grad():
        got = model(**batch(**PACKED)).logits
    torch.testing.assert_close(got + 0, expected, rtol=1e-5, atol=1e-5)
    assert len(attended) == 2
    assert made == []


def test_restored_copied_pickled(every_size, attended, made):
    model = tiny_model("llama")
    before = [type(m) for m in model.modules()]
    inject(model)
    made.clear()
    attended.clear()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        attended.clear()
        twin(**batch(**PACKED))
        assert len(attended) == 2
    restore(model)
    assert [type(m) for m in model.modules()] == before
    attended.clear()
    model(**batch(**PACKED))
    assert attended == []
    assert made == [(2, 1, 17, 17)]


def test_another_implementation_chosen_later_is_followed(every_size, attended, made):
    model = tiny_model("llama")
    expected = model(**batch(**PACKED)).logits
    made.clear()
    inject(model)
    made.clear()
    attended.clear()
    model.set_attn_implementation("eager")
    got = model(**batch(**PACKED)).logits
    torch.testing.assert_close(got + 0, expected, rtol=1e-5, atol=1e-5)
    assert attended == []


def test_switched_off(every_size):
    report = inject(tiny_model("llama"), {"attention": False})
    assert report.coverage["attention"] == (0, 0)


def test_a_release_whose_masks_are_others_is_refused(monkeypatch):
    """The masks of the installed transformers are compared, not trusted."""

    def create_causal_mask(config, inputs_embeds, attention_mask, past_key_values, position_ids):
        length = inputs_embeds.shape[1]
        return torch.ones(2, 1, length, length, dtype=torch.bool).tril(1)

    reason = masks.difference([create_causal_mask], tiny_model("llama").config)
    assert reason == "create_causal_mask makes another mask than expected"


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3", "gpt2"])
def test_packed_rows_on_the_gpu(family, attended, made):
    """bf16: as near to the fp32 model as the plain bf16 model is."""
    exact = tiny_model(family, "cuda")
    plain = copy.deepcopy(exact).to(torch.bfloat16)
    exact.load_state_dict(plain.state_dict())
    model = copy.deepcopy(plain)
    inject(model, strict=True)
    made.clear()
    attended.clear()
    inputs = {k: v.cuda() if torch.is_tensor(v) else v for k, v in batch(**PACKED).items()}
    _, got = loss_and_gradients(model, inputs)
    assert len(attended) == 2
    assert made == []
    _, expected = loss_and_gradients(plain, inputs)
    _, truth = loss_and_gradients(exact, inputs)
    error, allowed = (
        torch.stack([(g[n].float() - t).norm() / t.norm() for n, t in truth.items()]).median()
        for g in (got, expected)
    )
    assert error <= 1.3 * allowed
