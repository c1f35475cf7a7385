"""A signal lets the current step of a training end, so that its work can be saved."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from ldm.training.distributed import ranks

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(KeyboardInterrupt):
    """A signal stopped the training. The text names the step and the folder with the checkpoint."""


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Yield a list that receives the first of STOP_SIGNALS; the handlers from before then return.

    Of several processes, each one receives all signals until the end of the block.
    The list stays empty outside the main thread. A signal that was ignored before stays ignored.
    """
    received: list[int] = []
    before: dict[signal.Signals, Any] = {}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def receive(number: int, frame: FrameType | None) -> None:
        received.append(number)
        if ranks() == 1:  # torchrun sends SIGTERM after the SIGINT of Ctrl-C, and SIGKILL half a minute later
            restore()

    if threading.current_thread() is threading.main_thread():
        for number in STOP_SIGNALS:
            if signal.getsignal(number) not in (signal.SIG_IGN, None):  # None: the handler is not Python's
                before[number] = signal.signal(number, receive)
    try:
        yield received
    finally:
        restore()
