"""Ctrl-C and SIGTERM, held back until a run stands where it can be left."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any, NoReturn

__all__ = ["Interrupts", "Stopped"]


class Stopped(BaseException):
    """A run was asked to stop, and stands where it can be left.

    Args:
        number: The signal that asked.
    """

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number

    def leave(self) -> NoReturn:
        """Do now what the signal asked for.

        Raises:
            KeyboardInterrupt: It was Ctrl-C.
            SystemExit: It was SIGTERM; the status is the shell's 128 + 15.
        """
        if self.number == signal.SIGINT:
            raise KeyboardInterrupt from None
        raise SystemExit(128 + self.number) from None


class Interrupts:
    """Notes the first SIGINT or SIGTERM; a second one acts at once.

    Only the main thread can hold signals back; elsewhere this does nothing.

    Args:
        active: Whether to hold anything back; pointless where nothing can be saved.
    """

    def __init__(self, *, active: bool) -> None:
        in_main = threading.current_thread() is threading.main_thread()
        self._active = active and in_main
        self._before: dict[int, Any] = {}
        self.received = 0

    def __enter__(self) -> Interrupts:
        if self._active:
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._restore()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            # None stands for a handler that was not set from Python.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._before.clear()
