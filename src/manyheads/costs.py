"""What a model costs for one image: multiply-adds and parameters, per block and in all.

FLOPs here are multiply-adds counted 1, as in the papers; `multiply_add=2` doubles
them. `manyheads.ledger` says what is counted and how.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from torch import nn

from manyheads.errors import InvalidOption
from manyheads.hosts import find_host
from manyheads.ledger import BlockCost, Ledger, keep_books

__all__ = ["Cost", "cost"]


@dataclass(frozen=True, kw_only=True)
class Cost:
    """A model's cost for one image.

    Attributes:
        ledger: The books, in multiply-adds.
        multiply_add: What one multiply-add counts in `flops`, 1 or 2.
    """

    ledger: Ledger
    multiply_add: Literal[1, 2]

    @property
    def flops(self) -> int:
        """All counted work for one image."""
        return self.multiply_add * self.ledger.total

    @property
    def num_parameters(self) -> int:
        """All parameters."""
        return self.ledger.num_parameters

    @property
    def attention_share(self) -> float:
        """Share of all matrix products spent on attention matrices."""
        return self.ledger.attention_share

    @property
    def blocks(self) -> tuple[BlockCost, ...]:
        """The convertible blocks, in multiply-adds."""
        return self.ledger.blocks

    def to_json(self) -> dict[str, Any]:
        """Give everything as JSON values."""
        return {
            "image_size": list(self.ledger.image_size),
            "fed_size": list(self.ledger.fed_size),
            "multiply_add": self.multiply_add,
            "flops": self.flops,
            "parameters": self.num_parameters,
            "attention_share": self.attention_share,
            "rest": self.ledger.rest,
            "normalisation": self.ledger.normalisation,
            "blocks": [asdict(block) for block in self.blocks],
        }

    def __str__(self) -> str:
        height, width = self.ledger.image_size
        fed = self.ledger.fed_size
        padded = f", padded to {fed[0]}x{fed[1]}" if fed != (height, width) else ""
        return (
            f"{self.flops / 1e9:.2f} GFLOPs (multiply-add = {self.multiply_add}), "
            f"{self.num_parameters / 1e6:.2f} M parameters, "
            f"{100 * self.attention_share:.3g} % of the matrix products in attention "
            f"matrices, for one image of {height}x{width}{padded}"
        )


def cost(
    model: nn.Module,
    *,
    image_size: tuple[int, int] | None = None,
    multiply_add: Literal[1, 2] = 1,
) -> Cost:
    """Count what one image costs, at any size, without running on a device.

    Args:
        model: A hosted model, converted or not; it is not touched.
        image_size: Height and width in pixels; None for the native size. A size that
            is not a multiple of the patch is padded, and the result says so.
        multiply_add: What one multiply-add counts: 1 as in the papers, or 2.

    Returns:
        Work and parameters per block and in all; printing it gives one sentence.

    Raises:
        UnknownHost: No host knows the model.
        ImageSizeError: The size gives no valid token grid.
        InvalidOption: `multiply_add` is neither 1 nor 2.
    """
    if multiply_add not in (1, 2):
        raise InvalidOption(
            asked=f"cost(multiply_add={multiply_add!r})",
            found="a multiply-add counts 1 or 2",
            fix="Use 1 for the papers' convention, 2 for hardware FLOPs.",
        )
    host, sites = find_host(model)
    ledger = keep_books(model, host, sites, image_size)
    return Cost(ledger=ledger, multiply_add=multiply_add)
