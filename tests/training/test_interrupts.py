"""Signals, in real processes: heard at once, obeyed between steps, and a second one ends it."""

import signal
import subprocess
import sys
import time

import pytest

from research.training.interrupts import SAME_REQUEST_SECONDS

# Stands in for the loop; ``hold`` blocks in C as a compilation does, where Python runs no handler.
PROGRAM = """
import ctypes, sys, time
from research.training.interrupts import Interrupts
hold = ctypes.CDLL(None).usleep
with Interrupts(lambda line: print(line, flush=True), "Resume with: again") as interrupts:
    interrupts.nothing_to_save = sys.argv[1] == "starting"
    print("ready", flush=True)
    end = time.monotonic() + 30
    for _ in range(30 if sys.argv[1] != "between" else 0):
        hold(900_000)
    while interrupts.received is None and time.monotonic() < end:
        time.sleep(0.01)
    print("saved", flush=True)
sys.exit(interrupts.exit_code)
"""


def _start(phase):
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, phase], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_lets_the_step_finish_and_save(number):
    process = _start("between")
    process.send_signal(number)
    process.send_signal(number)  # delivered twice within milliseconds, as `timeout` does: one request
    out, _ = process.communicate(timeout=20)
    assert process.returncode == 128 + number
    assert f"{number.name}: finishing this step" in out and out.endswith("saved\n")


def test_a_second_signal_quits_at_once_even_inside_a_compilation():
    process = _start("compiling")
    process.send_signal(signal.SIGTERM)
    assert "finishing this step" in process.stdout.readline()
    time.sleep(SAME_REQUEST_SECONDS + 0.1)
    sent = time.monotonic()
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=20)
    assert time.monotonic() - sent < 10
    assert process.returncode == 128 + signal.SIGTERM
    assert "quitting without saving" in err and "Resume with: again" in err


def test_before_there_is_anything_to_save_the_first_signal_quits():
    process = _start("starting")
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 130
    assert "before there was anything new to save" in err


def test_handlers_are_put_back():
    from research.training.interrupts import Interrupts

    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with Interrupts() as interrupts:
        assert interrupts.exit_code == 0
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
