"""What a wheel holds is what the checkout has."""

import tomllib
from pathlib import Path

import liger_trainer

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
SETUPTOOLS = PROJECT["tool"]["setuptools"]


def test_every_package_on_disk_is_in_the_wheel():
    files = [*(ROOT / "liger_trainer").rglob("*.py")]
    folders = {path.parent.relative_to(ROOT).as_posix().replace("/", ".") for path in files}
    inside = {path.parent.name for path in (ROOT / "kernels").glob("*/__init__.py")}
    folders |= {f"liger_trainer.kernels.{name}" for name in inside}
    mapped = set(SETUPTOOLS["package-dir"])
    assert all((ROOT / folder).is_dir() for folder in SETUPTOOLS["package-dir"].values())
    assert sorted(SETUPTOOLS["packages"]) == sorted(folders | mapped)


def test_every_data_file_is_in_the_wheel():
    for package, patterns in SETUPTOOLS["package-data"].items():
        folder = ROOT / SETUPTOOLS["package-dir"].get(package, package.replace(".", "/"))
        packed = {path for pattern in patterns for path in folder.glob(pattern)}
        there = {p for p in folder.rglob("*") if p.is_file() and p.suffix not in (".py", ".pyc")}
        if package == "liger_trainer":
            there = {p for p in there if "__pycache__" not in p.parts}
        assert there == packed


def test_the_version_is_in_one_place():
    assert "version" not in PROJECT["project"]
    assert SETUPTOOLS["dynamic"]["version"] == {"attr": "liger_trainer.__version__"}
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert f"## [{liger_trainer.__version__}]" in changes
