"""Recipes of TRL's methods, from the command line to the report, on a tiny model."""

import json
import os
import re
import signal
import subprocess
import sys

import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from liger_trainer import cli
from liger_trainer.runs.build import build_trainer
from liger_trainer.runs.data.prepare import prepare
from liger_trainer.runs.data.task import Purpose
from liger_trainer.runs.load import load_tokenizer
from liger_trainer.runs.recipe import methods
from liger_trainer.runs.recipe.compare import differences
from liger_trainer.runs.recipe.recipe import load_recipe
from liger_trainer.runs.report import plots
from liger_trainer.runs.throughput import Throughput

pytest.importorskip("trl")

PAIRED = {"loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies"}
REWARDED = {"reward", "rewards/parses/mean", "rewards/passes_tests/mean", "entropy"}
HELD_OUT = {
    "dpo": PAIRED | {"entropy", "mean_token_accuracy"},
    "orpo": PAIRED | {"nll_loss", "log_odds_chosen"},
    "cpo": PAIRED | {"nll_loss"},
    "simpo": PAIRED,
    "kto": PAIRED - {"rewards/accuracies"} | {"kl", "entropy"},
    "reward": {"loss", "accuracy", "margin", "mean_reward"},
    "distillation": {"loss"},
    "grpo": REWARDED,
    "rloo": REWARDED,
}


def recipe_of(tmp_path, method, **training):
    return tiny.write_recipe(tmp_path, tiny.alignment_values(tmp_path, method, **training))


def train(path, *arguments):
    return cli.main(["train", str(path), *arguments])


def state(folder):
    return json.loads((folder / "run.json").read_text())


@pytest.mark.parametrize(
    ("method", "flag"), [*((method, "true") for method in HELD_OUT), ("dpo", "false")]
)
def test_every_method_trains_and_leaves_a_model_and_a_report(
    tmp_path, capsys, monkeypatch, method, flag
):
    if (method, flag) != ("dpo", "true"):  # one draws: figures take as long as the training
        monkeypatch.setattr(plots, "_plot", lambda chart, lines: "<svg></svg>")
    assert train(recipe_of(tmp_path, method), f"training.use_liger_kernel={flag}") == 0
    out, printed = tmp_path / "out", capsys.readouterr().out
    finished = state(out)
    assert finished["state"] == "finished"
    held_out = finished["summary"]["held_out"]
    assert HELD_OUT[method] <= set(held_out)
    assert not {"runtime", "num_tokens"} & set(held_out)
    assert finished["summary"]["tokens"] > 0
    assert finished["summary"]["steps"] == 3
    assert ("coverage:" in printed) == (flag == "true")
    rewarded = HELD_OUT[method] is REWARDED
    told = {"reward": "held-out margin of scores ", "distillation": "held-out loss "}
    told = told.get(method, "held-out reward margin ")
    assert ("held-out reward " if rewarded else told) in printed
    assert "tokens/s" in printed
    report = (out / "report.html").read_text()
    assert report.count("<svg") >= 6
    assert ("held-out loss" in report) != rewarded
    kind = AutoModelForSequenceClassification if method == "reward" else AutoModelForCausalLM
    assert kind.from_pretrained(out).config.num_labels == (1 if method == "reward" else 2)


@pytest.mark.usefixtures("no_figures")
def test_preference_training_raises_what_it_is_for(tmp_path):
    """The pairs differ in their last words alone, which a tiny model learns in a few steps."""
    recipe = recipe_of(tmp_path, "dpo", max_steps=8, learning_rate=5e-3)
    assert train(recipe) == 0
    held_out = state(tmp_path / "out")["summary"]["held_out"]
    assert held_out["rewards/margins"] == [0.0, pytest.approx(held_out["rewards/margins"][1])]
    assert held_out["rewards/margins"][1] > 0.5
    assert held_out["rewards/accuracies"] == [0.0, 1.0]
    assert held_out["loss"][1] < held_out["loss"][0]


@pytest.mark.usefixtures("no_figures")
@pytest.mark.parametrize("method", ["dpo", "orpo"])
def test_tokens_are_those_of_both_sequences_without_padding(tmp_path, method):
    recipe = recipe_of(tmp_path, method, max_steps=-1, num_train_epochs=1)
    assert train(recipe) == 0
    parsed = load_recipe(recipe)
    tokenizer = load_tokenizer(parsed.model)
    pairs = prepare(parsed.data, tokenizer, Purpose("pairs"), seed=42).train
    sequences = [p["prompt"] + p[side] for p in pairs for side in ("chosen", "rejected")]
    texts = [tokenizer.apply_chat_template(s, tokenize=False) for s in sequences]
    # ORPO adds the token that ends a sequence where the template has put a line break after it.
    extra = len(texts) if method == "orpo" else 0
    expected = sum(len(tokenizer(text)["input_ids"]) for text in texts) + extra
    assert state(tmp_path / "out")["summary"]["tokens"] == expected


@pytest.mark.usefixtures("no_figures")
@pytest.mark.parametrize("method", ["dpo", "orpo"])
def test_an_interrupted_run_resumes_to_the_same_model(tmp_path, method, monkeypatch):
    recipe = recipe_of(tmp_path, method, max_steps=4)

    def interrupt(self, args, state, control, **kwargs):
        if state.global_step == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(Throughput, "on_step_begin", interrupt)
        assert train(recipe) == 130
    assert state(tmp_path / "out")["summary"]["steps"] == 2
    assert train(recipe, "--resume") == 0
    whole = tmp_path / "whole"
    assert train(recipe, f"training.output_dir={whole}") == 0
    resumed, uninterrupted = (state(f)["summary"] for f in (tmp_path / "out", whole))
    for name in ("held_out", "training", "tokens", "steps"):
        assert resumed[name] == uninterrupted[name], name
    expected = AutoModelForCausalLM.from_pretrained(whole).state_dict()
    for name, weight in AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict().items():
        assert torch.equal(weight, expected[name]), name


def test_too_few_prompts_for_one_batch_are_no_finished_run(tmp_path, capsys):
    recipe = recipe_of(tmp_path, "grpo", gradient_accumulation_steps=16)
    assert train(recipe, "reward.functions=[parses]", "data.eval_fraction=null") == 1
    assert "training ended after 0 of 3 steps" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("method", ["dpo", "kto"])
def test_the_reference_is_built_as_the_policy_is(tmp_path, method):
    """By the name alone it would have the saved value of what the recipe overrides."""
    recipe = load_recipe(recipe_of(tmp_path, method), ["model.config.rms_norm_eps=0.5"])
    trainer, _ = build_trainer(recipe, recipe.training_arguments())
    assert trainer.ref_model is not trainer.model
    assert trainer.ref_model.config.rms_norm_eps == 0.5
    policy = trainer.model.state_dict()
    assert all(torch.equal(w, policy[name]) for name, w in trainer.ref_model.state_dict().items())


@pytest.mark.parametrize(
    "override", ["peft.target_modules=all-linear", "training.precompute_ref_log_probs=true"]
)
def test_no_reference_is_kept_where_none_is_needed(tmp_path, override):
    pytest.importorskip("peft")
    recipe = load_recipe(recipe_of(tmp_path, "dpo"), [override])
    trainer, _ = build_trainer(recipe, recipe.training_arguments())
    assert trainer.ref_model is None


@pytest.mark.usefixtures("no_figures")
def test_lora_leaves_an_adapter(tmp_path):
    pytest.importorskip("peft")
    recipe = recipe_of(tmp_path, "dpo")
    options = ["peft.r=4", "peft.target_modules=all-linear", "training.use_liger_kernel=true"]
    assert train(recipe, *options) == 0
    assert (tmp_path / "out" / "adapter_config.json").exists()
    assert state(tmp_path / "out")["summary"]["held_out"]["rewards/margins"][1] != 0


def count_of_e(completions, **_):
    """A reward of one's own, for `reward.functions`."""
    return [float(c[0]["content"].count("e")) for c in completions]


@pytest.mark.usefixtures("no_figures")
def test_a_reward_of_ones_own(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "own_rewards", sys.modules[__name__])
    recipe = recipe_of(tmp_path, "grpo")
    assert train(recipe, "reward.functions=[own_rewards:count_of_e]") == 0
    assert "rewards/count_of_e/mean" in state(tmp_path / "out")["summary"]["held_out"]


@pytest.mark.parametrize(
    ("method", "override", "message"),
    [
        ("dpo", "data.packing=true", "data.packing: not for dpo"),
        ("kto", "data.assistant_only=false", "data.assistant_only: not for kto"),
        ("grpo", "data.max_length=64", r"data.max_length: not for grpo"),
        ("dpo", "training.max_length=64", "set data.max_length instead"),
        (
            "orpo",
            "training.model_init_kwargs={dtype: float16}",
            "keys of the section model instead",
        ),
        ("kto", "training.include_num_input_tokens_seen=all", "tokens are counted anyway"),
        ("dpo", "training.betta=0.2", "unknown key 'betta'; did you mean 'beta'"),
        ("dpo", "training.simpo_gamma=1", "training: unknown key 'simpo_gamma'"),
        ("simpo", "training.loss_type=hinge", "simpo means 'simpo'"),
        ("dpo", "reward.functions=[parses]", "reward: not for dpo"),
        ("grpo", "reward=null", "grpo needs rewards"),
        ("grpo", "training.use_vllm=true", "training.use_vllm.*pip install vllm"),
        ("reward", "reward.functions=[parses]", "reward: not for reward"),
        ("distillation", "teacher=null", "teacher: distillation needs a teacher"),
        ("dpo", "teacher.name_or_path=model", "teacher: not for dpo"),
        ("distillation", "training.teacher_model_revision=v1", "set teacher.revision instead"),
        ("rloo", "reward=null", "rloo needs rewards"),
        ("rloo", "model.revision=v1", "training.beta is 0.05.*without model.revision"),
        ("grpo", "reward.functions=[]", "grpo needs rewards"),
        ("grpo", "reward.functions=[parse]", "no function 'parse'"),
        ("grpo", "reward.function=parses", "did you mean 'functions'"),
        ("grpo", "training.reward_weights=[1.0]", "1 weights for 2 functions"),
        ("grpo", "model.revision=v1 training.beta=0.1", "without model.revision"),
        ("grpo", "training.num_generations_eval=3", "not a multiple of the 3"),
        ("grpo", "data.columns={text: tests}", "no column 'tests'.*reward.functions"),
        ("dpo", "data.columns={label: rejected}", "no column 'rejected'"),
        ("dpo", "data.max_length=8", r"alone fills data.max_length \(8 tokens\)"),
        ("dpo", "training.sync_ref_model=true peft.r=2", "training: .*sync_ref_model"),
        ("kto", "training.per_device_train_batch_size=1", "must be > 1"),
    ],
)
def test_what_a_method_cannot_use_is_refused(tmp_path, capsys, method, override, message):
    values = tiny.alignment_values(tmp_path, method if method != "sft" else "dpo")
    recipe = tiny.write_recipe(tmp_path, values | {"method": method})
    assert train(recipe, *shell_words(override)) == 2
    errors = [e for e in capsys.readouterr().err.splitlines() if e.startswith("error: ")]
    assert len(errors) == 1
    assert re.search(message, errors[0]), errors[0]


@pytest.mark.parametrize(
    ("method", "overrides"),
    [
        ("dpo", ["data.packing=false", "data.assistant_only=true"]),
        ("orpo", ["data.streaming=false"]),
        ("grpo", ["data.packing=false", "data.num_proc=null", "data.max_length=null"]),
        ("simpo", ["training.loss_type=simpo"]),
    ],
)
def test_what_a_method_does_anyway_may_be_said(tmp_path, method, overrides):
    recipe = recipe_of(tmp_path, method)
    assert differences(load_recipe(recipe).values, load_recipe(recipe, overrides)) == []


def shell_words(text):
    return text.split(" ") if text.count("=") > 1 and "{" not in text else [text]


def test_without_trl_the_error_says_what_to_install(tmp_path, monkeypatch, capsys):
    recipe = recipe_of(tmp_path, "dpo")
    monkeypatch.setitem(sys.modules, "trl", None)
    assert train(recipe) == 2
    assert "method: dpo needs TRL" in (error := capsys.readouterr().err)
    assert "pip install trl" in error


def test_an_sft_recipe_does_not_load_trl(tmp_path):
    recipe = tiny.write_recipe(tmp_path, tiny.recipe_values(tmp_path, max_steps=1))
    code = (
        "import sys; from liger_trainer import cli; "
        f"cli.main(['train', {str(recipe)!r}]); print('trl' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"


def test_dry_run_tells_what_the_method_and_the_data_decide(tmp_path, capsys):
    assert train(recipe_of(tmp_path, "simpo"), "--dry-run", "training.beta=2") == 0
    printed = capsys.readouterr().out
    for line in (
        "method: simpo",
        "beta: 2.0  # command line",
        "loss_type: simpo  # method simpo",
        "cpo_alpha: 0.0  # method simpo",
        "max_length: 64  # data.max_length",
        "max_steps: 3  # recipe",
    ):
        assert line in printed
    assert "packing" not in printed
    assert not (tmp_path / "out").exists()


def test_dry_run_of_grpo_shows_its_reward(tmp_path, capsys):
    assert train(recipe_of(tmp_path, "grpo"), "--dry-run") == 0
    printed = capsys.readouterr().out
    assert "reward:\n  functions:  # recipe\n  - parses\n" in printed
    assert "max_length" not in printed


def test_the_data_section_decides_the_length(tmp_path):
    recipe = load_recipe(recipe_of(tmp_path, "orpo"), ["data.max_length=48", "data.num_proc=2"])
    args = recipe.training_arguments()
    assert (args.max_length, args.dataset_num_proc) == (48, 2)


def test_every_method_has_a_trainer_and_a_configuration():
    for name in methods.METHODS:
        trainer, arguments = methods.trainer_class(name), methods.arguments_class(name)
        assert trainer.__module__.startswith("liger_trainer")
        assert hasattr(arguments, "__dataclass_fields__")
