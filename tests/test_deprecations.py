"""What a library says will go, in a warning or in its log, fails the test."""

from __future__ import annotations

import logging
import warnings
from typing import Any

import pytest

REAL = [
    "The `head_mask` argument is deprecated and will be removed in v5.1",
    "`use_fast` is to be removed in the next release.",
    "This option was removed in 5.0; it does nothing.",
]


def test_a_warning_is_an_error() -> None:
    with pytest.raises(FutureWarning):
        warnings.warn("it will go", FutureWarning, stacklevel=1)


@pytest.mark.parametrize("name", ["transformers.models.vit", "timm.layers", "datasets"])
@pytest.mark.parametrize("message", REAL)
def test_a_logged_deprecation_is_noticed(
    name: str, message: str, deprecations: Any
) -> None:
    logging.getLogger(name).warning(message)
    assert deprecations.said == [f"{name}: {message}"]
    deprecations.said.clear()


@pytest.mark.parametrize("time", ["first", "second"])
def test_what_is_said_once_a_process_is_noticed_every_time(
    time: str, deprecations: Any
) -> None:
    transformers = pytest.importorskip("transformers")
    logger = transformers.utils.logging.get_logger("transformers.models.clip")
    logger.warning_once("`output_attentions` is deprecated.")
    assert len(deprecations.said) == 1, time
    deprecations.said.clear()


def test_other_messages_pass(deprecations: Any) -> None:
    logging.getLogger("timm").warning("Removing the classifier of the checkpoint.")
    logging.getLogger("transformers").warning("Some weights were not initialised.")
    assert deprecations.said == []
