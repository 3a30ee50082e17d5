"""Encoder-decoder models in `Seq2SeqTrainer`: training, and generation in evaluation."""

import pytest
import torch
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    T5Config,
    T5ForConditionalGeneration,
    set_seed,
)

from liger_trainer import disable, enable
from liger_trainer.injection.rules.head import defers_logits

TOKENS = {"vocab_size": 96, "pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}
SMALL = {"d_model": 32, "dropout": 0.0, "dropout_rate": 0.0}


def t5():
    sizes = {"d_kv": 16, "d_ff": 48, "num_layers": 1, "num_heads": 2}
    return T5ForConditionalGeneration(T5Config(**TOKENS, **SMALL, **sizes))  # its head is scaled


def bart():
    halves = ("encoder", "decoder")
    sizes = {f"{half}_{name}": n for half in halves for name, n in (("layers", 1), ("ffn_dim", 48))}
    sizes |= {f"{half}_attention_heads": 2 for half in halves}
    model = BartForConditionalGeneration(BartConfig(**TOKENS, **SMALL, **sizes))
    model.final_logits_bias.normal_()
    return model


@pytest.fixture
def enabled():
    enable()
    yield
    disable()


def train(make, folder, flag, smoothing):
    set_seed(0)
    model = make()
    rows = [
        {"input_ids": torch.randint(3, 96, (9,)), "labels": torch.randint(3, 96, (6,))}
        for _ in range(6)
    ]
    for i, row in enumerate(rows):
        row["labels"][i:] = -100  # none at all in the first
        labels = row["labels"][None]
        row["decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(labels=labels)[0]
    args = Seq2SeqTrainingArguments(
        str(folder), max_steps=2, per_device_train_batch_size=2, gradient_accumulation_steps=2,
        label_smoothing_factor=smoothing, predict_with_generate=True, generation_max_length=6,
        learning_rate=1e-2, optim="sgd", logging_steps=1, save_strategy="no", report_to=[],
        use_cpu=True, disable_tqdm=True, use_liger_kernel=flag,
    )  # fmt: skip
    trainer = Seq2SeqTrainer(
        model, args, train_dataset=rows, eval_dataset=rows,
        compute_metrics=lambda found: {"sum": int(found.predictions.sum())},
    )  # fmt: skip
    trainer.train()
    evaluated = trainer.evaluate()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return trainer, [*losses, evaluated["eval_loss"], evaluated["eval_sum"]]


@pytest.mark.parametrize("make", [t5, bart])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_trains_and_generates_as_without_kernels(enabled, tmp_path, make, smoothing):
    plain, expected = train(make, tmp_path, False, smoothing)
    fused, found = train(make, tmp_path, True, smoothing)
    assert defers_logits(fused.model)
    assert found == pytest.approx(expected, rel=1e-5, nan_ok=True)
    for a, b in zip(fused.model.parameters(), plain.model.parameters(), strict=True):
        torch.testing.assert_close(a, b)
