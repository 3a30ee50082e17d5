"""Recipes: precedence, unknown keys, types, and every shipped recipe against what is installed."""

from pathlib import Path

import pytest
import torch
import yaml

from liger_trainer.runs.recipe import recipe as recipe_module
from liger_trainer.runs.recipe.recipe import load_recipe

FOLDER = Path(__file__).parents[2] / "recipes"
RECIPES = sorted(p for p in FOLDER.rglob("*.yaml") if p.parent.name != "accelerate")
MINIMAL = {"model": {"name_or_path": "m"}, "data": {"path": "d"}}


def write(tmp_path, values, name="run.yaml"):
    path = tmp_path / name
    path.write_text(values if isinstance(values, str) else yaml.safe_dump(values))
    return path


@pytest.fixture
def minimal(tmp_path):
    return write(tmp_path, MINIMAL)


def test_recipes_are_shipped():
    assert len(RECIPES) >= 20


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: f"{p.parent.name}-{p.stem}")
def test_every_shipped_recipe_fits_the_installed_dataclasses(path, monkeypatch):
    monkeypatch.setattr(recipe_module, "native_bf16", lambda: False)
    recipe = load_recipe(path, ["training.bf16=auto"])  # the others ask for a GPU
    args = recipe.training_arguments()
    assert recipe.method == path.parent.name
    assert args.use_liger_kernel
    stem = path.stem if recipe.method == "sft" else f"{recipe.method}-{path.stem}"
    assert args.output_dir == f"runs/{stem}"
    assert recipe.data.eval_fraction or recipe.data.eval_split
    assert (recipe.peft_config() is not None) == path.stem.endswith("-lora")


def test_the_command_line_wins_over_yaml_and_yaml_over_defaults(tmp_path):
    path = write(tmp_path, MINIMAL | {"training": {"learning_rate": 1e-3, "weight_decay": 0.1}})
    recipe = load_recipe(path, ["training.learning_rate=2e-5"])
    args = recipe.training_arguments()
    assert (args.learning_rate, args.weight_decay, args.adam_beta1) == (2e-5, 0.1, 0.9)
    assert recipe.sources["training.learning_rate"] == "command line; the recipe has 0.001"
    assert recipe.sources["training.weight_decay"] == "recipe"


def test_null_on_the_command_line_restores_the_default(tmp_path):
    path = write(tmp_path, MINIMAL | {"training": {"weight_decay": 0.1}})
    assert load_recipe(path, ["training.weight_decay=null"]).training_arguments().weight_decay == 0


@pytest.mark.parametrize("text", ["2e-5", "2E-5", "2.0e-5", "0.00002", ".2e-4"])
def test_numbers_in_scientific_notation_are_numbers(tmp_path, text):
    path = write(tmp_path, yaml.safe_dump(MINIMAL) + f"training: {{learning_rate: {text}}}")
    assert load_recipe(path).training_arguments().learning_rate == 2e-5
    assert load_recipe(path, [f"training.learning_rate={text}"]).values == load_recipe(path).values


def test_integers_become_floats_where_floats_are_meant(minimal):
    epochs = load_recipe(minimal, ["training.num_train_epochs=2"]).values["training"]
    assert isinstance(epochs["num_train_epochs"], float)


def test_nested_keys_can_be_set(minimal):
    recipe = load_recipe(minimal, ["training.liger_kernel_config.rope=false", "peft.r=4"])
    assert recipe.training_arguments().liger_kernel_config == {"rope": False}
    assert recipe.peft_config().r == 4


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "training.lerning_rate=1",
            "training: unknown key 'lerning_rate'; did you mean 'learning_rate'",
        ),
        ("data.max_lenght=1", "data: unknown key 'max_lenght'; did you mean 'max_length'"),
        ("model.dtipe=x", "model: unknown key 'dtipe'; did you mean 'dtype'"),
        ("peft.lora_alfa=1", "peft: unknown key 'lora_alfa'; did you mean 'lora_alpha'"),
        ("trainning.seed=1", "recipe: unknown key 'trainning'; did you mean 'training'"),
        ("training.liger_kernel_config.ropes=true", "'ropes'; did you mean 'rope'"),
        ("training.learning_rate=fast", "training.learning_rate: 'fast' is not a number"),
        ("training.max_steps=1.5", "training.max_steps: 1.5 is not a whole number"),
        ("training.use_liger_kernel=1", "1 is not true or false"),
        ("training.use_liger_kernel=yes", "'yes' is not true or false"),
        ("training.bf16=maybe", "'maybe' is not true or false or auto"),
        ("data.columns=[a]", r"data.columns: \['a'\] is not a mapping"),
        ("data.path=3", "data.path: 3 is not text or a list"),
        ("learning_rate=1", "unknown key 'learning_rate'; did you mean training.learning_rate"),
        ("training.max_length=1", "unknown key 'max_length'; did you mean data.max_length"),
        ("peft.lora_dropout=-0.1", "peft.lora_dropout is -0.1; it must be at least 0 and below 1"),
        ("peft.lora_dropout=1.5", "peft.lora_dropout is 1.5; it must be at least 0 and below 1"),
        ("training.lora_alpha=1", "unknown key 'lora_alpha'; did you mean peft.lora_alpha"),
        ("data.path=$NOT_SET/x.jsonl", "data.path: the environment variable NOT_SET is not set"),
        ("training.seed", "not of the form"),
        ("training.seed.x=1", "is not a whole number"),
        (
            "method=spo",
            "method: 'spo' is not one of sft, dpo, orpo, cpo, simpo, kto, reward, grpo,",
        ),
        ("model.name_or_path=null", "model.name_or_path is missing"),
        ("data.packing=[", "not valid YAML"),
    ],
)
def test_wrong_keys_and_values_are_named(minimal, override, message):
    with pytest.raises(ValueError, match="(?s)" + message):
        load_recipe(minimal, [override])


def test_a_section_given_as_a_whole_comes_from_the_command_line(minimal):
    recipe = load_recipe(minimal, ["peft={r: 4, target_modules: all-linear}"])
    assert recipe.sources["peft.r"] == recipe.sources["peft.target_modules"] == "command line"


def test_bf16_without_a_gpu_names_what_to_write(minimal, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    with pytest.raises(ValueError, match="no GPU here; `bf16: auto`"):
        load_recipe(minimal, ["training.bf16=true"]).training_arguments()


def test_paths_hold_environment_variables(minimal, monkeypatch):
    monkeypatch.setenv("DATA", "/data")
    monkeypatch.setenv("NAME", "run")
    overrides = ["data.path=[$DATA/a.jsonl, '${DATA}/b.jsonl']", "training.output_dir=out/$NAME"]
    overrides += ["model.name_or_path=$DATA/model"]
    recipe = load_recipe(minimal, overrides)
    assert recipe.data.path == ["/data/a.jsonl", "/data/b.jsonl"]
    assert str(recipe.output_dir) == "out/run"
    assert recipe.model.name_or_path == "/data/model"
    assert load_recipe(minimal, ["training.run_name=$5"]).values["training"]["run_name"] == "$5"


def test_values_that_transformers_refuses_name_the_section(minimal):
    recipe = load_recipe(minimal, ["training.lr_scheduler_type=spiral"])
    with pytest.raises(ValueError, match=r"training: .*spiral"):
        recipe.training_arguments()


def test_a_missing_recipe_lists_near_names(minimal):
    with pytest.raises(FileNotFoundError, match=r"no recipe .*runn\.yaml.*there is run\.yaml"):
        load_recipe(minimal.with_name("runn.yaml"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: [", "not valid YAML"),
        ("model: {name_or_path: a, name_or_path: b}", "'name_or_path' appears twice"),
        ("- model", "a recipe is a mapping"),
        ("model: name", "model: expected keys and values, found 'name'"),
    ],
)
def test_a_broken_recipe_says_where(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        load_recipe(write(tmp_path, text))


@pytest.mark.parametrize("native", [False, True])
def test_bf16_auto_follows_the_machine(minimal, monkeypatch, native):
    monkeypatch.setattr(recipe_module, "native_bf16", lambda: native)
    given = {}
    monkeypatch.setattr(
        recipe_module, "arguments_class", lambda method: lambda **fields: given.update(fields)
    )
    monkeypatch.setattr(recipe_module, "check_sections", lambda values, *_: values)
    monkeypatch.setattr(recipe_module, "check_options", lambda args: None)
    load_recipe(minimal, ["training.bf16=auto"]).training_arguments()
    assert given["bf16"] is native
