"""A first signal is heard where nothing is lost, a second ends the process at once, and an ignored one stays so."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

from true_kd import stopping
from true_kd.stopping import Stopped, answer, exit_code

LISTEN = """
import os, signal, sys, time
from true_kd import stopping
from true_kd.stopping import Stopped, answer, uninterrupted

def ask(name):
    os.kill(os.getpid(), getattr(signal, name))

stopping.listen()
try:
{body}
except Stopped as stop:
    print("stopped by", stop.cause, flush=True)
    sys.exit(stop.exit_code)
print("not stopped", flush=True)
"""
"""A process that listens, and does what a test says."""


def run(body: str, *before: str) -> tuple[int, list[str]]:
    """The exit code and the lines of a process that listens; `before` is the command that it is started with."""
    indented = "".join(f"    {line}\n" for line in body.strip().splitlines())
    command = [*before, sys.executable, "-c", LISTEN.format(body=indented)]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=60)
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, done.stdout.splitlines()


@pytest.mark.parametrize(
    ("name", "code", "cause"),
    [("SIGINT", 130, "Ctrl-C"), ("SIGTERM", 143, "SIGTERM"), ("SIGHUP", 129, "the closing of its terminal")],
)
def test_a_first_signal_stops_what_is_going_on(name: str, code: int, cause: str) -> None:
    body = f"print(1, flush=True)\nask({name!r})\ntime.sleep(60)\nprint(2)"
    assert run(body) == (code, ["1", f"stopped by {cause}"])


@pytest.mark.parametrize("first", ["SIGINT", "SIGTERM"])
def test_a_second_signal_ends_the_process_at_once(first: str) -> None:
    body = f"""
try:
    ask({first!r})
finally:
    print("tidying up", flush=True)
    ask("SIGTERM")
    print("tidied up", flush=True)
"""
    assert run(body) == (143, ["tidying up"])


DESTRUCTOR = """
class Asks:
    def __del__(self):
        ask({name!r})
        print("not reached", flush=True)
Asks()
"""


@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143), ("SIGHUP", 129)])
def test_a_signal_that_a_destructor_swallowed_is_heard_a_moment_later(name: str, code: int) -> None:
    body = DESTRUCTOR.format(name=name) + 'print("went on", flush=True)\ntime.sleep(60)\nprint("never stopped")'
    found, lines = run(body)
    assert (found, lines[0], len(lines)) == (code, "went on", 2)
    assert lines[1].startswith("stopped by")


def test_a_signal_that_a_destructor_swallowed_waits_for_uninterrupted_work() -> None:
    body = (
        DESTRUCTOR.format(name="SIGINT")
        + """
with uninterrupted():
    time.sleep(0.2)
    print("saved", flush=True)
time.sleep(60)
"""
    )
    assert run(body) == (130, ["saved", "stopped by Ctrl-C"])


@pytest.mark.parametrize("is_stopped", [False, True])
def test_what_a_stop_left_half_made_is_not_reported(is_stopped: bool) -> None:
    body = """
class Half:
    def __del__(self):
        self.never_made
half = Half()
"""
    body += 'ask("SIGINT")' if is_stopped else "del half"
    indented = "".join(f"    {line}\n" for line in body.strip().splitlines())
    done = subprocess.run([sys.executable, "-c", LISTEN.format(body=indented)], capture_output=True, text=True)
    assert ("AttributeError" in done.stderr) is not is_stopped
    assert done.returncode == (130 if is_stopped else 0)


@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143), ("SIGHUP", 129)])
def test_uninterrupted_work_is_done_before_a_signal_is_heard(name: str, code: int) -> None:
    body = f"""
with uninterrupted():
    ask({name!r})
    print("saved", flush=True)
print("heard too late", flush=True)
"""
    found, lines = run(body)
    assert (found, lines[0], len(lines)) == (code, "saved", 2)
    assert lines[1].startswith("stopped by")


def test_a_second_signal_ends_uninterrupted_work_at_once() -> None:
    body = """
with uninterrupted():
    ask("SIGINT")
    print("saving", flush=True)
    ask("SIGTERM")
    print("saved", flush=True)
"""
    assert run(body) == (143, ["saving"])


def test_a_second_signal_ends_uninterrupted_work_that_began_after_the_first() -> None:
    """A loop that was stopped saves its checkpoint: whoever presses Ctrl-C again does not wait for that."""
    body = """
try:
    ask("SIGINT")
except Stopped:
    with uninterrupted():
        print("saving", flush=True)
        ask("SIGINT")
        print("saved", flush=True)
    print("heard", flush=True)
"""
    assert run(body) == (130, ["saving"])


def test_work_that_no_signal_comes_to_is_left_as_it_is() -> None:
    body = """
handlers = [signal.getsignal(number) for number in stopping.SIGNALS]
with uninterrupted():
    with uninterrupted():
        print("saved", flush=True)
assert [signal.getsignal(number) for number in stopping.SIGNALS] == handlers
assert stopping.first() is None
"""
    assert run(body) == (0, ["saved", "not stopped"])


def test_work_within_uninterrupted_work_is_not_heard_in_between() -> None:
    body = """
with uninterrupted():
    with uninterrupted():
        ask("SIGTERM")
    print("saved", flush=True)
print("heard too late", flush=True)
"""
    assert run(body) == (143, ["saved", "stopped by SIGTERM"])


def test_an_ignored_signal_stays_ignored() -> None:
    body = """
ask("SIGHUP")
with uninterrupted():
    ask("SIGHUP")
print("goes on", flush=True)
ask("SIGTERM")
"""
    assert run(body, "nohup") == (143, ["goes on", "stopped by SIGTERM"])


def test_a_reply_that_ctrl_c_was_to_end_ends_and_the_next_ctrl_c_is_a_first_one_again() -> None:
    body = """
for _ in range(3):
    try:
        ask("SIGINT")
    except KeyboardInterrupt as interrupt:
        answer(interrupt)
        print("answered", flush=True)
ask("SIGTERM")
"""
    assert run(body) == (143, ["answered"] * 3 + ["stopped by SIGTERM"])


def test_only_ctrl_c_is_answered() -> None:
    body = """
try:
    ask("SIGTERM")
except KeyboardInterrupt as interrupt:
    answer(interrupt)
print("goes on", flush=True)
"""
    assert run(body) == (143, ["stopped by SIGTERM"])


def test_a_plain_keyboard_interrupt_is_answered_as_well() -> None:
    answer(KeyboardInterrupt())
    assert stopping.first() is None


def test_a_thread_that_hears_no_signals_is_not_in_the_way() -> None:
    body = """
import threading
seen = []
def work():
    stopping.listen()
    with uninterrupted():
        seen.append(1)
thread = threading.Thread(target=work)
thread.start()
thread.join()
print(seen, flush=True)
ask("SIGINT")
"""
    assert run(body) == (130, ["[1]", "stopped by Ctrl-C"])


def test_the_first_signal_is_known_where_its_exception_was_turned_into_another() -> None:
    body = """
try:
    ask("SIGTERM")
except KeyboardInterrupt:
    pass
raise stopping.first()
"""
    assert run(body) == (143, ["stopped by SIGTERM"])


@pytest.mark.parametrize("number", stopping.SIGNALS)
def test_the_exit_code_is_that_of_shells(number: signal.Signals) -> None:
    assert Stopped(number).exit_code == exit_code(number) == 128 + number
