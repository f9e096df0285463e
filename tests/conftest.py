"""One seed for every test, no way out to the network, and no deprecated call."""

from __future__ import annotations

import logging
import re
import socket
import sys
from collections.abc import Iterator
from typing import Any

import jaxtyping
import pytest
import torch


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    connect = socket.socket.connect

    def guarded(self: socket.socket, address: object) -> None:
        host = address[0] if isinstance(address, tuple) else address
        if self.family in (socket.AF_INET, socket.AF_INET6) and host not in (
            "127.0.0.1",
            "::1",
            "localhost",
        ):
            raise AssertionError(f"a test reached for the network: {address}")
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", guarded)


# Libraries that log a deprecation as often as they warn of it. transformers' loggers
# do not propagate, so each is listened to itself.
_LIBRARIES = ("transformers", "timm", "torch", "torchvision", "accelerate", "datasets")
_DEPRECATED = re.compile(
    r"deprecat|(will|would|to) be removed|(was|been|is) removed (in|from|since)", re.I
)


class _Deprecations(logging.Handler):
    """Keeps what libraries log of things that will go."""

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        if record.levelno >= logging.WARNING and _DEPRECATED.search(message):
            self.said.append(f"{record.name}: {message}")


@pytest.fixture(autouse=True)
def deprecations() -> Iterator[_Deprecations]:
    """Fail a test in which a library logs that something it did is deprecated.

    Warnings are errors by pytest's configuration; what is logged is not a warning.
    """
    handler = _Deprecations()
    for name in _LIBRARIES:
        logging.getLogger(name).addHandler(handler)
    # Said once a process, it would be missed in all tests but the first.
    for once in _said_once():
        once.cache_clear()
    yield handler
    for name in _LIBRARIES:
        logging.getLogger(name).removeHandler(handler)
    if handler.said:
        pytest.fail("a library logs a deprecation: " + "; ".join(handler.said))


def _said_once() -> Iterator[Any]:
    """Find transformers' loggers' memory of what was said, where it is loaded."""
    module = sys.modules.get("transformers.utils.logging")
    for name in ("warning_once", "info_once"):
        once = getattr(module, name, None)
        if hasattr(once, "cache_clear"):
            yield once


@pytest.fixture
def untyped() -> Iterator[None]:
    """Let values of a wrong type through to the package's own checks.

    Under test every call is type-checked by jaxtyping; users do not have that.
    """
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
