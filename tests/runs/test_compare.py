"""Which values make another run, which another model, and which neither."""

import json

import pytest
import yaml

from liger_trainer.runs.recipe.compare import differences, weight_differences
from liger_trainer.runs.recipe.recipe import load_recipe, recipe_of

VALUES = {
    "method": "sft",
    "model": {"name_or_path": "base", "config": {"rope_theta": 5.0}, "token": "hf_secret"},
    "data": {"path": "d.jsonl"},
    "training": {"max_steps": 4},
    "peft": {"r": 4},
}


@pytest.fixture
def compare(tmp_path, monkeypatch):
    """Return a function that compares a recipe with the same one under overrides."""
    pytest.importorskip("peft")
    (tmp_path / "base").mkdir()
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(VALUES))
    before = json.loads(json.dumps(load_recipe(path).shown))

    def compare(function, *overrides, **options):
        return function(before, load_recipe(path, overrides), **options)

    return compare


@pytest.mark.parametrize(
    ("override", "name"),
    [
        ("method=dpo", "method"),
        ("model.name_or_path=other", "model.name_or_path"),
        ("model.config.rope_theta=6.0", "model.config"),
        ("model.revision=v2", "model.revision"),
        ("peft.r=8", "peft.r"),
        ("peft.lora_alpha=4", "peft.lora_alpha"),
        ("peft=null", "peft"),
    ],
)
def test_another_model_is_another_run(compare, override, name):
    if name == "method":
        pytest.importorskip("trl")
    for function in (differences, weight_differences):
        [found] = compare(function, override)
        assert found.startswith(f"{name}: ")


@pytest.mark.parametrize(
    "override", ["model.dtype=bfloat16", "data.max_length=64", "training.seed=1"]
)
def test_the_same_model_can_come_of_another_run(compare, override):
    assert compare(weight_differences, override) == []
    [found] = compare(differences, override)
    assert found.startswith(override.partition("=")[0])


@pytest.mark.parametrize(
    "override",
    [
        "model.name_or_path=./base/../base",  # the same folder
        "peft.lora_alpha=8",  # the default
        "model.revision=null",
        "model.token=hf_another",
        "data.path=elsewhere.jsonl",  # its contents are compared
        "training.output_dir=moved",
    ],
)
def test_other_words_for_the_same(compare, override):
    assert compare(differences, override) == compare(weight_differences, override) == []


def test_a_resumed_run_may_become_longer(compare):
    assert compare(differences, "training.max_steps=8") == ["training.max_steps: 4 -> 8"]
    assert compare(differences, "training.max_steps=8", resuming=True) == []


def test_an_override_changes_a_copy(tmp_path):
    """A recipe is read again from the values of `run.json`, and then compared with them."""
    pytest.importorskip("peft")
    values = json.loads(json.dumps(VALUES))
    recipe = recipe_of(values, tmp_path / "run.yaml", ["peft.r=8", "model.config.rope_theta=6.0"])
    assert values == VALUES
    assert weight_differences(values, recipe) == [
        "model.config: {'rope_theta': 5.0} -> {'rope_theta': 6.0}",
        "peft.r: 4 -> 8",
    ]
