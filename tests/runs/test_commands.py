"""The commands around training: shipped recipes, help, launching."""

import argparse
import json
import os
import signal
import subprocess
import sys

import engine_cli
import processes
import psutil
import pytest
import tiny
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from run_folders import run
from torch.distributed.elastic.multiprocessing.api import SignalException

from liger_trainer import __version__, cli
from liger_trainer.commands import launch
from liger_trainer.runs import packages, shipped
from liger_trainer.runs.recipe.recipe import load_recipe

# Shipped recipes


def test_recipes_are_listed_with_what_they_take(capsys):
    assert run("recipes") == 0
    printed = capsys.readouterr().out
    for name in shipped.recipe_names():
        line = next(line for line in printed.splitlines() if line.startswith(f"{name} "))
        assert " GB" in line
    line = next(line for line in printed.splitlines() if line.startswith("dpo/qwen3-8b-lora"))
    assert "Qwen/Qwen3-8B" in line
    assert "trl, peft, a model hub" in line


def test_a_recipe_is_shown_as_it_is_and_trained_by_its_name(capsys):
    assert run("recipes", "show", "sft/qwen3-8b-lora") == 0
    text = shipped.shipped("sft/qwen3-8b-lora.yaml").read_text()
    assert capsys.readouterr().out == text
    recipe = load_recipe("sft/qwen3-8b-lora", ["training.seed=3"])
    assert recipe.values["training"]["seed"] == 3
    assert str(recipe.output_dir) == "runs/qwen3-8b-lora"


@pytest.mark.parametrize("words", [["recipes", "show", "sft/qwen"], ["train", "sft/qwen3-8b-loro"]])
def test_an_unknown_recipe_lists_near_names(capsys, words):
    assert run(*words) == 2
    assert "sft/qwen3-8b-lora" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["show"], "which one? `liger-trainer recipes` lists the names"),
        (["list", "sft/qwen3-8b-lora"], "takes no name: `liger-trainer recipes show sft/qwen3"),
        (["show", "nothing"], "no recipe 'nothing'; `liger-trainer recipes` lists them"),
        (["sft/qwen3-8b-lora"], "did you mean `liger-trainer recipes show sft/qwen3-8b-lora`?"),
    ],
)
def test_recipes_says_what_is_missing(capsys, words, message):
    assert run("recipes", *words) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train", "a", "--training.seed=3"], "without dashes: training.seed=VALUE)"),
        (["train", "a", "--learning_rate", "1"], "without dashes: training.learning_rate=VALUE)"),
        (["merge", "a", "--seed"], "unrecognized arguments: --seed; see `liger-trainer --help`\n"),
        (["plan", "a"], "arguments are required: --memory; see `liger-trainer plan --help`\n"),
        (["data", "a", "--rows", "x"], "argument --rows: invalid int value: 'x'"),
    ],
)
def test_wrong_arguments_are_told_in_one_line(capsys, words, message):
    with pytest.raises(SystemExit) as stopped:
        run(*words)
    printed = capsys.readouterr().err
    assert stopped.value.code == 2
    assert message in printed
    assert printed.startswith("error: ")
    assert printed.count("\n") == 1


def test_version_and_module():
    command = [sys.executable, "-m", "liger_trainer", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == f"liger-trainer {__version__}"


def test_env_tells_what_is_missing(capsys, monkeypatch):
    monkeypatch.setattr(packages, "installed", lambda *names: "wandb" not in names)
    assert run("env") == 0
    printed = capsys.readouterr().out
    assert torch.__version__ in printed
    assert "pip install wandb" in printed
    assert "pip install peft" not in printed


def test_every_command_has_help_with_examples(capsys):
    for command in cli.COMMANDS:
        name = command.__name__.rpartition(".")[2]
        with pytest.raises(SystemExit):
            run(name, "--help")
        printed = capsys.readouterr().out
        assert f"  liger-trainer {name}" in printed.partition("examples:")[2]


def test_the_shell_completes_commands_and_recipes():
    pytest.importorskip("argcomplete")
    import argcomplete

    finder = argcomplete.CompletionFinder(cli.build_parser())

    def completed(*words):
        *before, last = words
        return finder._get_completions(["liger-trainer", *before], last, "", None)

    assert any(c.strip() == "merge" for c in completed("me"))
    assert any(c.strip() == "sft/qwen3-8b-lora" for c in completed("train", "sft/qw"))
    assert any(c.strip() == "dpo/qwen3-8b-lora" for c in completed("recipes", "show", "dpo/qw"))
    assert any(c.strip() == "zero3" for c in completed("launch", "a", "--accelerate", "ze"))


# Several processes


def options(**given):
    usual = {"recipe": "full.yaml", "overrides": ["training.seed=1"], "processes": 2}
    usual |= {"accelerate": "ddp", "resume": True, "overwrite": False, "debug": False}
    return argparse.Namespace(**usual | given)


@pytest.mark.parametrize("name", shipped.accelerate_names())
def test_accelerate_understands_every_configuration(here, name, monkeypatch):
    path = shipped.shipped(f"accelerate/{name}.yaml")
    known = load_config_from_file(str(path)).to_dict()
    assert {*yaml.safe_load(path.read_text())} <= {*known}
    monkeypatch.setattr(packages, "installed", lambda *names: True)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    parsed = launch_command_parser().parse_args(launch.command(options(accelerate=name)))
    parsed, _, _ = _validate_launch_command(parsed)
    assert parsed.num_processes == 2
    assert (parsed.use_fsdp, parsed.use_deepspeed, parsed.multi_gpu) == {
        "ddp": (False, False, True),
        "tensor_parallel": (False, False, True),
        "fsdp2": (True, False, False),
        "context_parallel": (True, False, False),
    }.get(name, (False, True, False))
    assert (parsed.training_script, parsed.module) == ("liger_trainer", True)
    script = ["train", "full.yaml", "training.seed=1", "--resume"]
    assert parsed.training_script_args[:-2] == script
    assert parsed.training_script_args[-2:] == [
        "--command",
        f"liger-trainer launch full.yaml training.seed=1 --processes 2 --accelerate {name}",
    ]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--processes", "0"], "--processes is 0"),
        (["--processes", "1", "--accelerate", "zero9"], "neither a file nor one of context_par"),
        (["--processes", "1", "training.lerning_rate=1"], "did you mean 'learning_rate'"),
        (["--processes", "2", "--accelerate", "zero3"], "zero3 needs DeepSpeed: `pip install"),
        (["--processes", "2", "--accelerate", "fsdp2"], "fsdp2 needs GPUs, and there are none"),
        (["--processes", "2", "--accelerate", "full.yaml"], "it has no distributed_type"),
        (["--processes", "2", "--accelerate", "chat.jsonl"], "chat.jsonl cannot be read: "),
    ],
)
def test_launch_checks_first(here, capsys, words, message, monkeypatch):
    monkeypatch.setattr(packages, "installed", lambda *names: "deepspeed" not in names)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    assert run("launch", "full.yaml", *words) == 2
    assert message in capsys.readouterr().err


def test_processes_on_cpus_train_together_and_stop_together(tmp_path):
    values = tiny.recipe_values(tmp_path, logging_steps=1, max_steps=500, disable_tqdm=False)
    del values["training"]["use_cpu"]
    path = tiny.write_recipe(tmp_path, values)
    started = subprocess.Popen(
        [sys.executable, "-m", "liger_trainer", "launch", str(path), "--processes", "2"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    for line in started.stdout:
        if line.startswith("step     2"):
            os.killpg(started.pid, signal.SIGINT)  # as Ctrl-C does: to all of them
            break
    told, errors = started.communicate(timeout=200)
    assert started.returncode == 130
    assert "Traceback" not in errors
    assert errors.count("Stopping after this step") == 1
    again = f"liger-trainer launch {path} --processes 2 --accelerate ddp --resume"
    assert told.rstrip().endswith(again)
    assert json.loads((tmp_path / "out/run.json").read_text())["processes"] == 2


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"command": "again"}, 0),
        ({}, 130),
        ({"state": "interrupted"}, 130),
        ({"warnings": ["a loss was NaN"]}, 1),
    ],
    ids=["finished", "an earlier run is in the folder", "interrupted", "finished with a warning"],
)
def test_a_signal_after_training_does_not_fail_a_finished_run(finished, monkeypatch, changes, code):
    """Torch's launcher raises for any signal, whatever the processes have done with it."""

    def signaled(_):
        record = json.loads((finished / "run.json").read_text())
        (finished / "run.json").write_text(json.dumps(record | changes))
        raise SignalException("SIGTERM", signal.SIGTERM)

    monkeypatch.setattr("accelerate.commands.launch.launch_command", signaled)
    monkeypatch.setattr(psutil.Process, "children", lambda self, recursive: [])
    assert launch.main(options(recipe="recipe.yaml", overrides=[], dry_run=False)) == code


def test_what_fails_in_a_process_is_told_without_a_traceback(tmp_path):
    path = tiny.write_recipe(tmp_path, tiny.recipe_values(tmp_path))
    words = [str(path), "data.path=missing.jsonl", "--processes", "2"]
    launcher = processes.fork(engine_cli.launch, tmp_path, words, tmp_path / "errors")
    launcher.join(200)
    errors = (tmp_path / "errors").read_text()
    assert launcher.exitcode == 2
    assert "error: data: no file 'missing.jsonl'" in errors
    assert "Traceback" not in errors


# Rewards


def test_a_reward_beside_the_recipe_is_found(tmp_path, monkeypatch):
    pytest.importorskip("trl")
    from liger_trainer.runs.build import load_rewards

    (tmp_path / "beside").mkdir()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "beside" / "its_reward.py").write_text("def short(completions, **_): return [1.0]")
    (tmp_path / "working_reward.py").write_text("def long(completions, **_): return [2.0]")
    path = tiny.write_recipe(tmp_path / "beside", tiny.alignment_values(tmp_path, "grpo"))
    functions = "reward.functions=[its_reward:short, working_reward:long]"
    before = list(sys.path)
    rewards = load_rewards(load_recipe(path, [functions]))
    assert [reward([""]) for reward in rewards] == [[1.0], [2.0]]
    assert sys.path == before


def test_a_dry_run_plans_what_is_trained(tmp_path, capsys):
    pytest.importorskip("peft")
    pytest.importorskip("trl")
    recipe = tiny.write_recipe(tmp_path, tiny.recipe_values(tmp_path, use_liger_kernel=True))
    assert run("train", recipe, "--dry-run", "peft={target_modules: all-linear}") == 0
    assert "\nlora  " in capsys.readouterr().out
    values = tiny.alignment_values(tmp_path, "reward", use_liger_kernel=True)
    assert run("train", tiny.write_recipe(tmp_path, values), "--dry-run") == 0
    assert "the model has no output embeddings" in capsys.readouterr().out
