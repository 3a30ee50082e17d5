"""Fixtures: finished runs for the commands that come after training."""

import pytest
import tiny

from liger_trainer import cli
from liger_trainer.runs import html


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
    monkeypatch.setattr(html, "plots", lambda log: [])


@pytest.fixture
def here(folder, monkeypatch, no_figures):
    """The folder of the runs, as the working folder. A test leaves what is there as it is."""
    monkeypatch.chdir(folder)
    return folder
