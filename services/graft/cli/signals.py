"""How a command that makes something ends: SIGTERM and SIGHUP are heeded like Ctrl-C, so that it can clean up."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def cleaned_up() -> Iterator[None]:
    """Exits with 128 and the signal's number, through every `finally`. One that is ignored, as by nohup, stays so."""
    if threading.current_thread() is not threading.main_thread():
        yield  # signals are for the main thread alone
        return
    heeded = [each for each in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(each) is not signal.SIG_IGN]

    def leave(number: int, _frame: FrameType | None) -> None:
        for each in heeded:
            signal.signal(each, signal.SIG_IGN)  # a second one would cut the cleaning short
        raise SystemExit(128 + number)

    before = [signal.signal(each, leave) for each in heeded]
    try:
        yield
    finally:
        for each, handler in zip(heeded, before, strict=True):
            signal.signal(each, handler)
