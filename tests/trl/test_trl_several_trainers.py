"""Several of TRL's trainers, one after the other, with one model."""

import copy

import pytest
import trl_parity
from datasets import Dataset
from transformers import set_seed

from liger_trainer.injection.walk import injected_config, is_injected

QUESTION, GOOD, BAD = "what is two plus two ?", " four .", " the mat ."
ROWS = {
    "SFT": [{"text": QUESTION + GOOD}, {"text": QUESTION + BAD}],
    "DPO": [{"prompt": QUESTION, "chosen": GOOD, "rejected": BAD}] * 2,
    "ORPO": [{"prompt": QUESTION, "chosen": GOOD, "rejected": BAD}] * 2,
}


def build(method, folder, model, flag=True, **options):
    cls, config = trl_parity.classes(method, flag=True)
    data = Dataset.from_list(ROWS[method])
    args = config(
        str(folder), **{**trl_parity.COMMON, "max_steps": 1, "use_liger_kernel": flag, **options}
    )
    tokenizer = trl_parity.tiny.tokenizer()
    reference = {"ref_model": trl_parity.tiny.model(seed=1)} if method == "DPO" else {}
    return cls(model=model, args=args, train_dataset=data, processing_class=tokenizer, **reference)


def log_of(trainer):
    set_seed(0)
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("method", ROWS)
def test_with_and_without_the_flag_in_one_notebook(method, tmp_path):
    model = trl_parity.tiny.model()
    plain = copy.deepcopy(model)
    start = copy.deepcopy(model.state_dict())
    classes = [type(m) for m in model.modules()]
    on, off = (build(method, tmp_path, model, flag) for flag in (True, False))
    with_kernels = log_of(on)
    assert is_injected(model)
    model.load_state_dict(start)
    without = log_of(off)
    assert [type(m) for m in model.modules()] == classes
    assert off.injection_report is None
    expected = log_of(build(method, tmp_path, plain, flag=False))
    assert without == pytest.approx(expected, rel=1e-6)
    assert with_kernels == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("method", ROWS)
def test_each_trainer_brings_its_own_config_and_report(method, tmp_path):
    model = trl_parity.tiny.model()
    first = build(method, tmp_path, model, liger_kernel_config={"rope": False})
    second = build(method, tmp_path, model, liger_kernel_config={"swiglu": False})
    for trainer, off, on in ((first, "rope", "swiglu"), (second, "swiglu", "rope")):
        assert trainer.injection_report.coverage[off] == (0, 0)
        assert trainer.injection_report.coverage[on] == (2, 2)
        trainer.train()
        assert not getattr(injected_config(model), off)
        assert getattr(injected_config(model), on)
