"""What `true-kd doctor` finds: a verdict for everything, what to do where it is not ok, and never a secret."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import jsonschema
import pytest
from conftest import Ended
from packaging.requirements import Requirement
from packaging.version import Version
from pydantic import TypeAdapter

from true_kd import blas
from true_kd.backend import device_name
from true_kd.cli.checking import _show_check
from true_kd.doctor import Check, Diagnosis, trial, verdict_of
from true_kd.doctor.mac import check_mac, judge_power, judge_system, judge_wired, read_power, read_settings
from true_kd.doctor.machine import check_blas, check_device, check_disks, check_files, check_memory, judge_disk
from true_kd.doctor.packages import (
    KNOWN_BAD,
    _requirements,
    find_conflicts,
    find_faults,
    find_two_backends,
    installed,
)
from true_kd.doctor.surroundings import check_hub, check_proxies, host_of
from true_kd.locks import Lock
from true_kd.models import HubAccess

PROJECT = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
FLOORS = {Requirement(text).name: Requirement(text).specifier for text in PROJECT["dependencies"]}


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, without configs."""
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def checks_of(ended: Ended) -> dict[str, dict[str, str]]:
    return {check["name"]: check for check in json.loads(ended.out)["checks"]}


# The command.


def test_a_machine_in_order_is_told_so(cli: Callable[..., Ended], elsewhere: Path) -> None:
    ended = cli("doctor")
    assert (ended.code, ended.err) == (0, "")
    assert "\x1b" not in ended.out
    *checks, last = ended.out.splitlines()
    assert re.fullmatch(r"0 problems, \d warnings?\.", last)
    assert all(re.match(r"(ok       |warning  |         )\S", line) for line in checks)
    assert list(elsewhere.iterdir()) == [], "something was written"


def test_everything_has_a_name_a_verdict_and_what_was_found(cli: Callable[..., Ended], elsewhere: Path) -> None:
    ended = cli("doctor", "--json")
    report = json.loads(ended.out)
    jsonschema.validate(report, TypeAdapter(Diagnosis).json_schema())
    assert set(report) == {"verdict", "checks"}
    assert {tuple(check) for check in report["checks"]} == {("name", "verdict", "found", "advice")}
    names = set(checks_of(ended))
    assert names >= {"system", "versions", "device", "blas", "memory", "open files", "target cache", "output folder"}
    assert names >= {"hub cache", "hub token", "hub", "matrix product", "pocket model"}
    assert all(check["advice"] for check in report["checks"] if check["verdict"] != "ok")
    assert report["verdict"] == verdict_of(Check(**check) for check in report["checks"])


def test_the_versions_are_there_to_be_pasted(cli: Callable[..., Ended], elsewhere: Path) -> None:
    found = checks_of(cli("doctor", "--json"))["versions"]["found"]
    for package in ("true-kd", "mlx", "mlx-lm", "transformers", "safetensors", "huggingface-hub", "jinja2"):
        assert f"{package} {installed(package)}" in found
    assert f"python {sys.version.split()[0]}" in found


def test_a_problem_is_exit_code_4(cli: Callable[..., Ended], elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "MOST_NATS", 1e-3)
    ended = cli("doctor")
    assert (ended.code, ended.err) == (4, "")
    assert re.search(r"^problem  pocket model: 0\.\d+ nats a token", ended.out, re.M)
    assert ended.out.splitlines()[-1].startswith("1 problem, ")


def test_an_mlx_lm_that_is_an_empty_shell_is_found(tmp_path: Path) -> None:
    (tmp_path / "mlx_lm").mkdir()
    (tmp_path / "mlx_lm" / "__init__.py").touch()
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "COLUMNS": "60", "TRUE_KD_CACHE": str(tmp_path)}
    command = [sys.executable, "-m", "true_kd", "doctor"]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (4, "")
    assert "problem  pocket model: fails (" in done.stdout
    assert "ok       matrix product: right" in done.stdout
    assert max(len(line) for line in done.stdout.splitlines() if "/" not in line) <= 60
    assert "\x1b" not in done.stdout


def test_colours_are_for_terminals(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from rich.console import Console

    check = Check("blas", "warning", "slow", "Do this.")
    monkeypatch.setenv("COLUMNS", "60")
    _show_check(check, Console(force_terminal=True, color_system="256", legacy_windows=False))
    coloured = capsys.readouterr().out
    _show_check(check, None)
    plain = capsys.readouterr().out
    assert plain == "warning  blas: slow\n         Do this.\n"
    assert re.sub(r"\x1b\[[0-9;]*m", "", coloured) == plain
    assert coloured != plain


SECRETS = {
    "HF_TOKEN": "hf_" + "aB3dE5gH7j" * 3,
    "HTTPS_PROXY": "http://anna:pa55word@proxy.example:3128/",
    "http_proxy": "bert:secret99@other.example:8080",
    "WANDB_API_KEY": "0123456789abcdef" * 2,
    "TRUE_KD_SOMETHING": "sk-abcdefghijklmnop1234",
}


def test_no_secret_of_the_environment_or_the_token_file_is_shown(
    cli: Callable[..., Ended], elsewhere: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "token").write_text("hf_" + "zY8xW6vU4t" * 3)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "token"))
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    with_token = cli("doctor", "--json")
    monkeypatch.delenv("HF_TOKEN")
    from_file = cli("doctor", "--json")
    plain = cli("doctor")
    shown = with_token.out + from_file.out + plain.out + plain.err
    for word in ("aB3dE5", "anna", "pa55word", "bert", "secret99", "0123456789abcdef", "sk-", "zY8xW6"):
        assert word not in shown, word
    assert checks_of(with_token)["hub token"]["found"] == "there, from HF_TOKEN; it is not shown"
    assert checks_of(from_file)["hub token"]["found"] == "there, from the token file; it is not shown"
    assert "HTTPS_PROXY is proxy.example:3128" in shown
    assert "HTTP_PROXY is other.example:8080" in shown


def test_the_folders_are_those_of_the_config_that_is_here(cli: Callable[..., Ended], elsewhere: Path) -> None:
    (elsewhere / "configs").mkdir()
    (elsewhere / "configs" / "base.yaml").write_text("out: here/adapters\ncache: there\n")
    found = checks_of(cli("doctor", "--json"))
    assert found["output folder"]["found"].startswith("here/adapters, ")
    assert found["target cache"]["found"].startswith("there, ")
    (elsewhere / "configs" / "base.yaml").write_text("otu: x\nbogus: 1\n")
    found = checks_of(cli("doctor", "--json"))
    assert (found["config"]["verdict"], found["config"]["found"]) == ("warning", "configs/base.yaml has 2 problems")


def test_who_holds_the_output_folder_is_named(cli: Callable[..., Ended], elsewhere: Path) -> None:
    lock = Lock(elsewhere / "adapters_kd" / ".lock")
    lock.path.parent.mkdir()
    assert lock.acquire()
    try:
        found = checks_of(cli("doctor", "--json"))["output folder lock"]
        assert found["verdict"] == "warning"
        assert f"process {os.getpid()}" in found["found"]
    finally:
        lock.release()
    lock.path.touch()
    assert "output folder lock" not in checks_of(cli("doctor", "--json")), "nobody holds it any more"


# Versions.


@pytest.mark.parametrize("fault", KNOWN_BAD, ids=lambda fault: f"{fault.package}-{fault.before}")
def test_a_version_that_is_known_to_be_bad_is_a_problem_and_the_next_is_not(fault) -> None:
    def read(number: str) -> Callable[[str], str | None]:
        return lambda name: number if name == fault.package else None

    evidence = [check.found for check in find_faults(read("0.1.0"))]
    assert any(fault.evidence in found for found in evidence)
    assert all(check.verdict == "problem" for check in find_faults(read("0.1.0")))
    assert not any(fault.evidence in check.found for check in find_faults(read(fault.before)))
    assert any(fault.evidence in check.found for check in find_faults(read(f"{fault.before}rc1")))
    assert list(find_faults(read("no version"))) == []


@pytest.mark.parametrize("fault", KNOWN_BAD, ids=lambda fault: f"{fault.package}-{fault.before}")
def test_what_is_known_to_be_bad_is_not_what_pip_would_install(fault) -> None:
    [floor] = FLOORS[fault.package]
    assert Version(floor.version) >= Version(fault.before)
    assert re.fullmatch(r"CVE-\d{4}-\d{4,}", fault.evidence)


def test_what_is_installed_here_is_as_its_packages_want_it() -> None:
    assert list(find_faults(installed)) == []
    assert list(find_conflicts(installed, _requirements())) == []
    assert set(_requirements()) == {"true-kd", "mlx", "mlx-lm", "transformers"}


def test_a_package_that_another_does_not_take_is_named_with_what_it_needs() -> None:
    there = {"mlx": "0.32.4", "mlx-lm": "0.31.3", "mlx-cpu": "0.32.3", "true-kd": "0.1.0"}
    wanted = {
        "true-kd": ["mlx>=0.32.2", "mlx-lm>=0.32.2", "absent>=1", "pytest>=99; extra == 'test'"],
        "mlx": ["mlx-cpu==0.32.4; platform_system == 'Linux' and extra == 'cpu'", "not a requirement!"],
    }
    found = {check.name: check for check in find_conflicts(there.get, wanted)}
    assert set(found) == ({"mlx-lm", "mlx-cpu"} if sys.platform == "linux" else {"mlx-lm"})
    assert found["mlx-lm"].found == "0.31.3, and true-kd 0.1.0 needs >=0.32.2"
    assert found["mlx-lm"].advice == "Run pip install 'mlx-lm>=0.32.2'."


def test_two_backends_in_one_place_are_a_problem() -> None:
    both = {"mlx-cpu": "0.32.4", "mlx-cuda-13": "0.32.4"}
    [check] = find_two_backends(both.get)
    assert check.verdict == "problem"
    assert "mlx-cuda-13" in check.advice
    for name in both:
        assert list(find_two_backends({name: "0.32.4"}.get)) == []


# The machine.


@pytest.mark.skipif(device_name() != "cpu", reason="on a GPU there is nothing to say")
def test_a_gpu_that_is_not_used_is_told(tmp_path: Path) -> None:
    assert check_device(tmp_path / "nothing").verdict == "ok"
    (tmp_path / "version").touch()
    check = check_device(tmp_path / "version")
    assert check.verdict == "warning"
    assert "true-kd[cuda13]" in check.advice


@pytest.mark.skipif(device_name() != "cpu" or sys.platform != "linux", reason="the slow BLAS is the Linux wheel's")
@pytest.mark.parametrize(
    ("used", "verdict", "advice"),
    [
        (blas.Blas("libopenblas.so.0", "found and loaded"), "ok", ""),
        (blas.Blas(None, "none installed; `apt install x` makes"), "warning", "apt install libopenblas0-pthread"),
        (blas.Blas(None, "TRUE_KD_BLAS=off"), "warning", "Unset TRUE_KD_BLAS"),
        (blas.Blas(None, "mlx was imported before true_kd, too late"), "warning", "Import true_kd before mlx."),
    ],
)
def test_a_slow_blas_comes_with_the_way_to_a_fast_one(used: blas.Blas, verdict: str, advice: str) -> None:
    check = check_blas(used)
    assert check.verdict == verdict
    assert advice in check.advice


def test_little_memory_is_a_warning() -> None:
    assert check_memory(16 * 10**9, 12 * 10**9).verdict == "ok"
    check = check_memory(4 * 10**9, 3 * 10**9)
    assert (check.verdict, check.found.split(",")[0]) == ("warning", "4.0 GB")


@pytest.mark.parametrize(
    ("free", "writable", "verdict"),
    [(10**11, True, "ok"), (10**9, True, "warning"), (10**8, True, "problem"), (10**11, False, "problem")],
)
def test_a_disk_is_judged_by_its_room(free: int, writable: bool, verdict: str) -> None:
    check = judge_disk("cache", Path("cache"), free, writable)
    assert check.verdict == verdict
    assert bool(check.advice) == (verdict != "ok")


def test_a_folder_below_a_file_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    [good, bad] = check_disks({"a": tmp_path / "new" / "folder", "b": tmp_path / "file" / "below"})
    assert (good.verdict, bad.verdict) == ("ok", "problem")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("limits", "verdict", "advice"),
    [
        ((1024, 1048576), "ok", ""),
        ((128, 1048576), "warning", "ulimit -n 4096"),
        ((1024, 2048), "warning", "mlx_lm.generate"),
        ((-1, -1), "ok", ""),
    ],
)
def test_limits_on_open_files_are_judged(limits: tuple[int, int], verdict: str, advice: str) -> None:
    check = check_files(limits)
    assert check.verdict == verdict
    assert advice in check.advice


# The hub.


def test_no_token_is_no_fault_and_offline_is_a_warning() -> None:
    online = HubAccess("", Path("hub"), False, "https://user:pw12345@hub.example")
    token, hub = check_hub(online)
    assert (token.verdict, hub.verdict, hub.found) == ("ok", "ok", "hub.example")
    [_, hub] = check_hub(HubAccess("", Path("hub"), True, "https://huggingface.co"))
    assert (hub.verdict, hub.found) == ("warning", "HF_HUB_OFFLINE is set")


@pytest.mark.parametrize(
    ("address", "shown"),
    [
        ("http://proxy.example:3128", "proxy.example:3128"),
        ("http://anna:pw@proxy.example:3128/path?token=abcdefgh", "proxy.example:3128"),
        ("anna:pw@proxy.example", "proxy.example"),
        ("socks5h://[::1]:9050", "::1:9050"),
        ("http://host:notaport", "set, and no address"),
        ("://", "set, and no address"),
        ("", "set, and no address"),
    ],
)
def test_of_an_address_host_and_port_are_shown(address: str, shown: str) -> None:
    assert host_of(address) == shown


def test_proxies_are_found_in_either_spelling() -> None:
    given = {"https_proxy": "http://a.example:1", "ALL_PROXY": "socks5://b.example:2", "NO_PROXY": "x"}
    assert [check.found for check in check_proxies(given)] == [
        "HTTPS_PROXY is a.example:1",
        "ALL_PROXY is b.example:2",
    ]


# A Mac, by text that others have published: nothing of it was run on one.

ON_BATTERY = """Now drawing from 'Battery Power'
 -InternalBattery-0 (id=4653155)\t96%; discharging; 11:07 remaining present: true
"""
ON_MAINS = """Now drawing from 'AC Power'
 -InternalBattery-0 (id=4653155)\t100%; charged; 0:00 remaining present: true
"""
SETTINGS = """System-wide power settings:
Currently in use:
 standby              1
 Sleep On Power Button 1
 hibernatefile        /var/vm/sleepimage
 powernap             1
 networkoversleep     0
 disksleep            10
 sleep                1 (sleep prevented by sharingd)
 lowpowermode         {low}
 displaysleep         28
"""


def test_pmset_says_where_power_comes_from() -> None:
    assert read_power(ON_BATTERY) == "Battery Power"
    assert read_power(ON_MAINS) == "AC Power"
    assert read_power("") is None


def test_pmset_says_when_the_mac_sleeps() -> None:
    found = read_settings(SETTINGS.format(low=0))
    assert found["sleep"] == "1"
    assert found["sleep prevented by"] == "sharingd"
    assert found["displaysleep"] == "28"
    assert found["Sleep On Power Button"] == "1"
    assert found["hibernatefile"] == "/var/vm/sleepimage"
    assert "System-wide power settings:" not in found
    assert read_settings("no settings here") == {}


@pytest.mark.parametrize(
    ("battery", "settings", "warnings"),
    [
        (ON_MAINS, SETTINGS.format(low=0), []),
        (ON_BATTERY, SETTINGS.format(low=1), ["power", "low power mode"]),
        (ON_MAINS, SETTINGS.format(low=0).replace(" (sleep prevented by sharingd)", ""), ["sleep"]),
        (ON_MAINS, SETTINGS.format(low=0).replace("1 (sleep prevented by sharingd)", "0"), []),
        ("", "", []),
    ],
    ids=["mains", "battery", "sleeps", "never sleeps", "pmset is silent"],
)
def test_power_and_sleep_are_judged(battery: str, settings: str, warnings: list[str]) -> None:
    checks = list(judge_power(battery, read_settings(settings)))
    assert [check.name for check in checks if check.verdict == "warning"] == warnings
    assert all(check.advice for check in checks if check.verdict == "warning")


@pytest.mark.parametrize(
    ("text", "verdict"), [("0\n", "ok"), ("20480\n", "ok"), ("32000\n", "warning"), ("", "ok"), ("unknown oid", "ok")]
)
def test_nearly_all_memory_wired_is_a_warning(text: str, verdict: str) -> None:
    assert judge_wired(text, 32 * 2**30).verdict == verdict


@pytest.mark.parametrize(("version", "verdict"), [("13.6.1", "problem"), ("14.0", "ok"), ("26.1", "ok"), ("", "ok")])
def test_a_macos_without_wheels_is_a_problem(version: str, verdict: str) -> None:
    assert judge_system(version).verdict == verdict


@pytest.fixture
def as_on_a_mac(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Has the checks of a Mac run here; what they call is looked for in the folder that is returned."""
    (tmp_path / "bin").mkdir()
    monkeypatch.setattr("true_kd.doctor.mac.sys.platform", "darwin")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    return tmp_path / "bin"


def test_where_pmset_and_sysctl_say_nothing_the_checks_of_a_mac_complain_of_nothing(as_on_a_mac: Path) -> None:
    assert {check.name: check.verdict for check in check_mac()} == {
        "macos": "ok",
        "power": "ok",
        "gpu memory": "ok",
        "display": "ok",
    }


def test_what_pmset_and_sysctl_print_is_read_and_judged(as_on_a_mac: Path) -> None:
    settings = SETTINGS.format(low=1).replace(" (sleep prevented by sharingd)", "")
    printed = {
        "pmset": f'[ "$2" = batt ] && /bin/echo "{ON_BATTERY}" || /bin/echo "{settings}"',
        "sysctl": "echo 999999999",
    }
    for name, line in printed.items():
        (as_on_a_mac / name).write_text(f"#!/bin/sh\n{line}\n")
        (as_on_a_mac / name).chmod(0o755)
    warnings = [check.name for check in check_mac() if check.verdict == "warning"]
    assert warnings == ["power", "low power mode", "sleep", "gpu memory"]


@pytest.mark.skipif(sys.platform == "darwin", reason="a Mac has them")
def test_elsewhere_there_are_no_checks_of_a_mac() -> None:
    assert list(check_mac()) == []
