"""`push`, the model card that it writes, and what that says of a run's origin."""

import argparse
import dataclasses
import functools

import tiny
import torch
import yaml
from run_folders import run

from liger_trainer.runs.card import model_card
from liger_trainer.runs.finished import open_run
from liger_trainer.runs.origin import origin
from liger_trainer.runs.recipe.recipe import recipe_of


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
    assert front == {
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["liger-trainer", "sft", "lora"],
    }  # the base is a folder, which the hub would refuse as base_model
    assert str(here / "model") in card
    assert "| loss |" in card
    assert "liger-trainer train" in card
    assert f"torch {torch.__version__}" in card


def snippet(card):
    return card.partition("```python\n")[2].partition("```")[0]


def test_the_card_s_code_runs(here, capsys):
    code = snippet(model_card(open_run("full"), "me/model"))
    exec(code.replace("me/model", "full"), {})
    assert capsys.readouterr().out


def test_the_card_of_an_adapter_names_the_base_and_loads_it(here):
    found = open_run("lora")
    made_from = {"base_model": "Qwen/Qwen3-8B", "datasets": ["trl-lib/Capybara"]}
    found = dataclasses.replace(found, record=found.record | {"origin": made_from})
    card = model_card(found, "me/model", "apache-2.0")
    front = yaml.safe_load(card.split("---")[1])
    assert front == front | made_from | {"license": "apache-2.0"}
    names = {}
    exec(snippet(card).replace("Qwen/Qwen3-8B", "model").replace("me/model", "lora"), names)
    assert type(names["model"]).__name__ == "PeftModelForCausalLM"


def test_the_origin_of_a_run_is_what_a_hub_has(here, tmp_path):
    """A run that began from another run has that one's base."""
    (tmp_path / "run.json").write_text('{"origin": {"base_model": "me/base"}}')
    tiny.config().save_pretrained(tmp_path)
    mix = [{"path": "me/rows"}, {"path": "chat.jsonl"}, {"loader": "humaneval"}]
    for place, base in (("me/base", "me/base"), (str(tmp_path), "me/base"), ("model", None)):
        values = {"model": {"name_or_path": place}, "data": {"mix": mix}}
        found = origin(recipe_of(values, here / "mine.yaml"))
        assert found == {"base_model": base, "datasets": ["me/rows"]}


def test_push_checks_the_name_of_the_repository(here, capsys):
    assert run("push", "full", "--to", "two words", "--dry-run") == 2
    assert "error: --to: " in capsys.readouterr().err


def test_a_hub_that_refuses_is_told_in_one_line(here, capsys, monkeypatch):
    import huggingface_hub

    hub = Hub()
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: hub)
    monkeypatch.setattr(hub, "create_repo", lambda *_, **__: (_ for _ in ()).throw(OSError("off")))
    assert run("push", "full", "--to", "me/model") == 2
    assert capsys.readouterr().err.strip().splitlines()[-1] == "error: push: off"


def test_a_hub_that_cannot_be_reached_is_told_in_one_line(here, capsys, monkeypatch):
    import huggingface_hub

    nowhere = functools.partial(huggingface_hub.HfApi, endpoint="http://127.0.0.1:9", token="none")
    monkeypatch.setattr(huggingface_hub, "HfApi", nowhere)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    assert run("push", "full", "--to", "me/model") == 2
    assert "error: push: the hub cannot be reached: " in capsys.readouterr().err
