"""Chooses which heads stay real and whose map each other head starts from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = [
    "HeadChoice",
    "choose_heads",
    "group_by_served",
    "inverse_order",
    "join_heads",
    "map_similarity",
    "served_in_order",
    "take_heads",
]


@dataclass(frozen=True, kw_only=True)
class HeadChoice:
    """The real heads of one layer, and the partner of every hallucinated one.

    Attributes:
        block: Block number.
        path: The attention layer.
        real: The host's numbers of the heads that stay real.
        hallucinated: The host's numbers of the others.
        partner: For each hallucinated head, the host's number of its real one.
        similarity: For each hallucinated head, how alike its map is to its partner's:
            the mean cosine over the calibration images, 1 for equal maps.
        first_half: The mean of what `similarity` would be without a choice: the first
            half real, each other head paired with the one half the heads before it.
    """

    block: int
    path: str
    real: tuple[int, ...]
    hallucinated: tuple[int, ...]
    partner: tuple[int, ...]
    similarity: tuple[float, ...]
    first_half: float

    @property
    def order(self) -> tuple[int, ...]:
        """The host's heads in the order that puts the real ones first."""
        return self.real + self.hallucinated

    @property
    def pairing(self) -> tuple[int, ...]:
        """Each partner as its place among the real heads."""
        return tuple(self.real.index(head) for head in self.partner)

    @property
    def mean(self) -> float:
        """Mean similarity of hallucinated heads to their partners."""
        return sum(self.similarity) / len(self.similarity)

    def __str__(self) -> str:
        pairs = zip(self.hallucinated, self.partner, self.similarity, strict=True)
        listed = ", ".join(f"{h} from {p} ({s:.2f})" for h, p, s in pairs)
        return (
            f"{self.block} {self.path}: heads {listed}; mean similarity "
            f"{self.mean:.2f}, first half {self.first_half:.2f}"
        )

    def to_json(self) -> dict[str, Any]:
        """Give everything as JSON values."""
        return {
            "block": self.block,
            "path": self.path,
            "real": list(self.real),
            "hallucinated": list(self.hallucinated),
            "partner": list(self.partner),
            "similarity": list(self.similarity),
            "mean": self.mean,
            "first_half": self.first_half,
        }


def map_similarity(maps: Float[Tensor, "B H N S"]) -> Float[Tensor, "B H H"]:
    """Compare every two heads of a layer by the cosine of their maps, per image."""
    flat = torch.nn.functional.normalize(maps.flatten(2), dim=-1)
    return flat @ flat.mT


def choose_heads(
    similarity: Float[Tensor, "H H"], *, block: int, path: str
) -> HeadChoice:
    """Pick the half of the heads that stands in best for the other half.

    Every head left out takes the most similar real one; several may share it. The set
    of real heads starts as the first half and changes one head at a time, the best
    exchange first, until none raises the summed similarity.

    Cost: O(H^4) at worst, for a number of heads in the tens.
    """
    count = len(similarity)
    half = -(-count // 2)
    real, others = list(range(half)), list(range(half, count))
    gained = _gain(similarity, real, others)
    while True:
        exchanges = [(i, j) for i in range(half) for j in range(len(others))]
        gains = [_gain(similarity, *_swapped(real, others, *e)) for e in exchanges]
        best = max(range(len(gains)), key=gains.__getitem__)
        if gains[best] <= gained + 1e-9:
            break
        gained = gains[best]
        real, others = _swapped(real, others, *exchanges[best])
    found = {
        h: max(sorted(real), key=lambda r: float(similarity[h, r])) for h in others
    }
    served = sorted(real, key=lambda r: (-list(found.values()).count(r), r))
    derived = sorted(others, key=lambda h: (served.index(found[h]), h))
    apart = [float(similarity[head, head - half]) for head in range(half, count)]
    return HeadChoice(
        block=block,
        path=path,
        real=tuple(served),
        hallucinated=tuple(derived),
        partner=tuple(found[h] for h in derived),
        similarity=tuple(float(similarity[h, found[h]]) for h in derived),
        first_half=sum(apart) / len(apart),
    )


def _gain(similarity: Tensor, real: list[int], others: list[int]) -> float:
    return float(similarity[others][:, real].max(dim=1).values.sum())


def _swapped(
    real: list[int], others: list[int], i: int, j: int
) -> tuple[list[int], list[int]]:
    first, second = list(real), list(others)
    first[i], second[j] = second[j], first[i]
    return first, second


def take_heads(x: Tensor, heads: Sequence[int]) -> Tensor:
    """Pick heads along axis 2; a view where they follow each other."""
    first = heads[0] if heads else 0
    if list(heads) == list(range(first, first + len(heads))):
        return x.narrow(2, first, len(heads))
    return torch.stack([x[:, :, head] for head in heads], dim=2)


def join_heads(parts: list[Tensor]) -> Tensor:
    """Put heads of several tensors side by side on axis 2; one comes back as it is."""
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


def inverse_order(order: Sequence[int]) -> list[int]:
    """Give the order that undoes another."""
    return sorted(range(len(order)), key=order.__getitem__)


def group_by_served(
    pairing: Sequence[int], num_real: int
) -> list[tuple[list[int], list[int]]]:
    """Group real heads by how many hallucinated ones they serve, with those."""
    served: list[list[int]] = [[] for _ in range(num_real)]
    for derived, real in enumerate(pairing):
        served[real].append(derived)
    groups: dict[int, tuple[list[int], list[int]]] = {}
    for real, lanes in enumerate(served):
        heads, beside = groups.setdefault(len(lanes), ([], []))
        heads.append(real)
        beside += lanes
    return list(groups.values())


def served_in_order(pairing: Sequence[int], num_real: int) -> tuple[int, ...] | None:
    """Count the hallucinated heads of each real one; None if they are out of order.

    In order, the first real head serves the first of them, as many as it serves, and
    so on. Conversion puts heads in such an order.
    """
    if list(pairing) != sorted(pairing):
        return None
    return tuple(list(pairing).count(head) for head in range(num_real))
