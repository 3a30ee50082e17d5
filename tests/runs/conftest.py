"""Fixtures: finished runs, and sandboxes."""

import shutil

import pytest
import run_folders
import tiny
from repeated import looked_up_once, never_hashed, proven_once

from liger_trainer import cli
from liger_trainer.runs.report import html
from liger_trainer.runs.rewards.sandbox import find_sandbox

__all__ = ["looked_up_once", "never_hashed", "proven_once"]


@pytest.fixture(scope="session")
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
            assert cli.main(["train", str(path)]) == 0
    return folder


@pytest.fixture
def no_figures(monkeypatch):
    """They would take as long as the runs."""
    monkeypatch.setattr(html, "plots", lambda log: [])


@pytest.fixture
def here(folder, monkeypatch, no_figures):
    """The folder of the runs, as the working folder. A test leaves what is there as it is."""
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture(scope="session")
def original(tmp_path_factory):
    """A folder with a recipe, and in `out` its run of six steps with a checkpoint every two."""
    folder = tmp_path_factory.mktemp("original")
    values = tiny.recipe_values(folder, save_strategy="steps", save_steps=2)
    values["training"]["lr_scheduler_type"] = "constant"
    values["training"]["output_dir"] = "out"
    values["model"]["token"] = run_folders.SECRET
    path = tiny.write_recipe(folder, values)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(html, "plots", lambda log: [])
        assert run_folders.train(path) == 0
    return folder


@pytest.fixture
def finished(original, tmp_path, monkeypatch, no_figures):
    """A copy of the run, moved to another folder, as the working folder."""
    shutil.copytree(original / "out", tmp_path / "out")
    shutil.copy(original / "recipe.yaml", tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "out"


@pytest.fixture(params=["bubblewrap", "namespaces"])
def safe(request):
    """The name of a sandbox; skipped, with the reason, where this machine has none of the kind."""
    try:
        return find_sandbox(request.param)
    except ValueError as error:
        pytest.skip(str(error))
