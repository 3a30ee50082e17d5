"""`evaluate --tasks`: tasks of lm-eval on a finished run's model."""

import json

import pytest
import torch
from run_folders import run

from liger_trainer.runs import benchmarks, packages
from liger_trainer.runs.load import ModelArguments, load_model, load_tokenizer

ROWS = [("two plus two is", 0), ("the cat sat on", 1), ("what is two ?", 1), ("user think", 0)]
CHOICES = ("four", "the mat")
TASK = """
task: toy
dataset_path: json
dataset_kwargs: {{data_files: {{validation: {rows}}}}}
output_type: multiple_choice
validation_split: validation
doc_to_text: "{{{{question}}}}"
doc_to_choice: {choices}
doc_to_target: "{{{{answer}}}}"
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""
needs_lm_eval = pytest.mark.skipif(not packages.installed("lm-eval"), reason="needs lm-eval")


@pytest.fixture
def task(tmp_path):
    rows = tmp_path / "rows.jsonl"
    lines = [json.dumps({"question": q, "answer": a}) for q, a in ROWS]
    rows.write_text("\n".join(lines))
    path = tmp_path / "toy.yaml"
    path.write_text(TASK.format(rows=rows, choices=list(CHOICES)))
    return path


def accuracy(name) -> float:
    model, tokenizer = (load(ModelArguments(name)) for load in (load_model, load_tokenizer))
    hits = []
    for question, answer in ROWS:
        scores = []
        for choice in CHOICES:
            start = len(tokenizer(question).input_ids)
            ids = torch.tensor([tokenizer(f"{question} {choice}").input_ids])
            with torch.no_grad():
                log_probs = model.eval()(ids).logits[0, :-1].log_softmax(-1)
            each = log_probs.gather(-1, ids[0, 1:, None])[start - 1 :]
            scores.append(each.sum().item())
        hits.append(scores.index(max(scores)) == answer)
    return sum(hits) / len(hits)


@needs_lm_eval
@pytest.mark.parametrize("name", ["full", "lora"])
def test_a_task_of_ones_own(here, task, capsys, name):
    assert run("evaluate", name, "--json", "--tasks", task) == 0
    printed = capsys.readouterr().out
    found = json.loads(printed[printed.index("{") :])
    assert found["toy"]["acc"] == accuracy(name)
    assert run("evaluate", name, "--limit", "2", "--tasks", task) == 0
    assert "standard error" in capsys.readouterr().out


@needs_lm_eval
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--tasks", "helaswag"], "lm-eval has no task 'helaswag'; do you mean hellaswag"),
        (["--tasks", "nowhere.yaml"], "there is no file 'nowhere.yaml'"),
        (["--limit", "0", "--tasks", "hellaswag"], "--limit is 0; it must be at least 1"),
    ],
)
def test_wrong_tasks_are_told_in_one_line(here, capsys, words, message):
    assert run("evaluate", "full", *words) == 2
    assert message in capsys.readouterr().err.strip().splitlines()[-1]


def test_the_package_is_needed(here, capsys, monkeypatch):
    monkeypatch.setattr(packages, "installed", lambda *names: False)
    assert run("evaluate", "full", "--tasks", "hellaswag") == 2
    assert "`pip install lm-eval`" in capsys.readouterr().err


def test_overrides_that_tasks_would_ignore_are_refused(here, capsys):
    assert run("evaluate", "full", "data.max_length=9", "--tasks", "hellaswag") == 2
    assert "only keys of `model` have an effect" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words", [["--limit", "0"], ["--limit", "5"], ["--chat"], ["--batch-size", "2"]]
)
def test_options_of_tasks_need_tasks(here, capsys, words):
    assert run("evaluate", "full", *words) == 2
    assert f"{words[0]} goes with --tasks" in capsys.readouterr().err


def test_metrics_are_named_without_the_usual_filter():
    given = {"alias": "toy", "sample_len": 2, "acc,none": 0.5, "acc_stderr,none": "N/A"}
    given |= {"exact_match,strict": 0.25, "exact_match_stderr,strict": 0.1}
    assert benchmarks._numbers(given) == {
        "acc": 0.5, "exact_match,strict": 0.25, "exact_match_stderr,strict": 0.1
    }  # fmt: skip
