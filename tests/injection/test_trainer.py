"""Trainer with the flag against Trainer without it: the same numbers, feature by feature."""

import pytest
import torch
import torch.nn.functional as F
import transformers.trainer
from families import batch, tiny_model
from shapes import Shapes
from trainers import Sequences, arguments, assert_same_run, build, losses, train
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from liger_trainer import LigerTrainer, disable, enable
from liger_trainer.deferred.logits import DeferredLogits
from liger_trainer.injection.walk import is_injected
from liger_trainer.kernels.linear import head as linear_head

pytestmark = pytest.mark.usefixtures("every_size")


FEATURES = {
    "plain": {},
    "gradient accumulation": {"gradient_accumulation_steps": 3, "per_device_train_batch_size": 1},
    "label smoothing": {"label_smoothing_factor": 0.1},
    "checkpointing": {"gradient_checkpointing": True},
    "reentrant checkpointing": {
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": True},
    },
    "compile": {"torch_compile": True, "torch_compile_backend": "aot_eager"},
    "neftune": {"neftune_noise_alpha": 5.0},
}


@pytest.mark.parametrize("changes", FEATURES.values(), ids=FEATURES.keys())
def test_feature_matches_trainer_without_the_flag(changes, tmp_path, device):
    got = train(LigerTrainer, tmp_path, device, **changes)
    assert got.injection_report.coverage["fused_linear_cross_entropy"] == (1, 1)
    expected = train(Trainer, tmp_path, device, use_liger_kernel=False, **changes)
    assert_same_run(got, expected)


@pytest.mark.parametrize("precision", ["bf16 autocast", "pure bf16", "fp16 autocast"])
def test_mixed_precision(precision, tmp_path, device):
    if precision == "fp16 autocast" and device == "cpu":
        pytest.skip("the gradient scaler of fp16 needs a GPU")
    flag = {"bf16": {"bf16": True}, "fp16": {"fp16": True}}.get(precision.split()[0], {})
    dtype = torch.bfloat16 if precision == "pure bf16" else torch.float32

    def run(cls, **changes):
        return train(
            cls, tmp_path, device, tiny_model("llama", device).to(dtype), **changes, **flag
        )

    assert_same_run(run(LigerTrainer), run(Trainer, use_liger_kernel=False), tolerance=2e-2)


def test_accumulation_over_uneven_batches_equals_one_large_batch(tmp_path, device):
    """Sequences with 3 to 16 labels: one step over 6, in one go or one by one."""
    runs = []
    for size, steps in ((6, 1), (1, 6), (2, 3)):
        trainer = train(
            LigerTrainer, tmp_path, device, max_steps=1, optim="sgd", max_grad_norm=0.0,
            per_device_train_batch_size=size, gradient_accumulation_steps=steps,
        )  # fmt: skip
        runs.append((losses(trainer), [p.detach().clone() for p in trainer.model.parameters()]))
    for run_losses, parameters in runs[1:]:
        torch.testing.assert_close(run_losses, runs[0][0], rtol=1e-5, atol=1e-5)
        for a, b in zip(parameters, runs[0][1], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_packed_sequences(tmp_path, device):
    data = Sequences(position_ids=True)
    got = train(LigerTrainer, tmp_path, device, data=data)
    assert_same_run(got, train(Trainer, tmp_path, device, data=data, use_liger_kernel=False))


def test_whole_training_step_builds_no_logits(tmp_path, device, monkeypatch):
    monkeypatch.setattr(linear_head, "workspace_rows", lambda *_, **__: 4)
    with Shapes() as shapes:
        trainer = train(LigerTrainer, tmp_path, device, tiny_model("llama", device, vocab_size=130))
    assert shapes.largest(130) <= 64  # the head's transposed weight
    with Shapes() as shapes:
        trainer.evaluate()
    assert shapes.largest(130) <= 64


def test_stock_trainer_with_the_flag_after_enable(tmp_path, device):
    hook = transformers.trainer.apply_liger_kernel
    enable()
    enable()
    try:
        got = train(Trainer, tmp_path, device)
    finally:
        disable()
    disable()
    assert transformers.trainer.apply_liger_kernel is hook
    assert is_injected(got.model)
    assert_same_run(got, train(Trainer, tmp_path, device, use_liger_kernel=False))


def test_nothing_global_without_enable(tmp_path):
    hook = transformers.trainer.apply_liger_kernel
    trainer = train(LigerTrainer, tmp_path)
    assert transformers.trainer.apply_liger_kernel is hook
    other = tiny_model("llama")
    assert not is_injected(other)
    assert trainer.args.use_liger_kernel


def test_with_the_flag_off_it_is_trainer(tmp_path):
    got = train(LigerTrainer, tmp_path, use_liger_kernel=False)
    assert got.injection_report is None
    assert not is_injected(got.model)
    expected = train(Trainer, tmp_path, use_liger_kernel=False)
    assert losses(got) == losses(expected)
    assert got.evaluate()["eval_loss"] == expected.evaluate()["eval_loss"]


def test_model_init_is_injected_anew(tmp_path):
    trainer = LigerTrainer(
        model_init=lambda: tiny_model("llama"), args=arguments(tmp_path), train_dataset=Sequences()
    )
    trainer.train()
    assert is_injected(trainer.model)


def test_kernel_config_is_obeyed_and_checked(tmp_path):
    trainer = train(LigerTrainer, tmp_path, liger_kernel_config={"rope": False})
    assert trainer.injection_report.coverage["rope"] == (0, 0)
    with pytest.raises(ValueError, match="did you mean 'swiglu'"):
        train(LigerTrainer, tmp_path, liger_kernel_config={"swigluu": True})


def test_compute_metrics_gets_real_logits(tmp_path, device):
    def accuracy(prediction):
        logits, labels = prediction
        hits = (logits[:, :-1].argmax(-1) == labels[:, 1:])[labels[:, 1:] != -100]
        return {"accuracy": float(hits.mean())}

    def run(cls, **changes):
        return build(cls, tmp_path, device, trainer_kwargs={"compute_metrics": accuracy}, **changes)

    got, expected = run(LigerTrainer).evaluate(), run(Trainer, use_liger_kernel=False).evaluate()
    assert got["eval_accuracy"] == pytest.approx(expected["eval_accuracy"])
    assert got["eval_loss"] == pytest.approx(expected["eval_loss"], rel=1e-4)


def test_preprocessed_metrics_need_no_logits(tmp_path, device, monkeypatch):
    seen = []

    def best(logits, labels):
        seen.append(logits)
        return logits.argmax(dim=-1)

    def accuracy(prediction):
        return {"accuracy": float((prediction.predictions == prediction.label_ids).mean())}

    kwargs = {"compute_metrics": accuracy, "preprocess_logits_for_metrics": best}

    def run(cls, **changes):
        return build(cls, tmp_path, device, trainer_kwargs=kwargs, **changes).evaluate()

    got, expected = run(LigerTrainer), run(Trainer, use_liger_kernel=False)
    assert got["eval_accuracy"] == expected["eval_accuracy"]
    deferred = [logits for logits in seen if isinstance(logits, DeferredLogits)]
    assert deferred
    assert all(logits._value is None for logits in deferred)


def test_own_loss_function(tmp_path, device):
    def weighted(outputs, labels, num_items_in_batch=None):
        logits = outputs.logits[:, :-1].reshape(-1, 128).float()
        loss = F.cross_entropy(logits, labels[:, 1:].reshape(-1), reduction="none")
        return (loss * torch.linspace(0.5, 1.5, len(loss), device=loss.device)).sum() / 20

    def run(cls, **changes):
        return train(
            cls, tmp_path, device, trainer_kwargs={"compute_loss_func": weighted}, **changes
        )

    assert_same_run(run(LigerTrainer), run(Trainer, use_liger_kernel=False))


def test_prediction_loss_only_and_predict(tmp_path):
    trainer = train(LigerTrainer, tmp_path, prediction_loss_only=True)
    plain = train(Trainer, tmp_path, prediction_loss_only=True, use_liger_kernel=False)
    assert_same_run(trainer, plain)
    trainer.args.prediction_loss_only = plain.args.prediction_loss_only = False
    got, expected = trainer.predict(Sequences(4)), plain.predict(Sequences(4))
    assert got.predictions.shape == expected.predictions.shape
    assert abs(got.predictions - expected.predictions).max() < 1e-2


def test_batches_without_any_label(tmp_path):
    class Unlabeled(Sequences):
        def __getitem__(self, i):
            item = super().__getitem__(i)
            return {**item, "labels": torch.full_like(item["labels"], -100)}

    trainer = train(LigerTrainer, tmp_path, data=Unlabeled())
    assert losses(trainer) == [0.0, 0.0, 0.0]
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())


def test_resume_continues_the_same_run(tmp_path):
    whole = train(LigerTrainer, tmp_path / "whole", max_steps=4)
    train(
        LigerTrainer, tmp_path / "parts", max_steps=4, save_strategy="steps", save_steps=2,
    )  # fmt: skip
    again = LigerTrainer(
        model=tiny_model("llama"), args=arguments(tmp_path / "parts", max_steps=4),
        train_dataset=Sequences(),
    )  # fmt: skip
    again.train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-2"))
    torch.testing.assert_close(losses(again)[-2:], losses(whole)[-2:], rtol=1e-5, atol=1e-5)


def test_saved_model_loads_as_a_plain_one(tmp_path):
    trainer = train(LigerTrainer, tmp_path)
    trainer.save_model(tmp_path / "model")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, trainer.model.state_dict()[name]), name


def test_model_by_path(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path / "model")
    trainer = LigerTrainer(
        model=str(tmp_path / "model"),
        args=arguments(tmp_path / "out"),
        train_dataset=Sequences(),
        model_init_kwargs={"dtype": torch.bfloat16},
    )
    trainer.train()
    assert trainer.model.dtype == torch.bfloat16
    with pytest.raises(ValueError, match="model_init_kwargs"):
        LigerTrainer(model=tiny_model("llama"), model_init_kwargs={"dtype": torch.bfloat16})


def test_peft_model(tmp_path, device):
    peft = pytest.importorskip("peft")

    def run(cls, **changes):
        torch.manual_seed(0)
        model = peft.get_peft_model(
            tiny_model("llama", device),
            peft.LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear"),
        )
        return train(cls, tmp_path, device, model, **changes)

    got = run(LigerTrainer)
    assert got.injection_report.coverage["rms_norm"] == (5, 5)
    assert_same_run(got, run(Trainer, use_liger_kernel=False))


def test_every_argument_of_trainer_is_still_one():
    import inspect

    ours = set(inspect.signature(LigerTrainer.__init__).parameters)
    first_six = list(inspect.signature(Trainer.__init__).parameters)[:7]
    assert set(first_six) <= ours


def test_an_adapter_folder_is_trained_further(tmp_path):
    peft = pytest.importorskip("peft")
    tiny_model("llama").save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    config = peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    peft.get_peft_model(base, config).save_pretrained(tmp_path / "adapter")
    args = TrainingArguments(
        str(tmp_path / "out"), max_steps=3, use_cpu=True, report_to=[], use_liger_kernel=True,
        save_strategy="no", learning_rate=1e-2, logging_steps=1, disable_tqdm=True,
    )  # fmt: skip
    rows = [{name: tensor[0] for name, tensor in batch(length=9).items()}] * 4
    trainer = LigerTrainer(str(tmp_path / "adapter"), args, train_dataset=rows)
    trained = {n for n, p in trainer.model.named_parameters() if p.requires_grad}
    assert trained
    assert all("lora_" in name for name in trained)
    assert trainer.injection_report.coverage["lora"].swapped == 14
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]


def test_a_site_that_only_some_processes_fuse_is_warned_of(monkeypatch, tmp_path, caplog):
    trainer = build(LigerTrainer, tmp_path, "cpu")
    monkeypatch.setattr(type(trainer.args), "world_size", 2)

    def compare(change):
        others = "liger_trainer.kernel_trainer.gather_object"
        monkeypatch.setattr(others, lambda mine: [*mine, *map(change, mine)])
        caplog.clear()
        trainer._compare_ranks()
        return caplog.text

    assert compare(set) == ""
    found = compare(lambda sites: sites - {("model.layers.0.self_attn", "rope")})
    assert "fused in some processes only: model.layers.0.self_attn (rope);" in found
    assert "more" in compare(lambda sites: set())
