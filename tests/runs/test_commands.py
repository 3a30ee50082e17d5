"""The commands around training: shipped recipes, launching, stages, and what comes after a run."""

import argparse
import json
import subprocess
import sys
from html import unescape
from pathlib import Path

import pytest
import tiny
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from liger_trainer import __version__, cli
from liger_trainer.commands import launch
from liger_trainer.runs import html, packages, shipped
from liger_trainer.runs.finished import open_run
from liger_trainer.runs.load import ModelArguments, load_model, load_tokenizer
from liger_trainer.runs.recipe import load_recipe

AFTER = {
    "evaluate": [],
    "generate": ["--prompts", "prompts.txt"],
    "chat": [],
    "merge": [],
    "push": ["--to", "me/model"],
}


def run(*words):
    return cli.main([str(word) for word in words])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Recipes of a full run `full`, of LoRA `lora`, and both runs, two steps each."""
    folder = tmp_path_factory.mktemp("runs")
    values = tiny.recipe_values(folder, max_steps=2)
    values["data"]["samples"] = 1
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(html, "plots", lambda log: [])
        for name, section in (("full", {}), ("lora", {"peft": {"r": 4, "lora_alpha": 64}})):
            values["training"]["output_dir"] = name
            if section:
                section["peft"]["target_modules"] = "all-linear"
            path = tiny.write_recipe(folder, values | section).rename(folder / f"{name}.yaml")
            assert run("train", path) == 0
    return folder


@pytest.fixture(autouse=True)
def no_figures(monkeypatch):
    monkeypatch.setattr(html, "plots", lambda log: [])


@pytest.fixture
def here(folder, monkeypatch):
    monkeypatch.chdir(folder)
    return folder


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
    words = launch.command(options(accelerate=name))
    assert words[1:3] == ["-m", "accelerate.commands.launch"]
    parsed = launch_command_parser().parse_args(words[3:])
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
    assert parsed.training_script_args == script


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--processes", "0"], "--processes is 0"),
        (["--processes", "1", "--accelerate", "zero9"], "neither a file nor one of context_par"),
        (["--processes", "1", "training.lerning_rate=1"], "did you mean 'learning_rate'"),
    ],
)
def test_launch_checks_first(here, capsys, words, message):
    assert run("launch", "full.yaml", *words) == 2
    assert message in capsys.readouterr().err


# Stages


def adapter_weights(path):
    return load_file(path / "adapter_model.safetensors")


def test_an_adapter_is_trained_further(here, tmp_path):
    """Without a step that changes anything, what comes out is what went in."""
    overrides = ["peft=null", "model.name_or_path=lora", "training.learning_rate=0"]
    out = tmp_path / "next"
    assert run("train", "lora.yaml", *overrides, f"training.output_dir={out}") == 0
    before, after = adapter_weights(here / "lora"), adapter_weights(out)
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert any(weight.abs().max() > 0 for name, weight in after.items() if "lora_B" in name)
    # The base of the second is that of the first, and is found without it.
    assert json.loads((out / "run.json").read_text())["base"]["name_or_path"] == str(here / "model")


@pytest.mark.parametrize("first", ["full", "lora"])
def test_dpo_begins_from_a_run(here, tmp_path, first):
    pytest.importorskip("trl")
    values = tiny.alignment_values(tmp_path, "dpo", max_steps=1)
    values["model"]["name_or_path"] = first
    assert run("train", tiny.write_recipe(tmp_path, values)) == 0
    held_out = json.loads((tmp_path / "out" / "run.json").read_text())["summary"]["held_out"]
    assert held_out["rewards/margins"][0] == 0  # the reference is the model that it began from
    assert held_out["rewards/margins"][1] != 0
    assert (tmp_path / "out" / "adapter_config.json").exists() == (first == "lora")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["lora.yaml", "model.name_or_path=lora"], "is an adapter already; remove the section"),
        (["full.yaml", "model.name_or_path=./cut"], "has left no model, its state is 'running'"),
    ],
)
def test_what_no_stage_can_begin_from(here, capsys, words, message):
    (here / "cut").mkdir(exist_ok=True)
    (here / "cut" / "run.json").write_text('{"state": "running"}')
    assert run("train", *words, "training.output_dir=other") == 2
    assert message in capsys.readouterr().err


# After training


@pytest.mark.parametrize("command", AFTER)
@pytest.mark.parametrize(
    ("name", "message"),
    [("nowhere", "there is no folder"), ("model", "holds no run"), ("cut", "not finished")],
)
def test_there_must_be_a_finished_run(here, capsys, command, name, message):
    (here / "cut").mkdir(exist_ok=True)
    record = json.loads((here / "full" / "run.json").read_text()) | {"state": "interrupted"}
    (here / "cut" / "run.json").write_text(json.dumps(record))
    before = sorted(here.rglob("*"))
    assert run(command, name, *AFTER[command]) == 2
    assert message in capsys.readouterr().err
    assert sorted(here.rglob("*")) == before


def test_merge_makes_the_same_model_without_an_adapter(here, tmp_path, capsys):
    into = tmp_path / "merged"
    assert run("merge", "lora", "--into", into) == 0
    assert not (into / "adapter_config.json").exists()
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        merged = AutoModelForCausalLM.from_pretrained(into)(ids).logits
        adapted = load_model(ModelArguments("lora"))(ids).logits
        base = load_model(ModelArguments("model"))(ids).logits
    torch.testing.assert_close(merged, adapted, atol=1e-4, rtol=1e-3)
    assert (merged - base).abs().max() > 1e-2
    assert load_tokenizer(ModelArguments(str(into))).chat_template
    assert run("merge", "lora", "--into", into) == 2
    assert run("merge", "full") == 2
    assert "holds a whole model already" in capsys.readouterr().err
    assert not (here / "full-merged").exists()


@pytest.mark.parametrize("name", ["full", "lora"])
def test_evaluate_gives_what_the_run_recorded(here, capsys, name):
    capsys.readouterr()
    assert run("evaluate", name, "--json") == 0
    printed = capsys.readouterr().out
    now = json.loads(printed[printed.rindex("{\n") :])
    recorded = json.loads((here / name / "run.json").read_text())["summary"]["eval_loss_after"]
    assert now["loss"] == pytest.approx(recorded, rel=1e-5)


def test_evaluate_needs_something_held_out(here, capsys):
    assert run("evaluate", "full", "data.eval_fraction=0") == 2
    assert "the recipe holds nothing out" in capsys.readouterr().err


def test_generate_shows_both_models(here, tmp_path, capsys):
    prompts = tmp_path / "prompts.jsonl"
    chat = [{"role": "user", "content": "what is two ?"}]
    prompts.write_text("".join(json.dumps({"prompt": p}) + "\n" for p in ("what ?", chat)))
    words = ["generate", "full", "--prompts", prompts, "--new-tokens", "4"]
    assert run(*words, "--output", tmp_path / "out.jsonl") == 0
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in rows] == [[{"role": "user", "content": "what ?"}], chat]
    assert all(row["base"] != row["tuned"] for row in rows)
    capsys.readouterr()
    assert run(*words) == 0
    assert rows[0]["tuned"] in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "there is no file"),
        ("\n", "is empty"),
        ("{", "line 1 of"),
        ('{"prompt": 5}', "`prompt` is 5"),
        ("[1]", "`prompt` is missing"),
    ],
)
def test_bad_prompts_are_told_in_one_line(here, tmp_path, capsys, text, message):
    path = tmp_path / "prompts.jsonl"
    if text is not None:
        path.write_text(text)
    output = tmp_path / "out.jsonl"
    assert run("generate", "full", "--prompts", path, "--output", output) == 2
    assert message in capsys.readouterr().err.strip().splitlines()[-1]
    assert not output.exists()


def test_chat_answers_until_the_input_ends(here, capsys, monkeypatch):
    said = iter(["what is two ?", "/new", "", "the cat ?"])
    monkeypatch.setattr("builtins.input", lambda _: next(said, None) or end())

    def end():
        raise EOFError

    assert run("chat", "lora", "--new-tokens", "3") == 0


class Hub:
    """A hub that keeps what it gets."""

    def __init__(self):
        self.commits = []

    def create_repo(self, name, private, exist_ok):
        assert exist_ok

    def create_commit(self, name, operations, commit_message):
        self.commits.append((name, operations))
        return argparse.Namespace(commit_url="https://hub/commit")


def test_push_makes_one_commit_of_the_model_and_its_card(here, capsys, monkeypatch):
    import huggingface_hub

    hub = Hub()
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: hub)
    assert run("push", "lora", "--to", "me/model", "--dry-run") == 0
    assert "library_name: peft" in capsys.readouterr().out
    assert hub.commits == []
    assert run("push", "lora", "--to", "me/model") == 0
    [(name, operations)] = hub.commits
    paths = {o.path_in_repo for o in operations}
    assert name == "me/model"
    assert {"adapter_model.safetensors", "adapter_config.json", "README.md"} <= paths
    assert not {"run.json", "training_args.bin", ".lock"} & paths
    card = next(o for o in operations if o.path_in_repo == "README.md").path_or_fileobj.decode()
    front = yaml.safe_load(card.split("---")[1])
    assert front["base_model"] == str(here / "model")
    assert "| loss |" in card
    assert "liger-trainer train" in card


def test_a_hub_that_refuses_is_told_in_one_line(here, capsys, monkeypatch):
    import huggingface_hub

    hub = Hub()
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: hub)
    monkeypatch.setattr(hub, "create_repo", lambda *_, **__: (_ for _ in ()).throw(OSError("off")))
    assert run("push", "full", "--to", "me/model") == 2
    assert capsys.readouterr().err.strip().splitlines()[-1] == "error: push: off"


def test_the_report_shows_completions_before_and_after(here):
    sample = json.loads((here / "full" / "run.json").read_text())["samples"][0]
    assert sample["before"] != sample["after"]
    page = unescape((here / "full" / "report.html").read_text())
    for key in ("prompt", "expected", "before", "after"):
        assert sample[key] in page


def test_completions_are_escaped(tmp_path):
    samples = [{"prompt": "<script>", "before": "<b>", "after": "</table>", "expected": "&"}]
    text = "".join(html._samples(samples))
    assert "<script>" not in text
    assert "&lt;/table&gt;" in text


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


def test_a_run_is_opened_with_its_own_recipe(here):
    opened = open_run(Path("lora"), ["training.seed=5"])
    assert opened.is_adapter
    assert opened.recipe.values["training"]["seed"] == 5
    assert opened.tuned.name_or_path == "lora"
