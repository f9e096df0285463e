"""What stands around a model, or in its place: found by class, and said how to undo.

Nothing is converted through a wrapper: it may hold a compiled graph, averages of
weights or a copy on every device, which would no longer be of the model inside.
"""

from __future__ import annotations

from torch import nn

__all__ = ["why_wrapped"]

_INSIDE = "Convert the model inside, model.module, and wrap what comes out."
_BEFORE = "Convert the model that it was made of, and make it of what comes out."
_SPREAD = "that class spreads a model over devices", _INSIDE
_MEAN = "that class keeps a running mean of a model", "Convert model.module instead."
_GRAPH = "it is a graph of single operations: no layer is left to swap", _BEFORE

# Full name of a class -> what it is, and a way that works.
_WRAPPERS = {
    "torch._dynamo.eval_frame.OptimizedModule": (
        "torch.compile made it of a model",
        "Convert the model inside, model._orig_mod, and compile what comes out.",
    ),
    "torch.nn.parallel.data_parallel.DataParallel": _SPREAD,
    "torch.nn.parallel.distributed.DistributedDataParallel": _SPREAD,
    "torch.distributed.fsdp.fully_sharded_data_parallel."
    "FullyShardedDataParallel": _SPREAD,
    "torch.optim.swa_utils.AveragedModel": _MEAN,
    "timm.utils.model_ema.ModelEma": _MEAN,
    "timm.utils.model_ema.ModelEmaV2": _MEAN,
    "timm.utils.model_ema.ModelEmaV3": _MEAN,
    "torch.fx.graph_module.GraphModule": _GRAPH,
    "timm.models._features_fx.FeatureGraphNet": _GRAPH,
    "timm.models._features_fx.GraphExtractNet": _GRAPH,
    "torch.jit._script.ScriptModule": _GRAPH,
}


def why_wrapped(model: nn.Module) -> tuple[str, str] | None:
    """Say what a wrapper is and what to convert instead; None for a plain model."""
    names = (f"{kind.__module__}.{kind.__qualname__}" for kind in type(model).__mro__)
    return next((_WRAPPERS[name] for name in names if name in _WRAPPERS), None)
