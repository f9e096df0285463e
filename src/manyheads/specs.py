"""What a spec is: a frozen, keyword-only dataclass of JSON values that shows itself."""

from __future__ import annotations

from dataclasses import dataclass, fields

__all__ = ["Spec"]


@dataclass(frozen=True, kw_only=True, repr=False)
class Spec:
    """What a part of a block becomes; immutable, comparable, JSON-able.

    Subclasses are frozen dataclasses whose fields are all JSON values with defaults.
    They check their options on construction, so that a traceback points at the line
    that wrote the bad value.
    """

    def __repr__(self) -> str:
        """Show the shortest call that makes it: defaults are left out."""
        options = [
            f"{f.name}={getattr(self, f.name)!r}"
            for f in fields(self)
            if getattr(self, f.name) != f.default
        ]
        return f"{type(self).__name__}({', '.join(options)})"
