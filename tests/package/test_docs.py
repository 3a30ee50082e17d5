"""The documentation names what exists: commands, options, keys, recipes, links, messages.

Its Python runs as it is printed, in the order of each page.
"""

import ast
import functools
import importlib.util
import re
import shlex
from pathlib import Path

import pytest
import tiny
import torch
import torch.distributed as dist
from datasets import Dataset

from liger_trainer.cli import build_parser
from liger_trainer.runs import shipped
from liger_trainer.runs.recipe.methods import METHODS
from liger_trainer.runs.recipe.parse import parse

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.glob("*.md"))]
MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"  # that the pages name
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def _load_reference():
    spec = importlib.util.spec_from_file_location("reference", DOCS / "reference.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


reference = _load_reference()


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def blocks(page: Path, language: str) -> list[str]:
    return [code for found, code in BLOCK.findall(text_of(page)) if found == language]


def commands(page: Path) -> list[list[str]]:
    """The words of every `liger-trainer ...` in a page, with and without arguments."""
    lines = []
    for code in blocks(page, "bash"):
        lines += code.replace("\\\n", " ").splitlines()
    lines += re.findall(r"`(liger-trainer[^`]*)`", BLOCK.sub("", text_of(page)))
    found = []
    for line in lines:
        before, program, words = line.partition("liger-trainer ")
        if program and not before.strip("` "):
            words = shlex.split(words, comments=True)
            found.append(words[: words.index(">")] if ">" in words else words)
    return found


@pytest.mark.parametrize("name", reference.PAGES)
def test_reference_pages_are_those_of_the_code(name):
    written = text_of(DOCS / name)
    assert written == reference.PAGES[name](), "run `python docs/reference.py`"


@every_page
def test_commands_parse(page, capsys):
    parser = build_parser()
    known = reference.commands_of(parser)
    for words in commands(page):
        if len(words) == 1 and not words[0].startswith("-"):
            assert words[0] in known
            continue
        if words == ["--version"]:
            continue
        try:
            options, rest = parser.parse_known_args(words)
        except SystemExit:
            pytest.fail(f"{shlex.join(words)}: {capsys.readouterr().err}")
        check_overrides([*getattr(options, "overrides", []), *rest])
        if hasattr(options, "recipe"):
            check_recipe(options.recipe)
        if getattr(options, "action", "") == "show":
            check_recipe(options.name)


def check_overrides(words):
    for word in words:
        key, equals, value = word.partition("=")
        section, _, name = key.partition(".")
        assert equals, word
        assert is_key(section, name), word
        parse(value)


def check_recipe(name):
    yours = name.endswith(".yaml") and "/" not in name
    assert yours or name in shipped.recipe_names() or (ROOT / name).is_file(), name


@functools.cache
def is_key(section: str, name: str) -> bool:
    """Whether a section may have a key; those that other packages define may have any."""
    if section in ("training", "peft"):
        return True
    return name in {field.name for field in reference.fields(*reference.SECTIONS[section])}


@every_page
def test_recipes_in_yaml_have_known_keys(page):
    for code in blocks(page, "yaml"):
        values = parse(code)
        assert values.pop("method", "sft") in METHODS
        for section, given in values.items():
            assert all(is_key(section, name) for name in given), given


@every_page
def test_recipes_and_files_exist(page):
    text = text_of(page)
    for path in re.findall(r"\b(?:recipes|benchmarks|tests|docs)/[\w./-]+\.(?:yaml|py|md)", text):
        assert (ROOT / path).is_file(), path
    for name in re.findall(rf"`((?:{'|'.join(METHODS)})/[\w.-]+)`", text):
        assert name in shipped.recipe_names(), name


@every_page
def test_internal_links_resolve(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", BLOCK.sub("", text_of(page))):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        found = page.parent / path if path else page
        assert found.is_file(), target
        assert not anchor or anchor in anchors(found), target


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", BLOCK.sub("", text_of(page)), re.MULTILINE)
    return {re.sub(r"\s+", "-", re.sub(r"[^\w\s-]", "", h.lower()).strip()) for h in headings}


def test_every_page_is_in_the_navigation():
    named = re.findall(r": ([\w-]+\.md)$", text_of(ROOT / "mkdocs.yml"), re.MULTILINE)
    assert sorted(named) == sorted(page.name for page in DOCS.glob("*.md"))


@every_page
def test_python_blocks_compile_and_import_what_exists(page):
    for code in blocks(page, "python"):
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.ImportFrom) and node.module.startswith("liger_trainer"):
                for alias in node.names:
                    assert alias.name in names_of(node.module), f"{node.module}.{alias.name}"


@functools.cache
def names_of(module: str) -> set[str]:
    """Public names of a module of the package, read from its source."""
    path = module.replace(".", "/").replace("liger_trainer/kernels", "kernels")
    file = ROOT / f"{path}.py"
    tree = ast.parse(text_of(file if file.is_file() else ROOT / path / "__init__.py"))
    found = {n.name for n in tree.body if isinstance(n, (ast.FunctionDef, ast.ClassDef))}
    if module.startswith("liger_trainer.kernels."):  # what a folder passes on
        passed_on = [n for n in tree.body if isinstance(n, ast.ImportFrom)]
        found |= {alias.name for node in passed_on for alias in node.names}
    if module == "liger_trainer":
        found |= set(reference.keys("__init__.py", "_MODULES"))
    if module == "liger_trainer.trl":
        methods = {n.value for n in ast.walk(tree) if isinstance(n, ast.Constant)}
        methods = {m for m in methods if isinstance(m, str) and m.isidentifier()}
        found |= {f"{m}{kind}" for m in methods for kind in ("Trainer", "Config")}
    return found


def test_messages_in_troubleshooting_are_the_package_s():
    """Each quoted message, cut at its placeholders, is part of a string in the source."""
    text = text_of(DOCS / "troubleshooting.md")
    quoted = re.findall(r"^### `(.*)`$", text, re.MULTILINE)
    quoted += re.findall(r"^\| `(.*?)` \|", text, re.MULTILINE)
    assert len(quoted) > 30
    strings = "\n".join(strings_of_the_package())
    for message in quoted:
        for piece in filter(None, (p.strip() for p in re.split(r"\.\.\.|%[sd]", message))):
            assert piece in strings, piece


def strings_of_the_package() -> list[str]:
    found = []
    for folder in ("liger_trainer", "kernels"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(text_of(path))):
                if isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found.append(node.value)
    return found


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return str(tiny.saved_model(tmp_path_factory.mktemp("model")))


@pytest.fixture
def given():
    """What the pages take for granted: the reader's own model, data and loss."""
    torch.manual_seed(0)
    ids = torch.randint(3, 320, (4, 12))
    pair = {"prompt": "two plus two ?", "chosen": " four .", "rejected": " cat ."}
    return {
        "model": tiny.model(),
        "tokenizer": tiny.tokenizer(),
        "batches": [{"input_ids": ids, "labels": ids}],
        "input_ids": ids,
        "labels": ids.clone(),
        "dataset": Dataset.from_list([{"input_ids": row, "labels": row} for row in ids.tolist()]),
        "pairs": Dataset.from_list([pair] * 2),
        "my_loss": lambda logits, labels: torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
        ),
        "ref_log_probs": torch.zeros(2, 2),
    }


@pytest.fixture
def process():
    """A process group of one process, for what the pages shard."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def run(page, names, model):
    """Run the blocks of a page with a small model in place of the one that they name."""
    for number, code in enumerate(blocks(DOCS / f"{page}.md", "python")):
        if not torch.cuda.is_available():  # as the page says
            code = code.replace('Config("out", ', 'Config("out", bf16=False, ')
        exec(compile(code.replace(MODEL, model), f"{page}, block {number}", "exec"), names)


WITH_PYTHON = [p.stem for p in PAGES if p.parent == DOCS and blocks(p, "python")]


@pytest.mark.parametrize("page", WITH_PYTHON)
def test_the_code_of_a_page_runs(page, given, saved, request, tmp_path, monkeypatch):
    pytest.importorskip("trl")
    if page == "several-gpus":
        request.getfixturevalue("process")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    run(page, given, saved)


def test_the_readme_shows_what_the_index_shows():
    readme = blocks(ROOT / "README.md", "python")
    assert readme == blocks(DOCS / "index.md", "python")


def test_the_loss_from_log_probabilities_is_dpo(given, saved):
    """The page's call equals the formula, written out."""
    run("custom-loop", given, saved)
    model, ids, labels = given["model"], given["input_ids"], given["labels"]
    model.zero_grad()
    log_probs = model(input_ids=ids).logits[:, :-1].double().log_softmax(-1)
    scores = log_probs.gather(-1, labels[:, 1:, None]).squeeze(-1).sum(-1)
    margin = scores[:2] - scores[2:]
    expected = -torch.nn.functional.logsigmoid(0.1 * margin).mean()
    assert given["loss"].item() == pytest.approx(expected.item(), rel=1e-5)
