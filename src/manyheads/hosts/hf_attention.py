"""The one attention function that transformers calls for converted models.

It asks the calling module for a mechanism and otherwise does what the library does, so
that converted layers and others stand side by side in one model.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn

from manyheads.errors import ManyheadsError, MaskRefused
from manyheads.geometry import Grid
from manyheads.hosts.base import TokenGrid, mechanism_of, readable_mask

__all__ = ["NAME", "guard", "manyheads_attention", "manyheads_mask", "register"]

NAME = "manyheads"
# What transformers calls the form that builds maps, in each of its modules.
_EAGER = "eager_attention_forward"


def register() -> None:
    """Make the function known to transformers, and the masks that reach it."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, manyheads_attention)
    AttentionMaskInterface.register(NAME, manyheads_mask)


class _Guard:
    """Forward pre-hook of converted layers: the function must still be ours.

    The configuration chooses it, and whoever changes that, as `set_attn_implementation`
    does, would have softmax in the mechanism's place without a word.
    """

    def __reduce__(self) -> tuple[Any, ...]:
        """Unpickle in a process that never converted a model: register there."""
        return _new_guard, ()

    def __call__(self, module: Any, _: tuple[Any, ...]) -> None:
        chosen = module.config._attn_implementation
        if chosen != NAME:
            raise ManyheadsError(
                asked=f"running {module.core.spec} with the attention implementation "
                f"{chosen!r}",
                found=f"only {NAME!r} calls the mechanism of a converted layer",
                where=type(module).__name__,
                why="any other would compute softmax in its place",
                fix=f"Set config._attn_implementation = {NAME!r} again on the vision "
                "tower; layers without a mechanism use sdpa there.",
            )


def _new_guard() -> _Guard:
    register()
    return _Guard()


def guard(attention: nn.Module) -> None:
    """Have a converted layer check, once, that it is called through our function."""
    hooks = attention._forward_pre_hooks.values()
    if not any(isinstance(hook, _Guard) for hook in hooks):
        attention.register_forward_pre_hook(_Guard())


def manyheads_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """Mix tokens with the module's mechanism, or as the library would.

    Queries, keys and values are head-major [B, H, N, K], any rotation applied. Maps
    are returned where the caller asks for `output_attentions`, built in the slow form.

    Raises:
        MaskRefused: The layer has a mechanism and is called causally, or with a mask
            that the mechanism cannot honour.
    """
    core = mechanism_of(module)
    if core is None:
        return _library_attention(
            module, query, key, value, attention_mask, scaling, dropout, is_causal,
            options,
        )  # fmt: skip
    if options.get("position_bias") is not None:
        raise MaskRefused(
            asked=f"a layer converted to {core.spec} was called with a position bias",
            found=f"a bias of shape {list(options['position_bias'].shape)} on pairs",
            why="ignoring it would change the model in silence",
            fix="Leave layers with a relative position bias out of the recipe.",
        )
    causal = is_causal if is_causal is not None else getattr(module, "is_causal", False)
    if causal:
        raise MaskRefused(
            asked=f"a layer converted to {core.spec} was called causally",
            found="every token of an image reads all others",
            why="ignoring the order of tokens would change the model in silence",
            fix="Convert the vision tower only.",
        )
    # Heads beyond the real ones are padding, see RealHeads.
    heads = core.spec.num_query_heads(core.geometry)
    q, k = (x[:, :heads].transpose(1, 2) for x in (query, key))
    v = value.transpose(1, 2)
    mask = attention_mask
    if mask is not None:
        mask = readable_mask(mask, core)
    grid = _grid(module)
    mixed = core(q, k, v, mask, grid)
    wanted = options.get("output_attentions", False)
    return mixed, core.maps(q, k, mask, grid) if wanted else None


def manyheads_mask(*args: Any, **options: Any) -> Tensor | None:
    """Deliver padding as the plain key mask [B, N], and any other mask in full.

    Unregistered, transformers would drop padding masks for a function of its own.
    """
    from transformers import masking_utils

    both_ways = getattr(masking_utils, "bidirectional_mask_function", None)
    if both_ways is not None and options.get("mask_function") is both_ways:
        padding: Tensor | None = options.get("attention_mask")
        return padding
    full: Tensor | None = masking_utils.sdpa_mask(*args, **options)
    return full


def _library_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float | None,
    dropout: float,
    is_causal: bool | None,
    options: dict[str, Any],
) -> tuple[Tensor, Tensor | None]:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if mask is not None and mask.ndim == 2:
        mask = mask[:, None, None, :]
    eager = getattr(sys.modules[type(module).__module__], _EAGER, None)
    if options.get("output_attentions") and eager is not None and not is_causal:
        # sdpa gives no maps, and a layer that gave none would be missing in the list.
        if mask is not None and mask.dtype is torch.bool:
            lowest = torch.finfo(query.dtype).min
            mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, lowest)
        mixed, maps = eager(
            module, query, key, value, mask, scaling=scaling, dropout=dropout, **options
        )
        return mixed, maps
    mixed, _ = sdpa_attention_forward(
        module,
        query,
        key,
        value,
        mask,
        dropout=dropout,
        scaling=scaling,
        is_causal=is_causal,
        **options,
    )
    return mixed, None


def _grid(module: nn.Module) -> Grid | None:
    token_grid = getattr(module, "token_grid", None)
    return token_grid() if isinstance(token_grid, TokenGrid) else None
