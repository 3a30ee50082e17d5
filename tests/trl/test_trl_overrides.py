"""Every method of a TRL trainer that is replaced: logits are never built, and nothing else changes.

Parity alone does not tell whether a replacement is reached: TRL's own method gives the same numbers
from whole logits. So each one is also taken away, and its absence must show.
"""

import importlib
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
import trl_parity
from datasets import Dataset
from shapes import Shapes
from transformers import T5Config, T5ForConditionalGeneration
from trl_parity import ROWS

import liger_trainer.trl as drop_in
from liger_trainer import restore
from liger_trainer.deferred import handlers, loss_scope
from liger_trainer.deferred.logits import DeferredLogits
from liger_trainer.kernels.linear import workspace

pytestmark = pytest.mark.usefixtures("every_size", "small_workspaces")

WIDTH, VOCAB = 16, 320
LONG = " the cat sat on the mat and is two"


@pytest.fixture
def small_workspaces(monkeypatch):
    monkeypatch.setattr(workspace, "rows_on", lambda *_: 4)
    monkeypatch.setattr(handlers, "WORKSPACE_BYTES", 4 * 4 * VOCAB)


def decoder(seed: int = 0):
    return trl_parity.policy(seed, hidden_size=WIDTH, vocab_size=VOCAB)


def encoder_decoder():
    torch.manual_seed(0)
    sizes = {"d_model": WIDTH, "d_kv": 4, "d_ff": 32, "num_layers": 1, "num_heads": 4}
    tokens = {"pad_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 0}
    config = T5Config(vocab_size=VOCAB, dropout_rate=0.0, **sizes, **tokens)
    return trl_parity.sharpen(T5ForConditionalGeneration(config), scale=0.5)


def pairs(model=decoder, **columns):
    rows = [{"prompt": p, "chosen": c + LONG, "rejected": r + LONG} for p, c, r in ROWS]
    return {"model": model(), "train_dataset": Dataset.from_list([r | columns for r in rows])}


def chats():
    rows = [
        [{"role": "user", "content": p}, {"role": "assistant", "content": c}] for p, c, _ in ROWS
    ]
    data = Dataset.from_list([{"messages": messages} for messages in rows])
    return {"model": decoder(), "teacher_model": decoder(seed=5), "train_dataset": data}


def prompts():
    data = Dataset.from_list([{"prompt": prompt} for prompt, _, _ in ROWS])
    return {"model": decoder(), "teacher_model": decoder(seed=5), "train_dataset": data}


class Case(NamedTuple):
    build: Callable[[], dict]
    config: dict = {}  # noqa: RUF012
    losses_from_logits: int = 0  # calls of cross entropy in a step


PAIRS = Case(pairs)
SEQUENCES = Case(lambda: pairs(encoder_decoder), losses_from_logits=1)
SAMPLES = Case(prompts, {"per_device_train_batch_size": 4, "max_completion_length": 12})
CASES = {
    "CPO.concatenated_forward": PAIRS,
    "CPO.get_batch_logps": SEQUENCES,
    "Distillation._compute_loss": SAMPLES,
    "Distillation._get_last_hidden_state": SAMPLES,
    "GKD.generalized_jsd_loss": Case(chats, {"lmbda": 0.0}),
    "ORPO.concatenated_forward": PAIRS,
    "ORPO.get_batch_logps": SEQUENCES,
    "TPO._compute_loss": Case(lambda: pairs(reference=" it is" + LONG), losses_from_logits=1),
}


def run(name, tmp_path, monkeypatch):
    """One step of the drop-in; asserts that it built no logits, and made no pass without need."""
    case, losses = CASES[name], []
    fused_loss = handlers.linear_cross_entropy

    def counted(hidden, weights, *args, **kwargs):
        losses.append(len(weights[0]))
        return fused_loss(hidden, weights, *args, **kwargs)

    monkeypatch.setattr(handlers, "linear_cross_entropy", counted)
    method = name.split(".")[0]
    with Shapes() as shapes:
        got = trl_parity.run(method, tmp_path / "got", case.build, {"max_steps": 1, **case.config})
    largest = shapes.largest(VOCAB)
    assert 0 < largest <= WIDTH, f"{largest} rows of logits"  # WIDTH: the head's transposed weight
    count = losses.count(VOCAB)  # the probe's vocabulary is another
    assert count == case.losses_from_logits, f"{count} losses from logits"
    return got


@pytest.mark.parametrize("name", CASES)
def test_builds_no_logits_and_computes_the_same(name, tmp_path, monkeypatch):
    case = CASES[name]
    config = {"max_steps": 1, **case.config}
    got = run(name, tmp_path, monkeypatch)
    expected = trl_parity.run(
        name.split(".")[0], tmp_path / "expected", case.build, config, flag=False
    )
    assert got.gradients
    trl_parity.assert_same(got, expected)


@pytest.mark.parametrize("missing", ["this one", "all"])
@pytest.mark.parametrize("name", CASES)
def test_would_fail_without_it(name, missing, tmp_path, monkeypatch, remade):
    made = drop_in.overrides
    method = name.split(".")[1]

    def overrides(trainer):
        kept = {} if missing == "all" else made(trainer)
        return {attribute: value for attribute, value in kept.items() if attribute != method}

    monkeypatch.setattr(drop_in, "overrides", overrides)
    with pytest.raises(AssertionError, match=r"(rows of|losses from) logits"):
        run(name, tmp_path, monkeypatch)


def trl_rows(method, tmp_path, build, config):
    built = trl_parity.trainer(method, tmp_path, build, config)
    return {r.site: r for r in built.injection_report.rows if r.rule == "trl"}, built


@pytest.mark.parametrize("name", CASES)
def test_report_names_what_is_replaced(name, tmp_path):
    case, (method, attribute) = CASES[name], name.split(".")
    rows, built = trl_rows(method, tmp_path, case.build, case.config)
    row = rows[f"{method}Trainer.{attribute}"]
    assert row.swapped
    assert "deferred logits" in row.reason
    assert row.site in str(built.injection_report)


@pytest.mark.parametrize("name", CASES)
def test_report_says_when_trl_does_it(name, tmp_path):
    case, (method, attribute) = CASES[name], name.split(".")
    off = {"liger_kernel_config": {"fused_linear_cross_entropy": False}}
    rows, _ = trl_rows(method, tmp_path, case.build, case.config | off)
    row = rows[f"{method}Trainer.{attribute}"]
    assert not row.swapped
    assert not row.eligible
    assert "TRL's own" in row.reason


@pytest.mark.parametrize("method", ["CPO", "ORPO"])
@pytest.mark.parametrize(
    ("build", "unused"),
    [(pairs, "get_batch_logps"), (lambda: pairs(encoder_decoder), "concatenated_forward")],
    ids=["decoder", "encoder-decoder"],
)
def test_report_says_which_scoring_of_pairs_is_not_called(method, build, unused, tmp_path):
    rows, _ = trl_rows(method, tmp_path, build, {})
    assert [site for site, row in rows.items() if not row.swapped] == [f"{method}Trainer.{unused}"]


@pytest.mark.parametrize("flag", [False, True])
@pytest.mark.parametrize("method", ["CPO", "ORPO"])
def test_an_encoder_decoder_trains_and_evaluates_as_with_trl(method, flag, tmp_path):
    def build():
        made = pairs(encoder_decoder)
        return made | {"eval_dataset": made["train_dataset"]}

    config = {"max_steps": 3, "use_liger_kernel": flag}
    got = trl_parity.run(method, tmp_path / "got", build, config)
    config["use_liger_kernel"] = False
    expected = trl_parity.run(method, tmp_path / "expected", build, config, flag=False)
    assert (got.trainer.injection_report is not None) is flag
    trl_parity.assert_same(got, expected)


@pytest.mark.parametrize("to_fp32", [False, True])
def test_report_names_the_head(to_fp32, tmp_path):
    def build():
        made = prompts() | {"reward_funcs": [lambda **_: [0.0]]}
        return {name: value for name, value in made.items() if name != "teacher_model"}

    config = {"cast_lm_head_to_fp32": to_fp32, "num_generations": 2}
    rows, _ = trl_rows("GRPO", tmp_path, build, config)
    row = rows["add_fused_lm_head"]
    assert row.swapped is not to_fp32
    assert ("cast_lm_head_to_fp32" in row.reason) is to_fp32


def sft(model, tmp_path):
    data = Dataset.from_list([{"text": "cat" + LONG}])
    return trl_parity.trainer("SFT", tmp_path, lambda: {"model": model, "train_dataset": data})


def test_plain_calls_reach_the_forward_that_the_class_has_then(tmp_path):
    """TRL keeps the forward of before the injection for calls that are not for its head."""
    model, ids = sft(decoder(), tmp_path).model, torch.arange(3, 9)[None]
    with loss_scope():
        assert isinstance(model(input_ids=ids).logits, DeferredLogits)
    restore(model)
    with loss_scope():
        assert type(model(input_ids=ids).logits) is torch.Tensor


def test_modules_of_trl_are_left_as_they_were(tmp_path):
    module = importlib.import_module("trl.trainer.sft_trainer")
    before = dict(vars(module))
    sft(decoder(), tmp_path)
    assert vars(module) == before


def test_plain_calls_reach_a_forward_that_others_put_on_the_instance(tmp_path):
    model, calls = decoder(), []
    forward = model.forward
    model.forward = lambda **kwargs: calls.append(1) or forward(**kwargs)
    sft(model, tmp_path).model(input_ids=torch.arange(3, 9)[None])
    assert calls == [1]


@pytest.fixture
def remade():
    """Classes are made anew, within the test and after it."""
    drop_in.fused.cache_clear()
    yield
    drop_in.fused.cache_clear()


def test_every_override_has_a_case():
    names = set()
    for method, home in drop_in._TRL_MODULES.items():
        trainer = getattr(importlib.import_module(home), f"{method}Trainer")
        names |= {f"{method}.{name}" for name in drop_in.overrides(trainer)}
    assert names == CASES.keys()
