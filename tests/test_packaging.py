"""What ends up in the wheel, and that the starter files come out of it again."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterable
from importlib.metadata import packages_distributions, version
from importlib.util import find_spec
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from true_kd.tracking import TRACKERS

ROOT = Path(__file__).parents[1]
DOMAINS = ("action", "debug", "memory", "reflection", "task", "thinking")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
LISTS = {"dependencies": PROJECT["dependencies"], **PROJECT["optional-dependencies"]}
PARITY = [Requirement(text) for text in LISTS["parity"]]
REQUIREMENTS = [Requirement(text) for texts in LISTS.values() for text in texts]


def below(folder: Path) -> set[str]:
    """The files below a folder that belong in a wheel, relative to it."""
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    return {file for file in files if "__pycache__" not in file and not file.endswith((".pyc", ".DS_Store"))}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    [found] = folder.iterdir()
    return found


@pytest.fixture(scope="module")
def names(wheel: Path) -> set[str]:
    """The names of all files in the wheel."""
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


@pytest.fixture(scope="module")
def unpacked(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, unpacked as an installer would."""
    folder = tmp_path_factory.mktemp("site-packages")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def installed(unpacked: Path, cwd: Path, code: str) -> subprocess.CompletedProcess[str]:
    """A Python that finds true_kd in the unpacked wheel, not in this checkout."""
    start = f"import sys; sys.path.insert(0, {str(unpacked)!r})\n"
    return subprocess.run([sys.executable, "-c", start + code], cwd=cwd, capture_output=True, text=True, check=False)


def missing(wanted: Iterable[str], names: set[str]) -> list[str]:
    """Those of `wanted` that are not there."""
    return sorted(set(wanted) - names)


def test_the_wheel_has_every_file_of_the_package(names: set[str]) -> None:
    assert missing((f"true_kd/{file}" for file in below(ROOT / "true_kd") if file.endswith(".py")), names) == []


def test_the_wheel_has_the_data_of_the_pocket_models(names: set[str]) -> None:
    data = below(ROOT / "true_kd" / "pocket")
    assert data
    assert missing((f"true_kd/pocket/{file}" for file in data), names) == []


@pytest.mark.parametrize("folder", ["configs", "prompts"])
def test_the_wheel_has_the_starter_files(folder: str, names: set[str]) -> None:
    files = below(ROOT / folder)
    assert files
    assert missing((f"true_kd/starter_files/{folder}/{file}" for file in files), names) == []


def test_the_starter_files_cover_six_domains(names: set[str]) -> None:
    assert "true_kd/starter_files/configs/base.yaml" in names
    for domain in DOMAINS:
        assert f"true_kd/starter_files/configs/{domain}.yaml" in names
        for split in ("train", "valid"):
            assert f"true_kd/starter_files/prompts/{domain}/{split}.jsonl" in names


def test_the_wheel_has_nothing_else(names: set[str]) -> None:
    tops = {name.partition("/")[0] for name in names}
    assert tops == {"true_kd", f"true_kd-{version('true-kd')}.dist-info"}
    unwanted = re.compile(r"__pycache__|\.pyc$|\.DS_Store|\.lock$|(^|/)tests?(/|_)|\.tmp-|kd_metrics\.json|\.ipynb")
    assert [name for name in names if unwanted.search(name)] == []


def test_the_wheel_is_small_enough_for_the_index(wheel: Path) -> None:
    assert wheel.stat().st_size < 100 * 2**20


def test_the_metadata_names_the_command_the_licence_and_the_extras(unpacked: Path) -> None:
    [info] = unpacked.glob("*.dist-info")
    metadata = (info / "METADATA").read_text()
    assert "Name: true-kd\n" in metadata
    assert f"Version: {version('true-kd')}\n" in metadata
    assert "License-Expression: Apache-2.0\n" in metadata
    assert (info / "licenses" / "LICENSE").read_text() == (ROOT / "LICENSE").read_text()
    assert "true-kd = true_kd.__main__:main" in (info / "entry_points.txt").read_text()
    for extra in ("cpu", "cuda12", "cuda13"):
        assert f"Provides-Extra: {extra}\n" in metadata


def test_the_readme_goes_to_the_index(unpacked: Path) -> None:
    [info] = unpacked.glob("*.dist-info")
    body = (info / "METADATA").read_text().partition("\n\n")[2]
    assert len(body) > 100
    assert body.strip() == (ROOT / "README.md").read_text().strip()


def test_init_of_the_installed_package_lays_out_a_project_that_runs(unpacked: Path, tmp_path: Path) -> None:
    code = (
        "import true_kd, true_kd.starter\n"
        "print(true_kd.__file__, true_kd.starter.source(), sep='\\n')\n"
        "from true_kd.__main__ import main\n"
        "sys.argv = ['true-kd', 'init']\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "sys.argv = ['true-kd', 'distill']\n"
        "main()\n"
    )
    done = installed(unpacked, tmp_path, code)
    module, source, *_ = done.stdout.splitlines()
    assert module == str(unpacked / "true_kd" / "__init__.py")
    assert source == str(unpacked / "true_kd" / "starter_files")
    assert done.returncode == 2
    assert done.stderr == f"no domain was named, expected --domain NAME or --all ({', '.join(DOMAINS)}).\n"
    for folder in ("configs", "prompts"):
        laid_out = {file for file in below(tmp_path / folder)}
        assert laid_out == below(ROOT / folder)


# Dependencies.


OPTIONAL = {Requirement(text).name for tracker in TRACKERS for text in LISTS[tracker]}


def distributed(name: str) -> bool:
    """Whether a package is installed."""
    return any(name in owners for owners in packages_distributions().values())


def test_each_tracker_is_an_extra_and_none_is_a_dependency() -> None:
    named = {Requirement(text).name for text in LISTS["dependencies"]}
    assert not OPTIONAL & named
    for tracker, (module, _) in TRACKERS.items():
        assert any(Requirement(text).name.startswith(module) for text in LISTS[tracker]), tracker


@pytest.mark.parametrize("requirement", REQUIREMENTS, ids=str)
def test_each_dependency_has_a_lower_bound_that_is_met_here(requirement: Requirement) -> None:
    if requirement.name in ("true-kd", "ruff"):  # the linter is installed by `make lint`
        assert requirement.extras <= set(PROJECT["optional-dependencies"])
        return
    assert [rule.operator for rule in requirement.specifier] == [">="]
    if requirement in PARITY and find_spec(requirement.name.replace("-python", "").replace("-", "_")) is None:
        pytest.skip("an extra of gigabytes, or compiled: what needs it skips itself")
    if requirement.name in OPTIONAL and not distributed(requirement.name):
        pytest.skip("an extra that is not installed")
    assert version(requirement.name) in requirement.specifier


@pytest.mark.parametrize("extra", ["cpu", "cuda12", "cuda13"])
def test_each_backend_is_an_extra_with_the_bound_of_mlx_itself(extra: str) -> None:
    [backend] = [Requirement(text) for text in LISTS[extra]]
    [plain] = [Requirement(text) for text in LISTS["dependencies"] if Requirement(text).name == "mlx"]
    assert (backend.name, backend.extras) == ("mlx", {extra})
    assert backend.specifier == plain.specifier
    assert plain.extras == set()


def test_this_python_and_all_that_are_listed_are_supported() -> None:
    supported = SpecifierSet(PROJECT["requires-python"])
    listed = [text.rpartition(" ")[2] for text in PROJECT["classifiers"] if re.search(r":: 3\.\d+$", text)]
    assert listed
    assert all(Version(number) in supported for number in (*listed, sys.version.split()[0]))
    assert Version("3.10") not in supported


def test_every_import_is_a_declared_dependency() -> None:
    declared = {Requirement(text).name.replace("_", "-") for text in LISTS["dependencies"]}
    # Each tracker's own module imports its package, when its user names it.
    declared |= {module.lower() for module, _ in TRACKERS.values()}
    owners = packages_distributions()
    # Pinned to one version by their owner, so declared with it.
    along = {"pydantic_core": "pydantic"}
    imported = set()
    for file in (ROOT / "true_kd").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
                imported.add(node.module.partition(".")[0])
    foreign = imported - sys.stdlib_module_names - {"true_kd"}
    assert foreign
    undeclared = {
        name
        for name in foreign
        if not {owner.lower().replace("_", "-") for owner in [along.get(name, ""), *owners.get(name, [name])]}
        & declared
    }
    assert undeclared == set()
