"""A problem with its tests, and completions of it that are judged."""

from liger_trainer.runs.rewards.rewards import PassesTests

SOURCE = "import os\n\n\ndef half(n):\n    return n / 2\n\n\ndef twice(x):\n"

TESTS = "def check(candidate):\n    assert candidate(1) == 2\n    assert candidate(4) == 8\n"

WRONG = "    return -7\n"


def rewards(safe, *completions, tests=TESTS):
    count = len(completions)
    columns = {"source": [SOURCE], "tests": [tests], "entry_point": ["twice"]}
    columns = {key: value * count for key, value in columns.items()}
    return PassesTests(safe)(list(completions), **columns)
