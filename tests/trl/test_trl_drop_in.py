"""A drop-in changes what its flag says, for its own models, and nothing else."""

import functools
import os
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path

import pytest
import torch
import trl
import trl_parity
from datasets import Dataset

import liger_trainer
from liger_trainer.injection.walk import is_injected

pytestmark = pytest.mark.usefixtures("every_size")

METHODS = ["SFT", "DPO", "KTO", "ORPO", "CPO", "TPO", "GRPO", "RLOO", "GMPO"]
SAMPLING = {"num_generations": 2, "max_completion_length": 4}


def rows(method):
    question, good, bad = "what is two plus two ?", " four .", " the mat ."
    if method == "SFT":
        return [{"text": question + good}, {"text": question + bad}]
    if method == "KTO":
        pairs = ((good, True), (bad, False))
        return [{"prompt": question, "completion": c, "label": label} for c, label in pairs]
    if method in ("GRPO", "RLOO", "GMPO"):
        return [{"prompt": question}, {"prompt": "cat"}]
    answers = {"chosen": good, "rejected": bad}
    third = {"reference": good} if method == "TPO" else {}
    return [{"prompt": question, **answers, **third}] * 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("reference")


@pytest.fixture(scope="module")
def arguments(folder):
    def make(method):
        def build():
            data = Dataset.from_list(rows(method))
            made = {"model": trl_parity.policy_with_reference(folder), "train_dataset": data}
            if method in ("GRPO", "RLOO", "GMPO"):
                made["reward_funcs"] = [length]
            return made

        return build

    return make


def length(completions, **_):
    return [float(len(completion)) for completion in completions]


def config(method, **more):
    return {"max_steps": 1, **(SAMPLING if method in ("GRPO", "RLOO", "GMPO") else {}), **more}


class NotHere:
    @staticmethod
    def apply(*_):
        raise AssertionError("TRL's own head was called")


@pytest.fixture
def without_its_head(monkeypatch):
    """Make TRL's own head raise."""
    monkeypatch.setattr("trl.trainer.utils._ChunkedLogProbFunction", NotHere)


@pytest.fixture(scope="module")
def drop_in(arguments, folder):
    """Train a method's drop-in, once, where neither a warning of the flag nor TRL's head passes."""

    @functools.cache
    def train(method):
        with warnings.catch_warnings(), pytest.MonkeyPatch.context() as patch:
            warnings.filterwarnings("error", message=".*use_liger_kernel.*")
            patch.setattr("trl.trainer.utils._ChunkedLogProbFunction", NotHere)
            out = folder / f"{method}-fused"
            return trl_parity.run(method, out, arguments(method), config(method))

    return train


@pytest.fixture(scope="module")
def stock(arguments, folder):
    """Train by TRL's own class, without the flag, once for each method."""

    @functools.cache
    def train(method):
        out = folder / f"{method}-stock"
        return trl_parity.run(method, out, arguments(method), config(method), flag=False)

    return train


@pytest.mark.parametrize("method", METHODS)
def test_flag_brings_no_warning_that_it_goes_away(method, drop_in):
    assert drop_in(method).losses


def test_such_a_warning_would_be_seen(arguments, tmp_path):
    """TRL's own class warns of its flag; without the other package it also fails."""
    build, options = arguments("SFT"), config("SFT", use_liger_kernel=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*use_liger_kernel.*")
        with pytest.raises((FutureWarning, ImportError)):
            trl_parity.run("SFT", tmp_path, build, options, flag=False)


@pytest.mark.parametrize("method", METHODS)
def test_flag_off_is_the_stock_class(method, arguments, tmp_path, stock):
    """No module is of another class, and numbers differ by no more than in two stock runs (matrix
    products on a CPU depend in the last bit on where in memory their operands lie)."""
    our_class, our_config = trl_parity.classes(method, flag=True)
    its_class, its_config = trl_parity.classes(method, flag=False)
    assert issubclass(our_class, its_class)
    assert our_config is its_config
    off = config(method, use_liger_kernel=False)
    got = trl_parity.run(method, tmp_path, arguments(method), off)
    expected = stock(method)
    assert got.trainer.injection_report is None
    assert not is_injected(got.trainer.model)
    trl_parity.assert_same(got, expected, trl_parity.Tolerance(1e-6, 1e-6, 1e-6))
    types = [[type(m) for m in run.trainer.model.modules()] for run in (got, expected)]
    assert types[0] == types[1]


@pytest.mark.parametrize("method", METHODS)
def test_report_covers_the_whole_policy(method, drop_in):
    built = drop_in(method).trainer
    assert built.args.use_liger_kernel is True
    coverage = built.injection_report.coverage
    assert coverage["rms_norm"] == (5, 5)
    assert coverage["rope"] == coverage["swiglu"] == (2, 2)
    assert not built.injection_report.refused
    assert is_injected(built.model)


@pytest.mark.parametrize("method", ["DPO", "KTO", "GRPO", "RLOO"])
def test_reference_is_injected_too(method, arguments, tmp_path):
    built = trl_parity.trainer(method, tmp_path, arguments(method), config(method, beta=0.1))
    assert is_injected(built.ref_model)


@pytest.mark.parametrize("method", ["SFT", "DPO", "KTO", "GRPO", "RLOO", "GMPO"])
def test_tokens_are_scored_by_our_head(method, arguments, tmp_path, drop_in, without_its_head):
    """Parity would not tell if TRL's own head had done the work."""
    assert drop_in(method).losses
    with pytest.raises(AssertionError, match="TRL's own head"):
        trl_parity.run(method, tmp_path, arguments(method), config(method), flag=False)


def test_kernels_can_be_switched_off(arguments, tmp_path):
    options = config("DPO", liger_kernel_config={"rope": False, "swiglu": False})
    got, _ = trl_parity.parity("DPO", tmp_path, arguments("DPO"), options)
    coverage = got.trainer.injection_report.coverage
    assert coverage["rms_norm"] == (5, 5)
    assert not any(coverage[rule].swapped for rule in ("rope", "swiglu") if rule in coverage)


def test_unknown_kernel_is_refused(arguments, tmp_path):
    options = config("DPO", liger_kernel_config={"rms_nrom": True})
    with pytest.raises(ValueError, match="rms_norm"):
        trl_parity.trainer("DPO", tmp_path, arguments("DPO"), options)


def test_other_models_of_the_process_are_untouched(arguments, tmp_path):
    other = trl_parity.policy()
    ids = torch.arange(3, 20)[None]
    before = other(input_ids=ids, labels=ids)
    types = [type(module) for module in other.modules()]
    trl_parity.run("DPO", tmp_path, arguments("DPO"), config("DPO"))
    after = other(input_ids=ids, labels=ids)
    assert not is_injected(other)
    assert [type(module) for module in other.modules()] == types
    assert torch.equal(after.loss, before.loss)
    assert torch.equal(after.logits, before.logits)


@pytest.mark.parametrize("method", ["SFT", "DPO", "KTO", "GRPO", "RLOO"])
def test_construction_draws_no_random_numbers_more(method, arguments, tmp_path):
    """Else a run of the drop-in would see other data, dropout and samples with the same seed."""
    states = []
    for flag in (True, False):
        trl_parity.trainer(method, tmp_path, arguments(method), config(method), flag)
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


def test_needs_no_other_kernel_package(tmp_path):
    """In a fresh process, where importing one fails."""
    code = """
    import sys
    sys.modules["liger_kernel"] = None
    import trl_parity
    from datasets import Dataset
    data = Dataset.from_list([{"text": "the cat sat on the mat"}] * 4)
    build = lambda: {"model": trl_parity.policy(), "train_dataset": data}
    got = trl_parity.run("SFT", sys.argv[1], build)
    print("trained", len(got.losses))
    """
    command = [sys.executable, "-c", textwrap.dedent(code), str(tmp_path)]
    paths = [str(Path(trl_parity.__file__).parent), *filter(None, sys.path)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.stdout.endswith("trained 2\n"), done.stderr[-2000:]


def test_names_that_do_not_exist():
    with pytest.raises(AttributeError, match="PPOTrainer"):
        _ = liger_trainer.trl.PPOTrainer


def test_classes_are_made_once():
    assert liger_trainer.trl.DPOTrainer is liger_trainer.trl.DPOTrainer
    assert liger_trainer.trl.DPOTrainer.__name__ == "DPOTrainer"


@pytest.fixture
def enabled():
    liger_trainer.enable()
    yield
    liger_trainer.disable()


@pytest.mark.parametrize("method", ["SFT", "DPO", "GRPO", "ORPO"])
def test_enabled_for_the_stock_classes(method, arguments, tmp_path, enabled, stock):
    options = config(method, use_liger_kernel=True)
    got = trl_parity.run(method, tmp_path, arguments(method), options, flag=False)
    liger_trainer.disable()
    expected = stock(method)
    assert got.trainer.injection_report.coverage["rms_norm"] == (5, 5)
    assert is_injected(got.trainer.model)
    trl_parity.assert_same(got, expected)
    assert trl.SFTTrainer is trl_parity.classes("SFT", flag=False)[0]


def test_a_config_under_another_name(arguments, tmp_path, enabled):
    class Mine(trl.SFTTrainer):
        def __init__(self, model, cfg, data):
            tokenizer = trl_parity.tiny.tokenizer()
            super().__init__(model, cfg, train_dataset=data, processing_class=tokenizer)

    made = arguments("SFT")()
    options = {**trl_parity.COMMON, **config("SFT", use_liger_kernel=True)}
    cfg = trl.SFTConfig(str(tmp_path), **options)
    trainer = Mine(made["model"], cfg=cfg, data=made["train_dataset"])
    assert trainer.injection_report.coverage["rms_norm"] == (5, 5)
