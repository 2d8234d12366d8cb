"""Stop politely: SIGINT and SIGTERM ask the loop to finish its step and save; a second one ends the process at once."""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable

SIGNALS = (signal.SIGINT, signal.SIGTERM)
# `timeout`, `uv run` and container runtimes deliver one request twice within milliseconds: to the process and its group.
SAME_REQUEST_SECONDS = 0.5


class Interrupts:
    """Context manager that turns the first SIGINT or SIGTERM into ``received`` and obeys the second at once.

    Python runs its own signal handlers only between bytecodes, so a compilation or a blocking wait would swallow the
    signal for minutes. A thread that reads ``signal.set_wakeup_fd`` hears it immediately, whatever the main thread does.

    While ``nothing_to_save`` is true (start-up, loading, the first compilation) the first signal already exits, since
    there is nothing that saving would keep. Exit codes are 128 + the signal's number. Main thread only.
    """

    def __init__(self, say: Callable[[str], None] = print, resume_line: str = ""):
        self.received: int | None = None
        self.nothing_to_save = True
        self.resume_line = resume_line
        self._say = say
        self._first_at = 0.0

    @property
    def exit_code(self) -> int:
        return 128 + self.received if self.received else 0

    def __enter__(self):
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        self._old_handlers = {number: signal.signal(number, lambda *_: None) for number in SIGNALS}
        self._old_wakeup = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._listen, name="interrupts", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_):
        signal.set_wakeup_fd(self._old_wakeup)
        for number, handler in self._old_handlers.items():
            signal.signal(number, handler)
        os.close(self._write)
        self._thread.join()
        os.close(self._read)

    def _listen(self):
        while data := os.read(self._read, 64):
            for number in data:
                if number in SIGNALS:
                    self._hear(number)

    def _hear(self, number: int):
        name = signal.Signals(number).name
        if self.received is None:
            if self.nothing_to_save:
                self._quit(number, f"{name}: stopped before there was anything new to save. {self.resume_line}")
            # Said before the loop can know of it, so that what the loop then prints comes after this line.
            self._say(f"{name}: finishing this step, then saving (once more to quit at once)")
            self.received, self._first_at = number, time.monotonic()
        elif time.monotonic() - self._first_at > SAME_REQUEST_SECONDS:
            self._quit(self.received, f"{name} again: quitting without saving. {self.resume_line}")

    def _quit(self, number: int, line: str):
        sys.stdout.flush()
        print(line.rstrip(), file=sys.stderr, flush=True)
        os._exit(128 + number)
