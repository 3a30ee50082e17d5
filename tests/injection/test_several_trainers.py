"""Several trainers and one model: the flag and the config of the one at work count."""

import contextlib
import copy
from types import SimpleNamespace

import pytest
import torch
import transformers.trainer
from families import tiny_model
from trainers import Sequences, arguments, assert_same_run, build, losses, train
from transformers import Trainer, set_seed
from transformers.trainer_utils import HPSearchBackend

from liger_trainer import LigerTrainer, disable, enable, inject
from liger_trainer.injection.walk import injected_config, is_injected

pytestmark = pytest.mark.usefixtures("every_size")


@contextlib.contextmanager
def enabled():
    enable()
    try:
        yield
    finally:
        disable()


@pytest.mark.parametrize("cls", [LigerTrainer, Trainer])
def test_with_and_without_the_flag_in_one_notebook(cls, tmp_path, caplog):
    """Both trainers are made first, then each is trained: the flag of the one at work counts."""
    with enabled():
        model = tiny_model("llama")
        on, off = (
            build(cls, tmp_path, model=model, use_liger_kernel=flag) for flag in (True, False)
        )
        start = copy.deepcopy(model.state_dict())
        classes = [type(m) for m in tiny_model("llama").modules()]
        on.train()
        assert is_injected(model)
        model.load_state_dict(start)
        set_seed(off.args.seed)
        off.train()
        assert [type(m) for m in model.modules()] == classes
        assert "use_liger_kernel is off" in caplog.text
        expected = train(Trainer, tmp_path, use_liger_kernel=False)
        assert losses(off) == losses(expected)
        model.load_state_dict(start)
        on.train()
        assert is_injected(model)
        off.evaluate()
        assert not is_injected(model)
    assert not hasattr(Trainer.train, "__wrapped__")


def test_an_injected_model_in_a_stock_trainer_stays_as_it_is(tmp_path):
    """Without `enable` the flag is not this package's, and `inject` was the user's own."""
    model = tiny_model("llama")
    inject(model)
    got = train(Trainer, tmp_path, model=model, use_liger_kernel=False)
    assert is_injected(model)
    assert_same_run(got, train(Trainer, tmp_path, use_liger_kernel=False))


def test_each_trainer_brings_its_own_config(tmp_path):
    model = tiny_model("llama")
    first = build(LigerTrainer, tmp_path, model=model, liger_kernel_config={"rope": False})
    second = build(LigerTrainer, tmp_path, model=model, liger_kernel_config={"swiglu": False})
    for trainer, off, on in ((first, "rope", "swiglu"), (second, "swiglu", "rope")):
        trainer.train()
        assert trainer.injection_report.coverage[off] == (0, 0)
        assert trainer.injection_report.coverage[on] == (2, 2)
        assert getattr(injected_config(model), on)
        assert not getattr(injected_config(model), off)


def test_hyperparameter_search_injects_every_model(tmp_path, monkeypatch):
    made, trained = [], []

    def model_init(trial):
        made.append(tiny_model("llama"))
        return made[-1]

    class Search:
        """Two trials, one after the other."""

        def ensure_available(self):
            pass

        def run(self, trainer, n_trials, direction, **kwargs):
            values = []
            for trial in range(n_trials):
                trainer.objective = None
                trainer.train(trial=SimpleNamespace(number=trial, params={"lr": trial}))
                trained.append((trainer.model, trainer.injection_report, losses(trainer)))
                values.append(trainer.compute_objective(trainer.evaluate()))
            return values

    monkeypatch.setitem(
        transformers.trainer.ALL_HYPERPARAMETER_SEARCH_BACKENDS, HPSearchBackend.OPTUNA, Search
    )
    monkeypatch.setattr("transformers.integrations.hp_params", lambda trial: trial.params)
    trainer = LigerTrainer(
        model_init=model_init, args=arguments(tmp_path), train_dataset=Sequences(),
        eval_dataset=Sequences(6),
    )  # fmt: skip
    found = trainer.hyperparameter_search(
        hp_space=lambda trial: {"learning_rate": [0.1, 0.05][trial.params["lr"]]},
        backend="optuna", n_trials=2,
    )  # fmt: skip
    assert len(found) == 2
    assert [model for model, *_ in trained] == made[-2:]
    for model, report, _ in trained:
        assert is_injected(model)
        assert report.coverage["fused_linear_cross_entropy"] == (1, 1)
    for rate, (_, _, got) in zip([0.1, 0.05], trained, strict=True):
        plain = Trainer(
            model_init=lambda: tiny_model("llama"),
            args=arguments(tmp_path, learning_rate=rate, use_liger_kernel=False),
            train_dataset=Sequences(),
        )
        plain.train()
        torch.testing.assert_close(got, losses(plain), rtol=2e-4, atol=2e-4)
    made.clear()
    trainer.model = trainer.call_model_init(SimpleNamespace(params={}))
    trainer.train()
    assert is_injected(trainer.model)


class WithoutKeywords(torch.nn.Module):
    """No output head, and a forward that takes what it names."""

    def __init__(self):
        super().__init__()
        self.embedding = torch.nn.Embedding(128, 8)
        self.norm = torch.nn.LayerNorm(8)

    def forward(self, input_ids, labels=None):
        hidden = self.norm(self.embedding(input_ids))
        return {"loss": hidden.square().mean(), "hidden": hidden}


def test_a_module_that_takes_no_other_arguments_is_evaluated(tmp_path):
    with enabled():
        trainer = build(Trainer, tmp_path, model=WithoutKeywords(), use_liger_kernel=True)
        trainer.train()
        assert is_injected(trainer.model)
        assert trainer.evaluate()["eval_loss"] > 0
