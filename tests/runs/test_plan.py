"""`liger-trainer plan`: its output, exit codes, and what it refuses."""

import dataclasses

import pytest
import tiny

from liger_trainer import cli
from liger_trainer.runs import shipped
from liger_trainer.runs.planning.estimate import fits, run_of, ways_out
from liger_trainer.runs.planning.memory import GIB, usable
from liger_trainer.runs.planning.shapes import config_of
from liger_trainer.runs.recipe.recipe import load_recipe

FULL = ["plan", "sft/llama-3.1-8b-full", "--shape", "llama-8b", "--memory", "80"]


NAMES = [name for name in shipped.recipe_names() if name.startswith(("sft/", "dpo/"))]


@pytest.mark.parametrize("name", NAMES)
def test_the_shape_of_a_recipe_has_its_name(capsys, name):
    shape = name.partition("/")[2].removesuffix("-full").removesuffix("-lora")
    words = ["plan", name, "--memory", "1000", "model.config=null"]
    assert cli.main([*words, "--shape", shape]) == 0
    assert "fits: " in capsys.readouterr().out
    assert config_of(f"someone/{shape.title()}-Instruct") == config_of(shape)


def test_a_shape_may_have_a_longer_name(capsys):
    words = ["plan", "sft/smollm2-135m", "--memory", "80", "--shape"]
    printed = []
    for name in ("smollm2-135m", "someone/SmolLM2-135M-Instruct"):
        assert cli.main([*words, name]) == 0
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1]


def test_a_run_that_fits(capsys):
    assert cli.main([*FULL, "--gpus", "8", "--bandwidth", "100"]) == 0
    printed = capsys.readouterr().out
    for part in ("optimizer", "gathered weights", "all-gather", "s at 100 GB/s", "TFLOP/s"):
        assert part in printed
    assert printed.splitlines()[-1].startswith("fits: ")


@pytest.mark.parametrize("method", ["sft", "dpo"])
@pytest.mark.parametrize(("memory", "kept"), [("24", "checkpointed"), ("48", "lean")])
def test_a_budget_checkpoints_what_does_not_fit(capsys, method, memory, kept):
    words = ["plan", f"{method}/qwen3-8b-lora", "--shape", "qwen3-8b", "--memory", memory]
    assert cli.main(words) == 0
    assert f"activations {kept}" in capsys.readouterr().out


def test_a_run_that_does_not_fit_names_what_would(capsys):
    words = [*FULL, "--gpus", "2", "training.gradient_checkpointing=false"]
    assert cli.main(words) == 1
    verdict = capsys.readouterr().out.splitlines()[-1]
    assert verdict.startswith("does not fit: ")
    assert "training.gradient_checkpointing=true" in verdict
    run = run_of(load_recipe(FULL[1], words[-1:]), gpus=2, memory=80, engine="fsdp2", shape=FULL[3])
    [more] = [int(way.split()[0]) for way in ways_out(run) if way.endswith(" GPUs")]
    assert f"{more} GPUs" in verdict
    assert fits(dataclasses.replace(run, gpus=more))
    assert not fits(dataclasses.replace(run, gpus=more - 1))


def test_a_run_for_which_no_gpu_is_large_enough(capsys):
    assert cli.main([*FULL[:-1], "2"]) == 1
    assert "what would: nothing on GPUs of 2 GiB" in capsys.readouterr().out
    assert usable(2) < 2 * GIB


def test_the_configuration_of_a_folder_is_enough(tmp_path, capsys):
    values = tiny.recipe_values(tmp_path, use_liger_kernel=True)
    (tmp_path / "model" / "model.safetensors").unlink()
    path = tiny.write_recipe(tmp_path, values)
    assert cli.main(["plan", str(path), "--memory", "4"]) == 0
    count = tiny.model().num_parameters()
    assert f"{count:,} parameters, {count:,} trained" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--gpus", "0"], "--gpus is 0"),
        (["--bandwidth", "nan"], "--bandwidth is nan"),
        (["training.use_liger_kernel=false"], "training.use_liger_kernel=true"),
        (["training.liger_kernel_config={rope: false}"], "off: rope"),
        (["training.optim=adafactor"], "adafactor is not covered"),
        (["training.per_device_train_batch_size=0"], "must be at least 1"),
        (["model.quantization={load_in_4bit: true}"], "quantization is not covered"),
        (["training.deepspeed=zero.json"], "use --engine"),
        (["--shape", "llama-9b"], "'llama-9b' is none of smollm2-135m, gemma-3-1b, llama-3.2-1b"),
        (["--shape", "llama"], "'llama' is none of"),
        (["training.lerning_rate=1"], "did you mean 'learning_rate'"),
    ],
)
def test_wrong_input(capsys, words, message):
    assert cli.main([*FULL, *words]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    assert message in error


def test_a_configuration_that_cannot_be_reached(tmp_path, capsys):
    path = tiny.write_recipe(tmp_path, tiny.recipe_values(tmp_path, use_liger_kernel=True))
    nowhere = f"model.name_or_path={tmp_path}/nowhere"
    capsys.readouterr()
    assert cli.main(["plan", str(path), "--memory", "4", nowhere]) == 2
    [error] = capsys.readouterr().err.strip().splitlines()
    assert "--shape is one of smollm2-135m, gemma-3-1b, llama-3.2-1b" in error
