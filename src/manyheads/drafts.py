"""Files that appear whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["draft_of"]


@contextmanager
def draft_of(target: Path) -> Iterator[Path]:
    """Give an empty file beside the target; it takes the target's place at the end.

    If the block ends with an error the draft is removed and the target is as it was.
    The draft is there before the block begins, so that a folder that cannot be written
    to is known before any work is done. It keeps the target's ending.

    Raises:
        OSError: The folder or the target cannot be written.
    """
    handle, name = tempfile.mkstemp(
        prefix=f".{target.stem}-", suffix=target.suffix, dir=target.parent
    )
    os.close(handle)
    draft = Path(name)
    try:
        yield draft
        draft.chmod(0o666 & ~_umask())
        draft.replace(target)
    finally:
        draft.unlink(missing_ok=True)


def _umask() -> int:
    """Read the mask that ordinary files get; a temporary file is for its owner only."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
