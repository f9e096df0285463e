"""What a host is: the one place that knows how a library builds its transformers.

A *host* finds the attention and feed-forward layers of a model, swaps the smallest
module that holds them, resizes the input, and can say how to build the model again.
Nothing outside this folder names a library. A new library is one new file here and
one line in `HOSTS`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from manyheads.attention import AttentionSpec, Mechanism
from manyheads.errors import ManyheadsError, SwapRefused
from manyheads.ffn import FeedForwardSpec
from manyheads.geometry import Geometry, Grid

__all__ = [
    "CropMode",
    "Host",
    "ImageInput",
    "Site",
    "TokenGrid",
    "is_random",
    "readable_mask",
    "replace_module",
    "token_count",
]

# Words in the names of classes that draw random numbers while training.
_RANDOM = ("DropPath", "PatchDropout", "Rotary", "Rope")
# Rates that attention layers read off themselves, dropout being part of the function.
_RATES = ("attention_dropout", "attn_drop", "dropout", "dropout_prob", "dropout_p")


@dataclass(frozen=True, kw_only=True)
class Site:
    """One place where tokens are mixed, with the feed-forward layer beside it.

    Attributes:
        index: Block number, from 0 in the order in which an image meets the blocks.
        path: The block's module path, e.g. "blocks.3".
        attention_path: The module that a swap of attention replaces.
        ffn_path: The output matrix that a swap of the feed-forward layer replaces, or
            None where there is none.
        geometry: Sizes of the attention layer.
        attention: What mixes tokens there now.
        ffn: What the output matrix is now; None for an ordinary one.
        renamed: Whether the attention layer is one of ours whose parameters have other
            names than the library's: then even ordinary attention must be recorded.
        attention_parts: Modules that hold all of the attention's projections, where
            that is more than `attention_path`.
        ffn_parts: Modules that make the feed-forward layer, where that is more than
            the parent of `ffn_path`.
        fixed_query_heads: Why queries and keys cannot be projected for fewer heads, in
            one clause; empty where they can.
        keys_path: The module whose output tokens become keys, where they are fewer
            than the queries; None where every token is a key.
        fixed: Why no recipe swaps what mixes tokens here, e.g. a convolution; empty
            where it is attention.
        keys_in_runs: Whether a reduced key stands for a run of tokens, one after the
            other in reading order, and not for a square of the grid.
    """

    index: int
    path: str
    attention_path: str
    ffn_path: str | None
    geometry: Geometry
    attention: AttentionSpec
    ffn: FeedForwardSpec | None
    renamed: bool = False
    attention_parts: tuple[str, ...] = ()
    ffn_parts: tuple[str, ...] = ()
    fixed_query_heads: str = ""
    keys_path: str | None = None
    fixed: str = ""
    keys_in_runs: bool = False


CropMode = Literal["center", "squash", "border"]


@dataclass(frozen=True, kw_only=True)
class ImageInput:
    """What a model wants its images to be.

    Attributes:
        channels: Colour channels.
        size: Native height and width in pixels.
        mean: Per-channel mean, subtracted from values in [0, 1].
        std: Per-channel standard deviation.
        interpolation: Name of the resampling filter, e.g. "bicubic".
        crop: Share of the resized image that the central crop keeps.
        crop_mode: How a picture of other proportions is resized: to cover the square
            ("center", what stands over is cut off), to be it ("squash", proportions
            are lost) or to fit into it ("border", the rest is filled with the mean).
    """

    channels: int
    size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str
    crop: float
    crop_mode: CropMode = "center"


class Host(ABC):
    """Everything the package needs to know about one library's models."""

    name: ClassVar[str]

    @abstractmethod
    def recognises(self, model: nn.Module) -> bool:
        """Say whether this library built the model; importing nothing new."""

    @abstractmethod
    def sites(self, model: nn.Module) -> tuple[Site, ...]:
        """List the convertible blocks in order; empty if there is none."""

    @abstractmethod
    def refusal(self, model: nn.Module) -> str:
        """Say in one clause why a recognised model has no convertible block."""

    def left_alone(self, model: nn.Module) -> tuple[str, ...]:
        """List attention that is linear in tokens already, and so never a site."""
        return ()

    @abstractmethod
    def swap_attention(
        self, model: nn.Module, site: Site, spec: AttentionSpec
    ) -> nn.Module:
        """Make what stands in the place of the site's attention, reusing its parts.

        The old module must not be used afterwards: its children move to the new one.
        """

    def permute_heads(self, model: nn.Module, site: Site, order: Sequence[int]) -> None:
        """Put the heads of a layer in another order, in place; no output changes.

        Raises:
            SwapRefused: This host's layers keep the order they have.
        """
        raise SwapRefused(
            asked=f"choosing the real heads of block {site.index} from images",
            found=f"heads of {self.name} models keep their order",
            where=site.attention_path,
            fix="Convert without images: the first half of the heads is real then.",
        )

    @abstractmethod
    def track_grid(self, model: nn.Module) -> None:
        """Tell every mechanism that needs it the token grid of the current image."""

    @abstractmethod
    def image_input(self, model: nn.Module) -> ImageInput:
        """Say what images the model wants."""

    @abstractmethod
    def resize(self, model: nn.Module, image_size: tuple[int, int]) -> tuple[int, int]:
        """Make the model accept this size, in place, and return what it will be fed.

        Returns:
            Height and width in pixels; larger than asked where whole patches need
            padding with zeros at the bottom and on the right.

        Raises:
            ImageSizeError: No token grid of this model fits the size.
        """

    def feed(self, model: nn.Module, images: Tensor) -> Any:
        """Run the part of the model that looks at images: all of it, as a rule."""
        return model(images)

    def output(self, result: Any) -> Tensor:
        """Pick from what the model returned the tensor by which it is judged.

        Raises:
            ManyheadsError: There is none; healing and comparing need one.
        """
        if isinstance(result, Tensor):
            return result
        raise ManyheadsError(
            asked="comparing what two models return",
            found=f"this one returns a {type(result).__name__}, not a tensor",
            fix="Use a model that returns one tensor for an image.",
        )

    def gives_scores(self, model: nn.Module, output: Tensor) -> bool:
        """Say whether an output holds the scores of classes, and not features.

        Scores are compared as distributions and by the class they name; features have
        no classes, so they are compared by their squared error.
        """
        return output.ndim == 2 and getattr(model, "num_classes", None) != 0

    @abstractmethod
    def describe(self, model: nn.Module) -> dict[str, Any]:
        """Say as JSON values how to build the model again, weights left out.

        Raises:
            CheckpointError: It was not built through the library's own factory.
        """

    @abstractmethod
    def rebuild(self, description: dict[str, Any]) -> nn.Module:
        """Build what `describe` described; the description may come from a stranger.

        Raises:
            CheckpointError: It names a model or an argument this host does not allow.
        """

    def free_size(self, model: nn.Module) -> Grid | None:
        """Make the model accept any size of whole cells, in place, where it can.

        Returns:
            Height and width in pixels of which sizes must be multiples; None where the
            library's forward pass is tied to one size, and then nothing has changed.
        """
        return None

    def labels(self, model: nn.Module) -> tuple[str, ...]:
        """Name the classes in the order of the output; empty for an embedding."""
        return ()

    def extra_files(self, model: nn.Module) -> dict[str, str]:
        """Give further files of a checkpoint, name to text; none, as a rule."""
        return {}


class TokenGrid:
    """Rows and columns of the image now in the network, for layers far from it.

    Blocks see a sequence and cannot tell 7 x 28 tokens from 14 x 14. A hook on the
    patch embedding writes the grid here, and the attention layers of the same model
    read it. One object per model; a deep copy of the model copies it along.
    """

    def __init__(self) -> None:
        self.grid: Grid | None = None

    def __reduce__(self) -> tuple[type[TokenGrid], tuple[()]]:
        """Copy and pickle without the grid: of a traced image it is symbols."""
        return TokenGrid, ()

    def __call__(self) -> Grid | None:
        """Give the grid of the image that was embedded last."""
        return self.grid

    def watch_patches(self, embed: Any, args: tuple[Any, ...]) -> None:
        """Forward pre-hook for a patch embedding that knows its `patch_size`."""
        image: Tensor = args[0]
        rows, columns = embed.dynamic_feat_size(image.shape[-2:])
        self.grid = (rows, columns)

    def watch_map(self, _: nn.Module, __: Any, output: Tensor) -> None:
        """Forward hook for a convolution that makes the patches: [B, D, rows, cols]."""
        self.grid = (output.shape[-2], output.shape[-1])


def replace_module(model: nn.Module, path: str, new: nn.Module) -> None:
    """Put a module at a path, in the mode (training or not) of what was there."""
    parent_path, _, name = path.rpartition(".")
    parent = model.get_submodule(parent_path)
    new.train(parent.get_submodule(name).training)
    parent.register_module(name, new)


def is_random(module: nn.Module) -> bool:
    """Say whether a module itself, its children aside, is random while it trains.

    Dropout and stochastic depth are, as are rotations whose positions are jittered and
    attention layers that drop weights inside one fused function.
    """
    name = type(module).__name__
    return (
        isinstance(module, nn.modules.dropout._DropoutNd | Mechanism)
        or any(word in name for word in _RANDOM)
        or any(isinstance(getattr(module, rate, None), float) for rate in _RATES)
        or isinstance(getattr(module, "attn_drop", None), nn.Dropout)
    )


def token_count(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[int, int]:
    """Say how many images and tokens an attention layer was called with."""
    tokens = next(x for x in (*args, *kwargs.values()) if isinstance(x, Tensor))
    *images, count, _ = tokens.shape
    if getattr(module, "batch_first", True):
        return math.prod(images), count
    return count, math.prod(images)


def mechanism_of(module: nn.Module) -> Mechanism | None:
    """Give the mechanism inside a converted attention layer, or None."""
    core = getattr(module, "core", None)
    return core if isinstance(core, Mechanism) else None


def readable_mask(mask: Tensor, core: Mechanism) -> Tensor:
    """Turn an additive mask that only leaves keys out into a boolean one.

    SigLIP 2 of transformers 4 and timm's NaFlexVit expand padding to [B, 1, N, N]
    numbers. Whether such a mask is one per key is looked up in its values; where values
    cannot be looked at, in a traced graph, it stays as it is and the mechanism decides.
    """
    if core.accepts_pair_mask or mask.dtype is torch.bool:
        return mask
    if torch.compiler.is_compiling() or mask.ndim != 4 or mask.device.type == "meta":
        return mask
    first = mask[:, :1, :1]
    kept = first == 0
    left_out = first <= torch.finfo(mask.dtype).min
    if bool((mask == first).all()) and bool((kept | left_out).all()):
        return kept
    return mask
