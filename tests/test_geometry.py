"""Sizes: whole patches, and what is said when there is not even one."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from manyheads.errors import ImageSizeError
from manyheads.geometry import fit_to_patches

sides = st.integers(1, 10_000)


@given(sides, sides, st.integers(1, 64), st.integers(1, 64))
def test_the_fitted_size_is_the_smallest_of_whole_patches_that_holds_the_image(
    height: int, width: int, patch_height: int, patch_width: int
) -> None:
    if height < patch_height or width < patch_width:
        with pytest.raises(ImageSizeError, match=f"{height}x{width}"):
            fit_to_patches((height, width), (patch_height, patch_width))
        return
    fed = fit_to_patches((height, width), (patch_height, patch_width))
    for side, cell, whole in zip(
        (height, width), (patch_height, patch_width), fed, strict=True
    ):
        assert whole % cell == 0
        assert side <= whole < side + cell


def test_1080p_is_padded_to_1088() -> None:
    assert fit_to_patches((1080, 1920), (16, 16)) == (1088, 1920)
