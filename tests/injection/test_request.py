"""The kernels are asked for by a trainer's own argument, and where no flag exists."""

import sys

import pytest
import torch
import trl_parity
from datasets import Dataset
from families import batch, tiny_model
from shapes import Shapes
from transformers import Trainer, TrainingArguments

import liger_trainer
from liger_trainer import LigerTrainer, request
from liger_trainer.config import KernelConfig
from liger_trainer.injection.walk import is_injected

FIELDS = ("use_liger_kernel", "liger_kernel_config")


def without_fields(cls):
    """Training arguments whose two fields are there for others alone, as before they go."""

    class Without(cls):
        def __getattribute__(self, name):
            caller = sys._getframe(1).f_globals.get("__name__", "")
            if name in FIELDS and caller.startswith("liger_trainer"):
                raise AttributeError(name)
            return super().__getattribute__(name)

    return Without


def arguments(folder, cls=TrainingArguments, **changes):
    return cls(
        str(folder), max_steps=2, per_device_train_batch_size=2, report_to=[], use_cpu=True,
        disable_tqdm=True, logging_steps=1, save_strategy="no", seed=5, **changes,
    )  # fmt: skip


def rows():
    inputs = batch(length=9)
    return [{name: tensor[i % 2] for name, tensor in inputs.items()} for i in range(4)]


def losses(trainer):
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("own", [True, {"rms_norm": False}])
def test_a_trainer_s_own_argument_works_without_the_fields(tmp_path, own):
    plain, model = (tiny_model("llama", vocab_size=131) for _ in range(2))
    with Shapes() as seen:
        expected = losses(LigerTrainer(plain, arguments(tmp_path), train_dataset=rows()))
    weight = model.lm_head.weight.shape[1]
    assert seen.largest(131) >= 2 * 9
    args = arguments(tmp_path, without_fields(TrainingArguments))
    trainer = LigerTrainer(model, args, train_dataset=rows(), liger_kernel_config=own)
    with Shapes() as seen:
        got = losses(trainer)
    assert got == pytest.approx(expected, rel=1e-5)
    logits = [shape for shape in seen.seen if shape and shape[-1] == 131 and weight not in shape]
    assert max(shape.numel() // 131 for shape in logits) <= 8  # tokens with a label
    norms = trainer.injection_report.coverage["rms_norm"].swapped
    assert (norms == 0) == (own is not True)


def test_false_wins_over_the_flag(tmp_path):
    args = arguments(tmp_path, use_liger_kernel=True)
    trainer = LigerTrainer(
        tiny_model("llama"), args, train_dataset=rows(), liger_kernel_config=False
    )
    assert trainer.injection_report is None
    assert not is_injected(trainer.model)


def test_arguments_without_the_fields_ask_for_nothing(tmp_path):
    args = arguments(tmp_path, without_fields(TrainingArguments))
    assert request.requested(args) is None
    assert not is_injected(LigerTrainer(tiny_model("llama"), args, train_dataset=rows()).model)


def test_model_init_gets_the_kernels_without_the_flag(tmp_path):
    trainer = LigerTrainer(
        None,
        arguments(tmp_path),
        train_dataset=rows(),
        model_init=lambda: tiny_model("llama"),
        liger_kernel_config=True,
    )
    first = trainer.model
    trainer.train()
    assert trainer.model is not first
    assert is_injected(trainer.model)


def test_enable_leaves_a_trainer_that_asked_itself_alone(tmp_path):
    liger_trainer.enable()
    try:
        trainer = LigerTrainer(
            tiny_model("llama"),
            arguments(tmp_path, without_fields(TrainingArguments)),
            train_dataset=rows(),
            liger_kernel_config=True,
        )
        trainer.train()
        assert is_injected(trainer.model)
        plain = Trainer(tiny_model("llama"), arguments(tmp_path), train_dataset=rows())
        plain.train()
        assert not is_injected(plain.model)
    finally:
        liger_trainer.disable()


def test_an_unknown_switch_is_refused(tmp_path):
    with pytest.raises(ValueError, match="did you mean 'rms_norm'"):
        LigerTrainer(
            tiny_model("llama"), arguments(tmp_path), liger_kernel_config={"rmsnorm": True}
        )


# --- TRL --------------------------------------------------------------------------------------


def trl_trainer(folder, asks, cls=None, **changes):
    trl = pytest.importorskip("trl")
    import liger_trainer.trl as drop_in

    cls = cls or drop_in.SFTConfig
    data = Dataset.from_list([{"text": "the cat sat on the mat"}] * 4)
    args = cls(str(folder), **trl_parity.COMMON, **changes)
    kind = trl.SFTTrainer if asks is None else drop_in.SFTTrainer
    more = {} if asks is None else {"liger_kernel_config": asks}
    return kind(
        trl_parity.policy(), args, train_dataset=data,
        processing_class=trl_parity.tiny.tokenizer(), **more,
    )  # fmt: skip


def test_trl_trainers_work_without_the_fields(tmp_path):
    import liger_trainer.trl as drop_in

    expected = losses(trl_trainer(tmp_path, True, use_liger_kernel=True))
    trainer = trl_trainer(tmp_path, True, without_fields(drop_in.SFTConfig))
    assert is_injected(trainer.model)
    assert losses(trainer) == expected


def test_trl_s_next_name_for_the_flag(tmp_path):
    """`use_kernels` asks for these kernels under `enable()`, and the hub's are not looked for."""
    import trl

    import liger_trainer.trl as drop_in

    kwargs = {"use_kernels": True}
    args = trl.SFTConfig(str(tmp_path), model_init_kwargs=kwargs, **trl_parity.COMMON)
    assert request.requested(args) == KernelConfig()
    with request.hidden(args):
        assert args.model_init_kwargs == {}
    assert args.model_init_kwargs == kwargs

    folder = tmp_path / "model"
    trl_parity.policy().save_pretrained(folder)
    trl_parity.tiny.tokenizer().save_pretrained(folder)
    data = Dataset.from_list([{"text": "the cat sat on the mat"}] * 4)
    liger_trainer.enable()
    try:
        trainer = trl.SFTTrainer(str(folder), args, train_dataset=data)
        assert isinstance(trainer, drop_in.FusedTrainer)
        assert is_injected(trainer.model)
        trainer.train()
    finally:
        liger_trainer.disable()
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())
