"""Bad input is told in one line, and before anything is loaded: recipes, packages, models, rows."""

import json
import sys

import pytest
import tiny

from liger_trainer import cli
from liger_trainer.runs import checks, packages
from liger_trainer.runs.data.arguments import DataArguments
from liger_trainer.runs.data.prepare import prepare
from liger_trainer.runs.load import ModelArguments, load_model
from liger_trainer.runs.parse import parse
from liger_trainer.runs.recipe import load_recipe
from liger_trainer.runs.secrets import hidden, hidden_override, is_secret

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


# YAML


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2024-01-01", "2024-01-01"),
        ("2024-01-01 10:00:00", "2024-01-01 10:00:00"),
        ("2e-5", 2e-5),
        ("{a: &x [1], b: *x}", {"a": [1], "b": [1]}),
        ("x: &a {b: 1}\ny:\n  <<: *a\n  c: 2", {"x": {"b": 1}, "y": {"b": 1, "c": 2}}),
    ],
)
def test_what_yaml_is_read_as(text, value):
    assert parse(text) == value


def test_aliases_are_copies():
    value = parse("{a: &x {k: 1}, b: *x}")
    value["a"]["k"] = 2
    assert value["b"]["k"] == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 5000, "nested too deeply"),
        ("&a [*a]", "part of"),
        ("a: 1\na: 2", "the key 'a' appears twice in line 2"),
        ("a: !!set {x}", "a: a set is neither text"),
        ("a: !!binary aGk=", "a: a bytes is neither text"),
        ("a: {b: .nan}", "a.b: not a number"),
        ("? [a]\n: 1", "unhashable"),
        ("~: 1", "None is no name"),
        ("a: !!python/name:os.system", "could not determine a constructor"),
        ("a: !!int x", "invalid literal"),
        ("a: [", "but found '<stream end>' in line 1"),
        ("\x00", "unacceptable character"),
    ],
)
def test_what_is_no_plain_value_is_told_in_one_line(text, message):
    with pytest.raises(ValueError, match=r"^[^\n]*$") as error:
        parse(text)
    assert message in str(error.value)


def test_a_bomb_of_aliases_is_not_expanded():
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 12)]
    with pytest.raises(ValueError, match="once aliases are expanded"):
        parse("\n".join(lines))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (MINIMAL + "method: [dpo]", r"method: ['dpo'] is not one of"),
        (MINIMAL + "method: {a: b}", "is not one of"),
        (MINIMAL + "training: []", "training: expected keys and values, found []"),
        (MINIMAL + "training: {seed: 2024-01-01}", "'2024-01-01' is a str, expected int"),
        (MINIMAL + "training: {1: 2}", "unknown key 1"),
        ("\xff\xfe".encode("latin-1"), "not valid YAML"),
    ],
)
def test_a_bad_recipe_is_told_in_one_line(tmp_path, capsys, text, message):
    path = tmp_path / "bad.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    assert message in refused(capsys, path)


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
        ("training.push_to_hub=true", "use `liger-trainer push`"),
        ("training.hub_token=abc", "use `liger-trainer push`"),
        ("training.gradient_checkpointing=true training.activation_checkpointing=true", "one opt"),
        ("model.dtype=float99", "torch has no dtype 'float99'"),
    ],
)
def test_what_would_not_be_obeyed_is_refused(recipe, capsys, override, message):
    assert message in refused(capsys, recipe, *override.split())


@pytest.mark.parametrize("name", ["gradient_checkpointing", "activation_checkpointing"])
def test_both_names_of_checkpointing_are_understood(recipe, name):
    args = load_recipe(recipe, [f"training.{name}=true"]).training_arguments()
    assert args.gradient_checkpointing


# Secrets


@pytest.mark.parametrize(
    ("name", "secret"),
    [
        ("model.token", True),
        ("training.hub_token", True),
        ("push_to_hub_token", True),
        ("wandb_api_key", True),
        ("smtp_password", True),
        ("training.pad_token", False),
        ("training.eos_token", False),
        ("model.tokenizer", False),
        ("training.include_num_input_tokens_seen", False),
    ],
)
def test_names_of_secrets(name, secret):
    assert is_secret(name) == secret


def test_what_is_hidden():
    assert hidden({"token": "a", "b": [{"api_key": "c"}], "url": "http://u:p@h/x"}) == {
        "token": "***",
        "b": [{"api_key": "***"}],
        "url": "http://***@h/x",
    }
    assert hidden({"token": True}) == {"token": True}  # "use the one that is stored"
    assert hidden_override("model={token: a}") == "model=***"


# Packages


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


# Numbers


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
    ],
)
def test_numbers_that_cannot_be_meant(recipe, capsys, override):
    assert override.split("=")[0].partition(".")[2] in refused(capsys, recipe, override)


# Models


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


# Rows

GOOD = [{"role": "user", "content": "what is two ?"}, {"role": "assistant", "content": "four ."}]
BAD_ROWS = [
    ({"text": "the cat sat"}, {"text": 5}, "`text` is 5, which is not text"),
    ({"text": "the cat sat"}, {"text": None}, "`text` is missing"),
    ({"text": "the cat sat"}, {"text": " "}, "`text` is empty"),
    ({"messages": GOOD}, {"messages": None}, "`messages` is missing"),
    ({"messages": GOOD}, {"messages": []}, "`messages` is empty"),
    ({"messages": GOOD}, {"messages": "what ?"}, "`messages` is text"),
    ({"messages": GOOD}, {"messages": [{"content": "a"}]}, "message 1 of `messages` has no role"),
    (
        {"messages": GOOD},
        {"messages": [{"role": "user"}]},
        "message 1 of `messages` has no content",
    ),
    ({"messages": GOOD}, {"messages": ["a"]}, "message 1 of `messages` is 'a'"),
    ({"messages": GOOD}, {"messages": GOOD[:1]}, "there is nothing to train on"),
    (
        {"prompt": "what ?", "completion": "four"},
        {"prompt": "what ?", "completion": None},
        "`completion` is missing",
    ),
    (
        {"prompt": "what ?", "completion": "four"},
        {"prompt": "what ?", "completion": ""},
        "`completion` is empty",
    ),
]


@pytest.mark.parametrize(("good", "bad", "reason"), BAD_ROWS)
def test_a_row_that_cannot_be_used_is_named(tmp_path, good, bad, reason):
    path = str(tiny.json_lines(tmp_path / "rows.jsonl", [good, good, bad, good]))
    with pytest.raises(ValueError, match=r"1 of 4 training examples, the first in row 3") as error:
        prepare(DataArguments(path=path, max_length=64), tiny.tokenizer(), seed=0)
    assert f"because {reason}" in str(error.value)
    dropping = DataArguments(path=path, max_length=64, invalid="drop")
    prepared = prepare(dropping, tiny.tokenizer(), seed=0)
    assert len(prepared.train) == 3
    assert prepared.train.column_names == ["input_ids", "labels"]
    assert f"because {reason}" in prepared.notes[0]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"chosen": None}, "`chosen` is missing"),
        ({"chosen": [{"content": "a"}]}, "message 1 of `chosen` has no role"),
        ({"prompt": 5}, "`prompt` is 5, which is neither text nor"),
        ({"rejected": "text"}, "`rejected` is text, in other rows messages"),
    ],
)
def test_a_pair_that_cannot_be_used_is_named(tmp_path, change, reason):
    path = tiny.pairs_file(tmp_path / "pairs.jsonl", 6)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    tiny.json_lines(path, [*rows[:4], rows[4] | change, rows[5]])
    options = {"seed": 0, "examples": "pairs"}
    with pytest.raises(ValueError, match=r"1 of 6 training examples, the first in row 5") as error:
        prepare(DataArguments(path=str(path), max_length=64), tiny.tokenizer(), **options)
    assert f"because {reason}" in str(error.value)
    dropping = DataArguments(path=str(path), max_length=64, invalid="drop")
    assert len(prepare(dropping, tiny.tokenizer(), **options).train) == 5


def test_what_a_template_refuses_is_a_row_that_cannot_be_used(tmp_path):
    refusal = "{% if m['role'] == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
    template = "{% for m in messages %}" + refusal + "{{ m['content'] }}<|im_end|>{% endfor %}"
    rows = [{"messages": GOOD}, {"messages": [{"role": "tool", "content": "x"}, *GOOD]}]
    path = str(tiny.json_lines(tmp_path / "rows.jsonl", rows))
    with pytest.raises(ValueError, match=r"row 2 because the chat template refuses it: no tools"):
        prepare(DataArguments(path=path), tiny.tokenizer(template), seed=0)


# Dry run


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
    assert "not a multiple of the 3" in checks.training_problems(loaded)[0]
