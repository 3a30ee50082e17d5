"""YAML to plain values, and one line about what is not."""

import pytest

from liger_trainer.runs.recipe.parse import parse


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
        ("&a [*a]", "contains it"),
        ("a: 1\na: 2", "the key 'a' appears twice in line 2"),
        ("a: !!set {x}", "a: a set is neither text"),
        ("a: !!binary aGk=", "a: a bytes is neither text"),
        ("a: {b: .nan}", "a.b: not a number"),
        ("? [a]\n: 1", "unhashable"),
        ("~: 1", "None is not a name"),
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
