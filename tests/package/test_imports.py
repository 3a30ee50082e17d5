"""Imports point one way, and importing does no work."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# Lower layers first; a module imports from lower layers, or from its own.
LAYERS = [
    ["kernels", "report", "config", "symbols", "source"],
    ["hooks", "swap", "request"],
    ["deferred"],
    ["injection", "trainer_hook"],
    ["kernel_trainer"],
    ["trainer", "trl"],
    ["stock"],
    ["runs"],
    ["commands"],
    ["cli"],
    ["__main__"],
]
# Within a folder, likewise.
FOLDERS = {
    "kernels": [
        ["runtime", "launch", "autograd", "second_derivative"],
        ["recompute"],
        ["layers", "logits", "losses"],
        ["linear"],
        ["linear_log_prob_loss", "preference"],  # former paths
    ],
    "injection": [["probe", "rewind"], ["memory_budget"], ["rules"], ["walk"]],
    "trl": [["checks", "fused_head", "replacements"], ["overrides"], ["__init__"]],
    "runs": [
        ["adapters", "engine", "errors", "files", "health", "packages", "secrets", "signals"],
        ["shipped", "typed"],
        ["checkpoints", "data", "throughput", "processes"],
        ["load", "report", "rewards"],
        ["recipe"],
        ["benchmarks", "build", "origin", "planning"],
        ["checks", "folder"],
        ["finished", "run"],
        ["card"],
    ],
    "runs/planning": [["memory", "shapes"], ["counts", "traffic"], ["estimate"]],
    "runs/recipe": [["methods", "parse"], ["sections"], ["recipe"], ["compare", "resolved"]],
    "runs/report": [["plots", "samples", "summary"], ["html"]],
    "runs/rewards": [["judge"], ["sandbox"], ["rewards"]],
    "runs/data": [
        ["builtin", "rows"],
        ["conversation", "forms"],
        ["arguments", "tokenize"],
        ["task"],
        ["alignment", "collate", "mixing", "sources", "text"],
        ["splits"],
        ["example_stream", "vision"],
        ["prepare"],
        ["view"],
    ],
}
LEAVES = ["report", "config", "symbols"]
KERNELS = sorted((ROOT / "kernels").rglob("*.py"))
MODULES = [p for p in sorted((ROOT / "liger_trainer").rglob("*.py")) if p.name != "kernels.py"]


def layer(name: str, layers: list[list[str]] = LAYERS) -> int:
    return next(i for i, names in enumerate(layers) if name in names)


def module_name(path: Path) -> str:
    """Return the dotted name that a file of the package is imported by."""
    relative = path.relative_to(ROOT).with_suffix("")
    parts = relative.parts[:-1] if relative.name == "__init__" else relative.parts
    return ".".join(parts if parts[0] == "liger_trainer" else ("liger_trainer", *parts))


def imports(path: Path) -> list[str]:
    """Dotted names that a file imports, anywhere in it; for `from a import b` both a and a.b."""
    package = module_name(path).split(".")
    if path.stem != "__init__":
        package = package[:-1]
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            names += [module, *(f"{module}.{alias.name}" for alias in node.names)]
    return names


def below(path: Path, package: str) -> set[str]:
    """Names right below `package` of the modules in it that a file imports."""
    from liger_trainer import _MODULES

    prefix = package + "."
    found = {n.removeprefix(prefix) for n in imports(path) if n.startswith(prefix)}
    if package == "liger_trainer":
        found = {_MODULES.get(name, name) for name in found} - {"__version__"}
    return {name.split(".")[0] for name in found}


@pytest.mark.parametrize("path", KERNELS, ids=lambda p: str(p.relative_to(ROOT)))
def test_kernels_import_only_torch_triton_and_each_other(path):
    for name in imports(path):
        allowed = name.split(".")[0] in {"torch", "triton", *sys.stdlib_module_names}
        assert allowed or name.startswith("liger_trainer.kernels"), f"{path.name} imports {name}"


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_down(path):
    name = path.relative_to(ROOT / "liger_trainer").parts[0].removesuffix(".py")
    if name == "__init__":
        return  # loads on first use
    for imported in below(path, "liger_trainer"):
        assert layer(imported) <= layer(name), f"{name} imports {imported}, which is above it"
        assert name not in LEAVES or imported == name, f"{name} is a leaf but imports {imported}"


@pytest.mark.parametrize("folder", FOLDERS)
def test_imports_within_a_folder_point_down(folder):
    root = ROOT / ("kernels" if folder == "kernels" else f"liger_trainer/{folder}")
    layers = FOLDERS[folder]
    for path in sorted(root.rglob("*.py")):
        own = path.relative_to(root).parts[0].removesuffix(".py")
        modules = {
            name
            for name in below(path, f"liger_trainer.{folder}".replace("/", "."))
            if is_in(root, name)
        }
        for imported in modules - {own}:
            assert layer(imported, layers) <= layer(own, layers), f"{path}: {imported}"


def is_in(root: Path, name: str) -> bool:
    return (root / name).is_dir() or (root / f"{name}.py").exists()


@pytest.mark.parametrize(
    "path", sorted((ROOT / "liger_trainer/runs/rewards/judge").glob("*.py")), ids=lambda p: p.name
)
def test_what_runs_inside_the_sandbox_imports_the_standard_library_alone(path):
    """Nothing else is there."""
    for name in imports(path):
        own = name.startswith("liger_trainer.runs.rewards.judge")
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
