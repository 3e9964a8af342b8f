"""What MLX runs on: one line with the remedy where it is missing, and a fast BLAS where there is one."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from true_kd import blas
from true_kd.backend import BackendMissing, device_name, require_mlx, require_platform

linux = pytest.mark.skipif(sys.platform != "linux", reason="the wheel's slow BLAS is that of Linux")


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A Python of its own."""
    return subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )


def true_kd(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """The command line in a process of its own."""
    command = [sys.executable, "-m", "true_kd", *arguments]
    return subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, check=False)


@pytest.fixture
def hollow(tmp_path: Path) -> str:
    """A folder whose `mlx` has no `mlx.core`, as after `pip install mlx` alone on Linux."""
    (tmp_path / "hollow" / "mlx").mkdir(parents=True)
    (tmp_path / "hollow" / "mlx" / "__init__.py").touch()
    return str(tmp_path / "hollow")


@linux
@pytest.mark.parametrize("arguments", [["doctor"], ["distill", "-d", "cats"], ["--help"]], ids=" ".join)
def test_without_a_backend_every_command_is_one_line_that_names_the_extras(arguments: list[str], hollow: str) -> None:
    done = true_kd(*arguments, PYTHONPATH=hollow)
    [line] = done.stderr.splitlines()
    assert (done.returncode, done.stdout) == (4, "")
    assert line.startswith("mlx cannot be imported (No module named 'mlx.core').")
    assert "[cpu]" in line
    assert "[cuda12]" in line
    assert "[cuda13]" in line


def test_without_a_backend_the_python_api_says_the_same(hollow: str) -> None:
    code = (
        "import true_kd\n"
        "from true_kd.errors import EnvironmentProblem\n"
        "try: true_kd.KDConfig\n"
        "except EnvironmentProblem as error: print(error)"
    )
    done = python(code, PYTHONPATH=hollow)
    assert done.stderr == ""
    assert done.stdout.startswith("mlx cannot be imported (")


@pytest.mark.parametrize(
    ("system", "machine", "says"),
    [
        ("Linux", "x86_64", "pip install 'true-kd[cpu]'"),
        ("Linux", "aarch64", "pip install 'true-kd[cpu]'"),
        ("Darwin", "arm64", "pip install --force-reinstall mlx mlx-lm"),
        ("Darwin", "x86_64", "use an Apple Silicon Mac or Linux"),
        ("Windows", "AMD64", "use an Apple Silicon Mac or Linux"),
    ],
)
def test_the_remedy_is_that_of_the_platform(
    system: str, machine: str, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(platform, "system", lambda: system)
    monkeypatch.setattr(platform, "machine", lambda: machine)
    error = BackendMissing(ImportError("libmlx.so: cannot open\nshared object file"))
    [line] = str(error).splitlines()
    assert line.startswith("mlx cannot be imported (libmlx.so: cannot open). ")
    assert says in line
    assert error.exit_code == 4


def test_an_error_without_a_message_is_named_by_its_kind() -> None:
    assert str(BackendMissing(ModuleNotFoundError())).startswith("mlx cannot be imported (ModuleNotFoundError). ")


def test_without_mlx_lm_the_remedy_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    require_mlx()
    monkeypatch.setitem(sys.modules, "mlx_lm", None)
    with pytest.raises(BackendMissing, match="No module named 'mlx_lm'"):
        require_mlx()


def test_the_device_has_one_of_three_names() -> None:
    assert device_name() in ("cpu", "metal", "cuda")


def test_importing_the_package_imports_no_mlx() -> None:
    done = python("import sys, true_kd; print(*(name for name in sys.modules if name.startswith('mlx')))")
    assert (done.stdout, done.stderr) == ("\n", "")


# doctor.


@pytest.mark.skipif(device_name() != "cpu", reason="a GPU needs no BLAS")
def test_doctor_names_the_blas_of_this_process(cli) -> None:
    [found] = [check["found"] for check in json.loads(cli("doctor", "--json").out)["checks"] if check["name"] == "blas"]
    assert blas.IN_USE.reason.partition(";")[0] in found
    assert blas.IN_USE.library is None or blas.IN_USE.library in found


@linux
def test_a_blas_that_is_not_there_is_reported_and_the_rest_works() -> None:
    done = true_kd("doctor", "--json", TRUE_KD_BLAS="/nowhere/libblas.so")
    assert (done.returncode, done.stderr) == (0, "")
    if device_name() == "cpu":
        assert "TRUE_KD_BLAS=/nowhere/libblas.so is not a BLAS that can be loaded" in done.stdout


# BLAS.

IN_USE = "from true_kd import blas; print(blas.IN_USE.library, blas.IN_USE.reason, sep='|')"


@linux
@pytest.mark.parametrize(
    ("value", "library", "reason"),
    [
        ("off", "None", "TRUE_KD_BLAS=off"),
        ("OFF", "None", "TRUE_KD_BLAS=OFF"),
        ("/nowhere/libblas.so", "None", "TRUE_KD_BLAS=/nowhere/libblas.so is not a BLAS that can be loaded"),
        (os.devnull, "None", f"TRUE_KD_BLAS={os.devnull} is not a BLAS that can be loaded"),
        (__file__, "None", f"TRUE_KD_BLAS={__file__} is not a BLAS that can be loaded"),
        ("libc.so.6", "None", "TRUE_KD_BLAS=libc.so.6 is not a BLAS that can be loaded"),
    ],
    ids=lambda value: value[:20],
)
def test_the_blas_that_was_chosen_is_the_one_that_is_loaded(value: str, library: str, reason: str) -> None:
    done = python(f"import sys; {IN_USE}", TRUE_KD_BLAS=value)
    assert (done.stdout.strip(), done.stderr) == (f"{library}|{reason}", "")


@linux
def test_after_mlx_it_is_too_late_for_a_blas() -> None:
    done = python(f"import sys, mlx.core; {IN_USE}", TRUE_KD_BLAS="")
    assert done.stdout.strip() == "None|mlx was imported before true_kd, too late to load one"


@linux
def test_a_library_that_is_found_by_search_can_be_chosen_by_name() -> None:
    found = python(f"import sys; {IN_USE}", TRUE_KD_BLAS="").stdout.strip().split("|")
    if found[0] == "None":
        assert "apt install libopenblas0-pthread" in found[1]
    else:
        assert python(f"import sys; {IN_USE}", TRUE_KD_BLAS=found[0]).stdout.strip() == f"{found[0]}|found and loaded"


# Platforms.

WINDOWS = """
import ctypes, os, platform, signal, subprocess, sys, tempfile, threading
sys.platform, platform.system, platform.machine = "win32", lambda: "Windows", lambda: "AMD64"
for name in ("fcntl", "resource", "termios", "pwd", "grp", "mlx", "mlx.core", "mlx_lm"):
    sys.modules[name] = None
for name in ("SIGHUP", "SIGALRM", "SIGKILL", "SIGUSR1", "setitimer", "ITIMER_REAL"):
    delattr(signal, name)
for name in ("O_NOFOLLOW", "O_NONBLOCK", "fork", "getuid"):
    delattr(os, name)
"""
INTEL_MAC = """
import platform, sys
sys.platform, platform.system, platform.machine = "darwin", lambda: "Darwin", lambda: "x86_64"
sys.modules["mlx"] = sys.modules["mlx.core"] = None
"""
COMMAND = "sys.argv = ['true-kd', *{arguments!r}]\nimport runpy; runpy.run_module('true_kd', run_name='__main__')"
FOREIGN = {
    "Windows": (WINDOWS, "this machine: Windows, expected a Mac with Apple silicon, or Linux. Install true-kd in WSL"),
    "an Intel Mac": (INTEL_MAC, "this machine: a Mac with an Intel processor, or an Intel Python (x86_64), expected"),
}


@pytest.mark.parametrize("arguments", [["doctor"], ["distill", "-d", "cats"], ["--help"], []], ids=" ".join)
@pytest.mark.parametrize(("machine", "says"), FOREIGN.values(), ids=FOREIGN)
def test_a_machine_without_mlx_is_refused_in_one_line(machine: str, says: str, arguments: list[str]) -> None:
    done = python(machine + COMMAND.format(arguments=arguments))
    [line] = done.stderr.splitlines()
    assert (done.returncode, done.stdout) == (4, "")
    assert line.startswith(says)


@pytest.mark.parametrize(("machine", "says"), FOREIGN.values(), ids=FOREIGN)
def test_a_machine_without_mlx_imports_the_package_and_is_told_on_first_use(machine: str, says: str) -> None:
    code = (
        "import true_kd\n"
        "from true_kd.errors import EnvironmentProblem\n"
        "try: true_kd.TrueKnowledgeDistiller\n"
        "except EnvironmentProblem as error: print(error)"
    )
    done = python(machine + code)
    assert done.stderr == ""
    assert done.stdout.startswith(says)


@pytest.mark.parametrize(("platform_name", "machine"), [("linux", "x86_64"), ("linux", "aarch64"), ("darwin", "arm64")])
def test_machines_that_mlx_has_a_build_for_are_not_refused(
    platform_name: str, machine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "platform", platform_name)
    monkeypatch.setattr(platform, "machine", lambda: machine)
    require_platform()
