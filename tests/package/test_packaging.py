"""What a wheel holds is what the checkout has, and what it requires is what is tested."""

import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

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


def requirements() -> dict[str, Requirement]:
    extras = PROJECT["project"]["optional-dependencies"]
    wanted = [*PROJECT["project"]["dependencies"], *extras["peft"], *extras["trl"]]
    return {requirement.name: requirement for requirement in map(Requirement, wanted)}


def pins(versions: str) -> dict[str, str]:
    lines = (ROOT / f"constraints{versions}.txt").read_text(encoding="utf-8").splitlines()
    pinned = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {p.name: str(p.specifier).removeprefix("==") for p in pinned}


def test_lower_bounds_are_the_oldest_versions_that_are_tested():
    bounds = {n: Version(str(r.specifier).removeprefix(">=")) for n, r in requirements().items()}
    oldest = {name: Version(version) for name, version in pins("-oldest").items()}
    pinned_together = {"torch", "triton"}  # see constraints-oldest.txt
    assert bounds.keys() == oldest.keys()
    assert {n: v for n, v in oldest.items() if bounds[n] != v}.keys() == pinned_together


@pytest.mark.parametrize("versions", ["", "-oldest", "-newest"])
def test_tested_versions_are_allowed(versions):
    allowed = requirements()
    for name, version in pins(versions).items():
        assert name not in allowed or version in allowed[name].specifier, name
    assert pins(versions)["torch"] == pins("")["torch"]
