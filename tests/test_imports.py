"""Imports point one way, and importing does no work."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Lower layers first; a module imports from lower layers, or from its own.
LAYERS = [
    ["kernels", "report", "config"],
    ["probe", "swap"],
    ["deferred"],
    ["rules"],
    ["injection", "hook", "fused_head", "trl_checks", "trl_overrides"],
    ["trainer", "trl"],
    ["stock"],
    ["runs"],
    ["commands"],
    ["cli"],
    ["__main__"],
]
# Within `runs`, likewise.
RUNS_LAYERS = [
    ["adapters", "errors", "secrets", "parse", "packages", "signals", "health", "judge"],
    ["memory", "shapes", "shipped", "typed"],
    ["checkpoints", "data", "methods", "plots", "sandbox", "throughput"],
    ["counts", "traffic"],
    ["html", "load", "rewards", "samples", "summary"],
    ["recipe"],
    ["build", "compare", "estimate", "plan"],
    ["checks", "folder"],
    ["finished", "run"],
    ["card"],
]
# Within `runs/data`, likewise.
DATA_LAYERS = [
    ["builtin", "rows"],
    ["conversation", "forms"],
    ["arguments", "tokenize"],
    ["alignment", "collate", "mixing", "sources", "text"],
    ["splits", "vision"],
    ["prepare"],
    ["view"],
]
LEAVES = ["report", "config"]
KERNELS = sorted((ROOT / "kernels").glob("*.py"))
MODULES = [p for p in sorted((ROOT / "liger_trainer").rglob("*.py")) if p.name != "kernels.py"]


def layer(name: str, layers: list[list[str]] = LAYERS) -> int:
    return next(i for i, names in enumerate(layers) if name in names)


def imports(path: Path) -> list[str]:
    """Dotted names that a file imports, anywhere in it; for `from a import b` both a and a.b."""
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return names


def own_imports(path: Path) -> set[str]:
    """Modules of this package that a file imports, by the first name below the package."""
    from liger_trainer import _HOME

    below = {n.split(".")[1] for n in imports(path) if n.startswith("liger_trainer.")}
    return {_HOME.get(name, name) for name in below} - {"__version__"}


@pytest.mark.parametrize("path", KERNELS, ids=lambda p: p.name)
def test_kernels_import_only_torch_triton_and_each_other(path):
    for name in imports(path):
        allowed = name.split(".")[0] in {"torch", "triton", *sys.stdlib_module_names}
        assert allowed or name.startswith("liger_trainer.kernels"), f"{path.name} imports {name}"


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_down(path):
    name = path.relative_to(ROOT / "liger_trainer").parts[0].removesuffix(".py")
    if name == "__init__":
        return  # loads on first use
    for imported in own_imports(path):
        assert layer(imported) <= layer(name), f"{name} imports {imported}, which is above it"
        assert name not in LEAVES or imported == name, f"{name} is a leaf but imports {imported}"


def below(path: Path, package: str) -> set[str]:
    """The parts of `package` that a file imports from."""
    prefix = f"{package}."
    return {n.removeprefix(prefix).split(".")[0] for n in imports(path) if n.startswith(prefix)}


@pytest.mark.parametrize(
    "path",
    [p for p in MODULES if "runs" in p.relative_to(ROOT).parts],
    ids=lambda p: str(p.relative_to(ROOT / "liger_trainer")),
)
def test_imports_within_runs_point_down(path):
    name = path.relative_to(ROOT / "liger_trainer" / "runs").parts[0].removesuffix(".py")
    if name == "__init__":
        return
    for imported in below(path, "liger_trainer.runs"):
        assert layer(imported, RUNS_LAYERS) <= layer(name, RUNS_LAYERS), imported


@pytest.mark.parametrize(
    "path", [p for p in MODULES if p.parent.name == "data"], ids=lambda p: p.name
)
def test_imports_within_data_point_down(path):
    if path.stem == "__init__":
        return
    for imported in below(path, "liger_trainer.runs.data"):
        assert layer(imported, DATA_LAYERS) <= layer(path.stem, DATA_LAYERS), imported


@pytest.mark.parametrize(
    "path", sorted((ROOT / "liger_trainer/runs/judge").glob("*.py")), ids=lambda p: p.name
)
def test_what_runs_inside_the_sandbox_imports_the_standard_library_alone(path):
    """Nothing else is there."""
    for name in imports(path):
        own = name.startswith("liger_trainer.runs.judge")
        assert own or name.split(".")[0] in sys.stdlib_module_names, name


def test_there_is_no_package_at_the_root_that_shadows_another():
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_importing_the_package_loads_neither_torch_nor_transformers():
    code = "import sys, liger_trainer; print({'torch', 'transformers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_the_command_line_answers_before_it_loads_torch():
    code = "import sys, liger_trainer.cli; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
