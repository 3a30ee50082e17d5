"""Tokens and passwords reach no file and no terminal."""

import pytest
from run_folders import SECRET, train

from liger_trainer.runs.secrets import hidden, hidden_override, is_secret


def test_secrets_reach_no_file_and_no_terminal(original, finished, capsys):
    overrides = [f"model.token={SECRET}", "data.eval_path=https://user:pa55word@host/x"]
    overrides += ["data.eval_fraction=null"]
    assert train("recipe.yaml", "--dry-run", *overrides) == 1
    assert train("recipe.yaml", *overrides, f"training.hub_token={SECRET}") == 2
    assert train("recipe.yaml", *overrides, f"model.token=[{SECRET}]") == 2
    printed = "".join(capsys.readouterr())
    assert "token: '***'" in printed
    written = [(original / "out" / name).read_text() for name in ("run.json", "report.html")]
    for secret in (SECRET, "pa55word"):
        assert not any(secret in text for text in [printed, *written])
    assert SECRET.encode() not in (original / "out" / "training_args.bin").read_bytes()


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
