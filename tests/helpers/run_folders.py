"""What the tests of a run's folder share: to train in it, and to look at what is there."""

import json

from transformers import Trainer

from liger_trainer import cli

SECRET = "hf_0123456789abcdef"


def run(*words):
    return cli.main([str(word) for word in words])


def train(path, *arguments):
    return run("train", path, *arguments)


def state(folder):
    return json.loads((folder / "run.json").read_text())


def at_step(monkeypatch, name, step, action):
    """Make a method of Trainer call `action` first, if it is called after `step` steps."""
    plain = getattr(Trainer, name)

    def method(self, *args, **kwargs):
        if self.state.global_step == step:
            action()
        return plain(self, *args, **kwargs)

    monkeypatch.setattr(Trainer, name, method)
