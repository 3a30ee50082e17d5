"""`generate` and `chat`: the prompts that they take, and what they answer."""

import json

import pytest
from run_folders import run


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


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.json", b'[{"prompt": "a"}]', "is neither .txt, with a prompt on each line, nor .jsonl"),
        ("p.txt", b"caf\xe9", "is not UTF-8 text"),
    ],
)
def test_prompts_are_text_or_json_lines(here, tmp_path, capsys, name, content, message):
    (tmp_path / name).write_bytes(content)
    assert run("generate", "full", "--prompts", tmp_path / name) == 2
    assert message in capsys.readouterr().err


def test_chat_answers_until_the_input_ends(here, capsys, monkeypatch):
    said = iter(["what is two ?", "/new", "", "the cat ?"])
    monkeypatch.setattr("builtins.input", lambda _: next(said, None) or end())
    assert run("chat", "lora", "--new-tokens", "3") == 0


def test_chat_takes_any_model(here, monkeypatch):
    for model in (here / "model", str(here / "model").replace(str(here), ".")):
        said = iter(["what is two ?"])
        monkeypatch.setattr("builtins.input", lambda _, said=said: next(said, None) or end())
        assert run("chat", model, "--new-tokens", "3") == 0


def end():
    raise EOFError
