"""Where modules are swapped: match a recipe to a model, check all, then change.

Nothing is touched before everything is known to fit, and only a copy is ever touched.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from inspect import ismethod
from typing import TypeVar, cast, get_args

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from manyheads.attention import AttentionSpec, Mechanism
from manyheads.attention.hallucinated import HallucinatedAttention
from manyheads.attention.pairing import HeadChoice
from manyheads.errors import (
    GeometryMismatch,
    InvalidRecipe,
    NothingToConvert,
    SwapRefused,
)
from manyheads.ffn import FeedForwardSpec, OutputMoments, Pointwise
from manyheads.hosts import Host, Site, mechanism_of, replace_module
from manyheads.recipe import Recipe, Swap
from manyheads.specs import Spec

__all__ = ["Operation", "apply_swaps", "blank_copy", "current_recipe", "plan_swaps"]

# Where torch keeps what a user hung on a module.
_HOOKS = {
    "_forward_pre_hooks": "forward pre-hook",
    "_forward_hooks": "forward hook",
    "_backward_pre_hooks": "backward pre-hook",
    "_backward_hooks": "backward hook",
}


@dataclass(frozen=True, kw_only=True)
class Operation:
    """What is to happen at one site.

    Attributes:
        site: The block.
        attention: The new mechanism, or None to leave what is there.
        ffn: The new output matrix, or None to leave what is there.
        left_alone: Why a part that the recipe meets is not swapped; empty if none is.
        heads: Which heads calibration images keep real, where they were asked.
        moments: What the output matrix gave on calibration images, likewise.
    """

    site: Site
    attention: AttentionSpec | None
    ffn: FeedForwardSpec | None
    left_alone: str = ""
    heads: HeadChoice | None = None
    moments: OutputMoments | None = None


def plan_swaps(
    model: nn.Module, sites: Sequence[Site], recipe: Recipe
) -> tuple[Operation, ...]:
    """Match the recipe to the blocks and check every pair, changing nothing.

    Returns:
        One operation per block that the recipe meets, in order.

    Raises:
        NothingToConvert: A block number is out of range, or nothing would change.
        InvalidRecipe: Two swaps give the same part of a block.
        SwapRefused: A mechanism cannot carry what a layer does; all such layers are
            named together.
        GeometryMismatch: Sizes of a mechanism and of layers do not fit each other.
    """
    _require_range(sites, recipe)
    attention = _assign(sites, recipe, "attention", lambda swap: swap.attention)
    ffn = _assign(sites, recipe, "ffn", lambda swap: swap.ffn)
    operations, refused, misfits = [], [], []
    for site in sites:
        mixer, output = attention.get(site.index), ffn.get(site.index)
        left_alone = []
        if mixer and (reason := site.fixed or mixer.exempt(site.geometry)):
            left_alone.append(reason)
            mixer = None
        try:
            if mixer and (reason := _attention_problem(model, site, mixer)):
                refused.append(_refusal(site, site.attention_path, mixer, reason))
        except GeometryMismatch as error:
            misfits.append(_placed(error, site.attention_path))
        if output and site.ffn_path is None:
            left_alone.append("no feed-forward layer that could be swapped")
            output = None
        if output and (reason := _ffn_problem(model, site, output)):
            refused.append(_refusal(site, site.ffn_path or "", output, reason))
        if mixer or output or left_alone:
            operations.append(
                Operation(
                    site=site,
                    attention=mixer,
                    ffn=output,
                    left_alone="; ".join(left_alone),
                )
            )
    if refused:
        raise SwapRefused.many(refused)
    if misfits:
        raise GeometryMismatch.many(misfits)
    if not any(op.attention or op.ffn for op in operations):
        raise NothingToConvert(
            asked=f"the recipe {recipe}",
            found="it changes no block: "
            + "; ".join(sorted({op.left_alone for op in operations})),
            fix="Choose other blocks or another mechanism; preview() lists the blocks.",
        )
    return tuple(operations)


def apply_swaps(model: nn.Module, host: Host, operations: Sequence[Operation]) -> None:
    """Swap in place, on a copy that nobody else holds.

    Raises:
        SwapRefused: Hooks or a `forward` of its own hang on a layer that went; only
            now is it known which parts stayed, and the copy is to be thrown away.
    """
    dropped: list[SwapRefused] = []
    for operation in operations:
        site = operation.site
        if operation.attention is not None:
            if operation.heads is not None:
                host.permute_heads(model, site, operation.heads.order)
            layer = model.get_submodule(site.attention_path)
            old, hung = mechanism_of(layer), _attached(layer, site.attention_path)
            new = host.swap_attention(model, site, operation.attention)
            replace_module(model, site.attention_path, new)
            _pair(mechanism_of(new), old, operation.heads)
            dropped += _dropped(hung, new, f"{operation.attention} in {site.path}")
        if operation.ffn is not None and site.ffn_path is not None:
            output = cast("Pointwise", model.get_submodule(site.ffn_path))
            hung = _attached(output, site.ffn_path)
            made = operation.ffn.build(output, operation.moments)
            replace_module(model, site.ffn_path, made)
            dropped += _dropped(hung, made, f"{operation.ffn} in {site.path}")
    if dropped:
        raise SwapRefused.many(dropped)
    host.track_grid(model)


def current_recipe(sites: Sequence[Site], *, plain: AttentionSpec) -> Recipe | None:
    """Read off a model the recipe that made it; None if nothing was converted.

    Blocks with equal specs share one swap. `plain` is what unconverted blocks hold.
    """
    mixers: dict[AttentionSpec, list[int]] = {}
    outputs: dict[FeedForwardSpec, list[int]] = {}
    for site in sites:
        if site.attention != plain or site.renamed:
            mixers.setdefault(site.attention, []).append(site.index)
        if site.ffn is not None:
            outputs.setdefault(site.ffn, []).append(site.index)
    swaps = [Swap(blocks=blocks, attention=spec) for spec, blocks in mixers.items()]
    swaps += [Swap(blocks=blocks, ffn=spec) for spec, blocks in outputs.items()]
    return Recipe(*swaps) if swaps else None


def blank_copy(model: nn.Module, *, keep: Iterable[Tensor] = ()) -> nn.Module:
    """Copy a model without its weights, onto the meta device, at no cost in memory.

    Args:
        model: The model; it is not changed.
        keep: Tensors of it that the copy is to hold themselves.
    """
    kept = {id(tensor): tensor for tensor in keep}
    tensors = [t for t in (*model.parameters(), *model.buffers()) if id(t) not in kept]
    with torch.no_grad():
        memo: dict[int, object] = {
            id(t): nn.Parameter(t.detach().to("meta"), requires_grad=t.requires_grad)
            if isinstance(t, nn.Parameter)
            else t.detach().to("meta")
            for t in tensors
        }
    return copy.deepcopy(model, memo | kept)


def _attached(layer: nn.Module, path: str) -> list[tuple[nn.Module, str, str]]:
    """List what users hung on a layer and its parts: which, where, what.

    Hooks of this package do not count: hosts put them on the new layer themselves.
    """
    found = []
    for place, module in layer.named_modules(prefix=path):
        held = vars(module)
        if "forward" in held:
            found.append((module, place, "a forward of its own, set on the instance"))
        for registry, kind in _HOOKS.items():
            for hook in held.get(registry, {}).values():
                if not _origin(hook).startswith("manyheads."):
                    name = getattr(hook, "__qualname__", type(hook).__qualname__)
                    found.append((module, place, f"a {kind} ({name})"))
    return found


def _origin(hook: object) -> str:
    """Name the module that a function, or the class of an object, comes from."""
    return str(getattr(hook, "__module__", ""))


def _dropped(
    hung: Sequence[tuple[nn.Module, str, str]], new: nn.Module, asked: str
) -> list[SwapRefused]:
    """Refuse what hung on modules that the new layer did not take over."""
    stayed = set(new.modules())
    return [
        SwapRefused(
            asked=asked,
            found=f"the layer there has {what}",
            where=place,
            why="the swap puts another layer there, which would go without it",
            fix="Remove it before converting (handle.remove(), or del layer.forward) "
            "and put it on the converted layer; or leave the block out with "
            "Swap(blocks=...).",
        )
        for module, place, what in hung
        if module not in stayed
    ]


def _pair(
    new: Mechanism | None, old: Mechanism | None, heads: HeadChoice | None
) -> None:
    """Tell a fresh mechanism its partners: as chosen, or as they were before it."""
    if not isinstance(new, HallucinatedAttention):
        return
    if heads is not None:
        new.pair(heads.pairing)
    elif isinstance(old, HallucinatedAttention):
        new.pair(old.pairing)


_Spec = TypeVar("_Spec", bound=Spec)


def _assign(
    sites: Sequence[Site],
    recipe: Recipe,
    part: str,
    pick: Callable[[Swap], _Spec | None],
) -> dict[int, _Spec]:
    """Give each block the spec that a swap names for it; two are a contradiction."""
    chosen: dict[int, _Spec] = {}
    for swap in recipe.swaps:
        spec = pick(swap)
        if spec is None:
            continue
        for block in _blocks(swap, len(sites)):
            if block in chosen:
                raise InvalidRecipe(
                    asked=f"{part} of block {block} as {spec}",
                    found=f"an earlier swap of the recipe makes it {chosen[block]}",
                    why="which of them should win would be a guess",
                    fix="Name every block once per part: Swap(blocks=range(10), ...).",
                )
            chosen[block] = spec
    return chosen


def _blocks(swap: Swap, count: int) -> Sequence[int]:
    if swap.blocks is None:
        return range(count)
    return [block % count for block in swap.blocks]


def _require_range(sites: Sequence[Site], recipe: Recipe) -> None:
    count = len(sites)
    for swap in recipe.swaps:
        outside = [b for b in swap.blocks or () if not -count <= b < count]
        if outside:
            raise NothingToConvert(
                asked=f"the recipe names block {', '.join(map(str, outside))}",
                found=f"this model has blocks 0-{count - 1}",
                where=f"{sites[0].path} to {sites[-1].path}",
                fix=f"Use Swap(blocks=range({max(0, count - 2)}, {count}), ...).",
            )


def _attention_problem(model: nn.Module, site: Site, spec: AttentionSpec) -> str | None:
    if packed := _packed(model.get_submodule(site.attention_path)):
        return packed
    has, needs = (
        each.num_query_heads(site.geometry) for each in (site.attention, spec)
    )
    if has != needs and has < site.geometry.num_heads:
        return (
            f"{site.attention} kept queries and keys of {has} of "
            f"{site.geometry.num_heads} heads and {spec} needs {needs}; convert the "
            "original model instead"
        )
    if needs < has and site.fixed_query_heads:
        return f"{spec} projects queries of {needs} heads and {site.fixed_query_heads}"
    if site.geometry.reduced_keys is not None and not spec.takes_reduced_keys:
        return (
            f"its keys are reduced to {site.geometry.reduced_keys} tokens and {spec} "
            "is defined where queries and keys are the same tokens"
        )
    return spec.problem(site.geometry)


def _packed(layer: nn.Module) -> str:
    """Say which part keeps its weight where only its own code can read it."""
    for name, module in layer.named_modules():
        if ismethod(getattr(module, "weight", None)):
            kind = type(module)
            return (
                f"its {name} is a {kind.__module__}.{kind.__qualname__}, whose weight "
                "is packed; convert first and quantise what comes out"
            )
    return ""


def _ffn_problem(model: nn.Module, site: Site, spec: FeedForwardSpec) -> str | None:
    output = model.get_submodule(site.ffn_path or "")
    if site.ffn == spec:
        return f"it already is {spec}"
    if site.ffn is not None:
        return f"it already is {site.ffn}; convert the original model instead"
    plain = type(output) in get_args(Pointwise) or is_parametrized(output)
    if not plain or not isinstance(output, Pointwise):
        return (
            f"its output matrix is a {type(output).__name__}, no plain nn.Linear or "
            "nn.Conv2d, and what it holds beside its weight would be dropped"
        )
    return spec.problem(output)


def _placed(error: GeometryMismatch, path: str) -> GeometryMismatch:
    """Say where; a spec does not know the path of the layer it is asked about."""
    return GeometryMismatch(
        asked=error.asked, found=error.found, fix=error.fix, why=error.why, where=path
    )


def _refusal(site: Site, path: str, spec: Spec, reason: str) -> SwapRefused:
    return SwapRefused(
        asked=f"{spec} in block {site.index}",
        found=reason,
        where=path,
        why="what cannot be carried exactly is never changed in silence",
        fix="Leave these blocks out of the recipe with Swap(blocks=...).",
    )
