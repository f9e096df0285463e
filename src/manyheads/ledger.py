"""Books every multiply-add of a model to a block, without a device and without data.

The model is copied to the meta device and walked once at the image size in question.
What a block costs is a closed form of the sizes met on the way; torch's own counter
watches the same walk, and what it sees beyond the closed forms is booked as the rest
of the network. So nothing is missed, and the closed forms are checked on every call.

One multiply-add counts 1, the papers' convention. Counted: matrix products and
convolutions; the mechanisms' own element-wise work; normalisation layers, at 5 per
element for LayerNorm and GroupNorm, 4 for RMSNorm, 2 for BatchNorm (fvcore's
convention, which the published tables follow). Not counted: softmax, activations,
residual sums, biases, pooling.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from manyheads.attention import CoreCost
from manyheads.errors import CostError
from manyheads.ffn import Pointwise
from manyheads.geometry import Geometry, Grid
from manyheads.hosts import Host, RealHeads, Site, mechanism_of, token_count
from manyheads.surgery import blank_copy

__all__ = ["BlockCost", "Ledger", "keep_books"]

_LINEAR = (*get_args(Pointwise), RealHeads)


@dataclass(frozen=True, kw_only=True)
class BlockCost:
    """What one block costs for one image, in multiply-adds, and its parameters.

    Attributes:
        index: Block number.
        path: Module path.
        attention: The mechanism that is there.
        ffn: The output matrix that is there; empty for an ordinary one.
        num_tokens: Tokens that the attention sees, prefix tokens included.
        num_parameters: Parameters of the attention layer and the feed-forward layer.
        projections: Query, key, value, gate and output projections.
        attention_matrices: Making and applying the attention maps, or what stands in
            their place.
        feed_forward: The feed-forward layer.
        elementwise: Element-wise work of the mechanism.
    """

    index: int
    path: str
    attention: str
    ffn: str
    num_tokens: int
    num_parameters: int
    projections: int
    attention_matrices: int
    feed_forward: int
    elementwise: int

    @property
    def matmul(self) -> int:
        """Multiply-adds of the block that are matrix products or stand for them."""
        return self.projections + self.attention_matrices + self.feed_forward


@dataclass(frozen=True, kw_only=True)
class Ledger:
    """All of a model's multiply-adds for one image, and its parameters.

    Attributes:
        image_size: Height and width that were asked for.
        fed_size: Height and width that enter the network, padding included.
        blocks: The convertible blocks.
        rest: Matrix products and convolutions outside of them.
        normalisation: Normalisation layers, everywhere.
        num_parameters: All parameters.
    """

    image_size: tuple[int, int]
    fed_size: tuple[int, int]
    blocks: tuple[BlockCost, ...]
    rest: int
    normalisation: int
    num_parameters: int

    @property
    def total(self) -> int:
        """All counted multiply-adds."""
        in_blocks = sum(block.matmul + block.elementwise for block in self.blocks)
        return in_blocks + self.rest + self.normalisation

    @property
    def attention_share(self) -> float:
        """Share of all matrix products spent on making and applying attention matrices.

        For a plain ViT with softmax attention this is ``N / (6 D + N)``, less what the
        patch embedding and the head take. Norms and element-wise work do not count.
        """
        spent = sum(block.attention_matrices for block in self.blocks)
        return spent / (self.rest + sum(block.matmul for block in self.blocks))


def keep_books(
    model: nn.Module,
    host: Host,
    sites: Sequence[Site],
    image_size: tuple[int, int] | None = None,
) -> Ledger:
    """Walk a copy of the model on the meta device and book what it does.

    Args:
        model: Any hosted model, converted or not; it is not touched.
        host: Its host.
        sites: Its blocks.
        image_size: Height and width in pixels; None for the native size.

    Raises:
        ImageSizeError: The size gives no valid token grid.
        CostError: The model cannot run on the meta device at this size.
    """
    wanted = host.image_input(model)
    blank = blank_copy(model).eval().requires_grad_(False)
    size = image_size or wanted.size
    fed = host.resize(blank, size)
    image = torch.empty(1, wanted.channels, *fed, device="meta", dtype=_dtype(blank))
    walk = _Walk(blank, sites)
    with FlopCounterMode(display=False) as counter, walk, torch.no_grad():
        try:
            host.feed(blank, image)
        except Exception as error:
            raise CostError(
                asked=f"counting {type(model).__name__} at {fed[0]}x{fed[1]}",
                found=f"it does not run at this size: {error}",
                fix="convert() counts nothing; quantised layers cannot be counted."
                if size == wanted.size
                else f"Use its native image_size={wanted.size}.",
            ) from error
    blocks = tuple(walk.book(site) for site in sites)
    # The counter speaks of FLOPs, two to a multiply-add.
    counted = counter.get_total_flops() // 2
    return Ledger(
        image_size=size,
        fed_size=fed,
        blocks=blocks,
        rest=counted - sum(block.matmul for block in blocks),
        normalisation=walk.normalisation,
        num_parameters=_count(blank),
    )


class _Walk:
    """Hooks that note, during one forward pass, what the closed forms need."""

    def __init__(self, model: nn.Module, sites: Sequence[Site]) -> None:
        self.model, self.sites = model, sites
        self.normalisation = 0
        self.linear: dict[str, int] = dict.fromkeys(
            (name for name, m in model.named_modules() if isinstance(m, _LINEAR)), 0
        )
        self.tokens: dict[str, tuple[int, int]] = {}
        self.keys: dict[str, int] = {}
        self.grids: dict[str, Grid] = {}
        self._hooks = ExitStack()

    def __enter__(self) -> None:
        for name, module in self.model.named_modules():
            work = _work_per_element(module)
            if work:
                self._hook(module, self._note_norm(work))
            if isinstance(module, _LINEAR):
                self._hook(module, self._note_linear(name))
            if isinstance(module, nn.MultiheadAttention):
                self._hook(module, self._note_packed(name))
        for site in self.sites:
            module = self.model.get_submodule(site.attention_path)
            if not site.fixed:
                note = self._note_tokens(site.attention_path)
                self._hook(module, note, with_kwargs=True)
            if site.keys_path is not None:
                keys = self.model.get_submodule(site.keys_path)
                self._hook(keys, self._note_keys(site.attention_path))
            core = mechanism_of(module)
            if core is not None and core.needs_grid:
                self._hook(core, self._note_grid(site.attention_path))

    def __exit__(self, *_: object) -> None:
        self._hooks.close()

    def book(self, site: Site) -> BlockCost:
        """Turn the notes on one site into its closed-form cost."""
        images, num_tokens = self.tokens.get(site.attention_path, (0, 0))
        core = CoreCost(attention=0)
        if not site.fixed:
            core = site.attention.core_cost(self._geometry(site), num_tokens)
        mixing = site.attention_parts or (site.attention_path,)
        home = (site.ffn_path or "").rpartition(".")[0]
        feed_forward = site.ffn_parts or ((home,) if home else ())
        parts = (*mixing, *feed_forward)
        return BlockCost(
            index=site.index,
            path=site.path,
            attention=site.fixed or repr(site.attention),
            ffn=repr(site.ffn) if site.ffn else "",
            num_tokens=num_tokens,
            num_parameters=sum(_count(self.model.get_submodule(p)) for p in parts),
            projections=self._within(
                mixing, but=f"{site.attention_path}.core.", rows=images * num_tokens
            ),
            attention_matrices=images * core.attention,
            feed_forward=self._within(feed_forward),
            elementwise=images * core.elementwise,
        )

    def _geometry(self, site: Site) -> Geometry:
        """Give the layer's sizes with keys and grid as they were met on this walk."""
        keys = self.keys.get(site.attention_path, site.geometry.reduced_keys)
        grid = self.grids.get(site.attention_path, site.geometry.grid)
        return replace(site.geometry, reduced_keys=keys, grid=grid)

    def _within(
        self, paths: tuple[str, ...], *, but: str = "none", rows: int = 0
    ) -> int:
        """Add up the linear layers; one whose matrix is used uncalled sees `rows`."""
        inside = tuple(f"{path}." for path in paths)
        return sum(
            work or rows * _matrix(self.model.get_submodule(name))
            for name, work in self.linear.items()
            if name.startswith(inside) and not name.startswith(but)
        )

    def _hook(
        self, module: nn.Module, note: Callable[..., None], *, with_kwargs: bool = False
    ) -> None:
        handle = module.register_forward_hook(note, with_kwargs=with_kwargs)
        self._hooks.callback(handle.remove)

    def _note_norm(self, work: int) -> Callable[..., None]:
        def note(_: nn.Module, __: Any, output: Tensor) -> None:
            self.normalisation += work * output.numel()

        return note

    def _note_linear(self, name: str) -> Callable[..., None]:
        def note(module: Any, __: Any, output: Tensor) -> None:
            # What real heads put out is padded to the width of all heads.
            padded = isinstance(module, RealHeads)
            width = module.out_features if padded else module.weight.shape[0]
            places = output.numel() // width
            self.linear[name] += places * module.weight.numel()

        return note

    def _note_keys(self, path: str) -> Callable[..., None]:
        def note(_: nn.Module, __: Any, output: Tensor) -> None:
            self.keys[path] = output.shape[-2]

        return note

    def _note_tokens(self, path: str) -> Callable[..., None]:
        def note(
            module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], _: Any
        ) -> None:
            self.tokens[path] = token_count(module, args, kwargs)

        return note

    def _note_packed(self, path: str) -> Callable[..., None]:
        # torch's own layer holds its matrices itself and calls no linear layer.
        def note(_: nn.MultiheadAttention, args: tuple[Tensor, ...], __: Any) -> None:
            self.linear[f"{path}.out_proj"] += args[0].numel() * 4 * args[0].shape[-1]

        return note

    def _note_grid(self, path: str) -> Callable[..., None]:
        def note(_: nn.Module, args: tuple[Any, ...], __: Any) -> None:
            *_qkv_and_mask, grid = args
            self.grids[path] = grid

        return note


def _work_per_element(module: nn.Module) -> int:
    if isinstance(module, nn.LayerNorm | nn.GroupNorm):
        return 5
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        return 2
    return 4 if "rmsnorm" in type(module).__name__.lower() else 0


def _matrix(module: Any) -> int:
    return int(module.weight.numel())


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _dtype(model: nn.Module) -> torch.dtype:
    return next((p.dtype for p in model.parameters()), torch.float32)
