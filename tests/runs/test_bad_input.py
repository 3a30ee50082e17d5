"""Bad input is told in one line, and before anything is loaded: recipes, packages, models, rows."""

import json
import sys

import pytest
import tiny

from liger_trainer import cli
from liger_trainer.runs import checks, packages
from liger_trainer.runs.load import ModelArguments, load_model
from liger_trainer.runs.recipe.recipe import load_recipe

MINIMAL = "model: {name_or_path: m}\ndata: {path: d}\n"


@pytest.fixture(scope="module")
def values(tmp_path_factory):
    return tiny.recipe_values(tmp_path_factory.mktemp("bad"))


@pytest.fixture
def recipe(values, tmp_path):
    return tiny.write_recipe(tmp_path, values)


def refused(capsys, path, *arguments):
    """The one line of an error."""
    assert cli.main(["train", str(path), *arguments]) == 2
    errors = capsys.readouterr().err.strip().splitlines()
    assert "Traceback" not in "".join(errors)
    assert errors[-1].startswith("error: ")
    return errors[-1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (MINIMAL + "method: [dpo]", r"method: ['dpo'] is not one of"),
        (MINIMAL + "method: {a: b}", "is not one of"),
        (MINIMAL + "training: []", "training: expected keys and values, found []"),
        (MINIMAL + "training: {seed: 2024-01-01}", "'2024-01-01' is not a whole number"),
        (MINIMAL + "training: {1: 2}", "unknown key 1"),
        ((MINIMAL + "# \xe9").encode("latin-1"), "is not UTF-8 text"),
        (MINIMAL.encode("utf-16"), "is not UTF-8 text"),
        (f"{MINIMAL}---\n{MINIMAL}", "expected a single document in the stream, but found"),
    ],
)
def test_a_bad_recipe_is_told_in_one_line(tmp_path, capsys, text, message):
    path = tmp_path / "bad.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    assert message in refused(capsys, path)


def test_a_folder_is_no_recipe(tmp_path, capsys):
    assert "is a folder; give a YAML file" in refused(capsys, tmp_path)


def test_a_byte_order_mark_is_no_part_of_a_recipe(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(MINIMAL, encoding="utf-8-sig")
    assert load_recipe(path).model.name_or_path == "m"


@pytest.mark.parametrize("section", ["training:", "training: {output_dir: null}", "peft:"])
def test_null_means_the_default(tmp_path, section):
    path = tmp_path / "run.yaml"
    path.write_text(MINIMAL + section)
    assert str(load_recipe(path).output_dir) == "runs/run"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.resume_from_checkpoint=x", "use --resume"),
        ("training.do_train=false", "a recipe trains"),
        ("training.do_predict=true", "there is no test set"),
        ("training.enable_jit_checkpoint=true", "SIGTERM saves a checkpoint anyway"),
        ("training.push_to_hub=true", "use `liger-trainer push`"),
        ("training.hub_token=abc", "use `liger-trainer push`"),
        (
            "training.gradient_checkpointing=true training.activation_checkpointing=true",
            "are the same option",
        ),
        ("model.dtype=float99", "torch has no dtype 'float99'"),
    ],
)
def test_what_would_not_be_obeyed_is_refused(recipe, capsys, override, message):
    assert message in refused(capsys, recipe, *override.split())


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.report_to=wandbb", "wandbb is not supported"),
        ("training.lr_scheduler_kwargs={nope: 1}", "unexpected keyword argument 'nope'"),
        ("training.log_level=loud", "log_level: 'loud' is no level"),
    ],
)
def test_what_the_trainer_would_find_later_is_found_first(recipe, capsys, override, message):
    assert message in refused(capsys, recipe, override)
    assert cli.main(["train", str(recipe), "--dry-run", override]) == 1
    assert message in capsys.readouterr().out


def test_an_unknown_metric_is_told_before_the_first_step(recipe, capsys, tmp_path):
    message = refused(capsys, recipe, "training.metric_for_best_model=nope")
    assert "no metric 'nope' among loss, " in message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["gradient_checkpointing", "activation_checkpointing"])
def test_both_names_of_checkpointing_are_understood(recipe, name):
    args = load_recipe(recipe, [f"training.{name}=true"]).training_arguments()
    assert args.gradient_checkpointing


@pytest.mark.parametrize(
    ("override", "package"),
    [
        ("training.report_to=[wandb]", "wandb"),
        ("training.report_to=trackio", "trackio"),
        ("training.report_to=mlflow", "mlflow"),
        ("training.report_to=tensorboard", "tensorboard"),
        ("training.optim=paged_adamw_8bit", "bitsandbytes"),
        ("model.quantization={load_in_4bit: true}", "bitsandbytes"),
        ("model.attn_implementation=flash_attention_2", "flash-attn"),
        ("training.deepspeed=zero.json", "deepspeed"),
    ],
)
def test_a_missing_package_is_told_with_its_command(recipe, capsys, monkeypatch, override, package):
    monkeypatch.setattr(packages, "installed", lambda *names: False)
    error = refused(capsys, recipe, override)
    assert f"`pip install {package}`" in error
    assert override.split("=")[0] in error
    assert cli.main(["train", str(recipe), "--dry-run", override]) == 1
    assert f"`pip install {package}`" in capsys.readouterr().out


def test_a_folder_of_the_name_is_no_package(tmp_path, monkeypatch):
    (tmp_path / "wandb").mkdir()  # where wandb keeps its logs
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert not packages.installed("wandb-that-is-not-there")
    assert packages.installed("no-such-thing", "torch")


def test_without_peft_the_error_says_what_to_install(recipe, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    assert "pip install peft" in refused(capsys, recipe, "peft.r=4")


@pytest.mark.parametrize(
    "override",
    [
        "training.per_device_train_batch_size=0",
        "training.per_device_eval_batch_size=-1",
        "training.gradient_accumulation_steps=0",
        "training.max_steps=0",
        "training.num_train_epochs=0",
        "training.logging_steps=0",
        "training.save_steps=0",
        "training.learning_rate=-1",
        "training.dataloader_num_workers=-1",
        "data.num_proc=0",
        "training.learning_rate=.nan",
        "training.learning_rate=1e999",
        "training.num_train_epochs=.inf",
    ],
)
def test_numbers_that_cannot_be_meant(recipe, capsys, override):
    assert override.split("=")[0].partition(".")[2] in refused(capsys, recipe, override)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.name_or_path=model/config.json"], "model/config.json is a file; give its folder"),
        (["model.name_or_path=empty"], "empty holds no model: it has no config.json"),
        (["model.gguf_file=nope.gguf"], "model.gguf_file: no file"),
        (["model.package=json"], "is not inside the package 'json'"),
        (["model.tokenizer=no/such"], "model: no/such cannot be loaded"),
        (["model.config.num_hidden_layers=many"], "num_hidden_layers: 'many' is not of its type"),
        (["data.path=rows.txt"], "rows.txt is none of .json, .jsonl, .csv, .parquet files"),
        (["data.path=latin.jsonl"], "latin.jsonl cannot be read as json: "),
        (["data.path=blank.jsonl"], "blank.jsonl cannot be read as json: it has no examples"),
        (["data.path=empty"], "data: empty cannot be loaded: "),
        (["data.name=part"], "data.name is a configuration of a dataset on the hub"),
        (["data.path=null", "data.loader=humaneval_pairs", "data.split=test"], "no split 'test'"),
        (["training.output_dir=rows.txt/out"], "rows.txt/out cannot be written to: Not a dir"),
        (["peft.target_modules=all-linear", "peft.modules_to_save=[nope]"], "no module 'nope'"),
    ],
)
def test_a_place_or_name_where_nothing_fits_is_told(
    recipe, tmp_path, monkeypatch, capsys, overrides, message
):
    monkeypatch.chdir(tmp_path)
    tiny.config().save_pretrained(tmp_path / "model")
    (tmp_path / "empty").mkdir()
    (tmp_path / "rows.txt").write_text("some text")
    (tmp_path / "blank.jsonl").write_text("\n\n")
    (tmp_path / "latin.jsonl").write_bytes('{"text": "caf\xe9"}\n'.encode("latin-1") * 9)
    assert message in refused(capsys, recipe, *overrides)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("package", ["evil.sub", "evil"])
def test_a_package_is_found_without_running_it(tmp_path, monkeypatch, capsys, values, package):
    (tmp_path / "evil" / "sub").mkdir(parents=True)
    (tmp_path / "evil" / "__init__.py").write_text("raise SystemExit('was run')")
    monkeypatch.syspath_prepend(str(tmp_path))
    path = tiny.write_recipe(tmp_path, values | {"model": {"package": package}})
    assert cli.main(["train", str(path), "--dry-run"]) == 1
    assert "evil" not in sys.modules


def test_remote_code_is_neither_run_nor_asked_about(tmp_path, monkeypatch, capsys):
    config = tiny.config().to_dict() | {
        "model_type": "unknown",
        "auto_map": {"AutoConfig": "evil.Config"},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "evil.py").write_text("raise SystemExit('was run')")
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    assert cli.main(["inspect", str(tmp_path)]) == 2
    assert "trust_remote_code" in capsys.readouterr().err


@pytest.mark.parametrize("content", [b"", b"1234", b"x" * 100, None])
def test_weights_that_are_cut_off_are_told(tmp_path, values, content):
    folder = tiny.saved_model(tmp_path)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100] if content is None else content)
    with pytest.raises(ValueError, match=r"cannot be loaded: .*header"):
        load_model(ModelArguments(str(folder)))


def test_weights_of_another_size_are_told(tmp_path):
    folder = tiny.saved_model(tmp_path)
    tiny.config(hidden_size=32).save_pretrained(folder)
    with pytest.raises(ValueError, match="cannot be loaded"):
        load_model(ModelArguments(str(folder)))


@pytest.mark.parametrize(
    ("overrides", "conflict"),
    [
        (["data.path=nope.jsonl"], "no file 'nope.jsonl'"),
        (["data.columns={messages: nope}"], "no column 'nope'"),
        (["data.columns={other: messages}"], "training needs `messages`"),
        (["data.max_length=2"], "nothing is left"),
        (["peft.target_modules=[nope]"], "peft: Target modules {'nope'} not found"),
        (["training.per_device_train_batch_size=0"], "it must be at least 1"),
        (["training.lr_scheduler_type=spiral"], "training: "),
        (["model.name_or_path=./nope"], "there is no folder './nope'"),
    ],
)
def test_a_dry_run_finds_it(recipe, capsys, overrides, conflict):
    assert cli.main(["train", str(recipe), "--dry-run", *overrides]) == 1
    assert conflict in capsys.readouterr().out.partition("# Conflicts")[2]


def test_a_dry_run_looks_at_generations(tmp_path):
    pytest.importorskip("trl")
    recipe = tiny.write_recipe(tmp_path, tiny.alignment_values(tmp_path, "grpo"))
    loaded = load_recipe(recipe, ["training.num_generations_eval=3"])
    with pytest.raises(ValueError, match="not a multiple of the 3"):
        checks.check_training(loaded)


def test_a_reward_beside_the_recipe_is_found(tmp_path):
    pytest.importorskip("trl")
    values = tiny.alignment_values(tmp_path, "grpo")
    (tmp_path / "reward_of_this_test.py").write_text("def length(completions, **_): return [1.0]")
    values["reward"] = {"functions": ["reward_of_this_test:length"]}
    recipe = tiny.write_recipe(tmp_path, values)
    assert checks.conflicts(load_recipe(recipe)) == []
    absent = load_recipe(recipe, ["reward.functions=[no_such_module:length]"])
    assert "'no_such_module:length' cannot be imported" in checks.conflicts(absent)[0]
