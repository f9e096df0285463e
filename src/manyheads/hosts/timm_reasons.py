"""Why attention layers of timm are not converted, class by class, in one table."""

from __future__ import annotations

from torch import nn

__all__ = ["already_linear", "why_refused"]

_WINDOWED = "its attention is windowed"
_WINDOWED_BIAS = "its attention is windowed, with a relative bias"
_BIAS = "its attention adds a relative bias to pairs of tokens"
_REDUCED = "its keys and values are spatially reduced"
_IN_PARTS = (
    "its keys and values are spatially reduced, how much is known in the whole model "
    "only, and features_only=True took that apart"
)
_POOLED = "its queries or keys are pooled between stages"
_MAP = "its attention reads feature maps of a convolutional network"
_FUSED = "its block fuses attention and feed-forward layer into one (parallel block)"

# timm module and class, without the leading package -> why it is not taken.
_REFUSED = {
    "layers.bottleneck_attn.BottleneckAttn": _BIAS,
    "layers.diff_attention.DiffAttention": "its attention subtracts two maps",
    "layers.halo_attn.HaloAttn": _WINDOWED_BIAS,
    "layers.lambda_layer.LambdaLayer": "it has lambda layers in place of attention",
    "layers.non_local_attn.BatNonLocalAttn": _MAP,
    "layers.attention2d.MultiQueryAttention2d": _MAP,
    "models.beit.Attention": _BIAS,
    "models.cait.TalkingHeadAttn": "its attention mixes heads before and after softmax",
    "models.convit.GPSA": "its attention is gated with positions of token pairs",
    "models.cpubone.ConvAttention": _MAP,
    "models.davit.WindowAttention": _WINDOWED,
    "models.efficientformer.Attention": _BIAS,
    "models.efficientformer_v2.Attention2d": _BIAS,
    "models.efficientvit_msra.LocalWindowAttention": _WINDOWED_BIAS,
    "models.fastvit.Attention": _MAP,
    "models.gcvit.WindowAttentionGlobal": _WINDOWED_BIAS,
    "models.gemma4_vit.Gemma4Attention": "its attention rotates with positions it is "
    "called with, and masks padding",
    "models.hiera.MaskUnitAttention": "its attention is windowed (mask units)",
    "models.hieradet_sam2.MultiScaleAttention": "its attention is windowed and pools "
    "queries",
    "models.iformer.SHMA": _MAP,
    "models.levit.Attention": _BIAS,
    "models.levit.AttentionDownsample": _BIAS,
    "models.lowformer.ConvAttention": _MAP,
    "models.maxxvit.AttentionCl": _WINDOWED_BIAS,
    "models.maxxvit.Attention2d": _BIAS,
    "models.metaformer.Attention": "its attention reads feature maps [B, H, W, C]",
    "models.mvitv2.MultiScaleAttention": _POOLED,
    "models.mvitv2.MultiScaleAttentionPoolFirst": _POOLED,
    "models.nest.Attention": "its attention is windowed (blocks of an image)",
    "models.nextvit.EfficientAttention": _IN_PARTS,
    "models.pvt_v2.Attention": _IN_PARTS,
    "models.shvit.SHSA": _MAP,
    "models.swin_transformer.WindowAttention": _WINDOWED_BIAS,
    "models.swin_transformer_v2.WindowAttention": _WINDOWED_BIAS,
    "models.swin_transformer_v2_cr.WindowMultiHeadAttention": _WINDOWED_BIAS,
    "models.tiny_vit.Attention": _WINDOWED_BIAS,
    "models.tnt.Attention": "its attention works inside and between patches",
    "models.twins.GlobalSubSampleAttn": _REDUCED,
    "models.twins.LocallyGroupedAttn": _WINDOWED,
    "models.vision_transformer.DiffParallelScalingBlock": _FUSED,
    "models.vision_transformer.ParallelScalingBlock": _FUSED,
    "models.vision_transformer_relpos.RelPosAttention": _BIAS,
    "models.vision_transformer_sam.Attention": _WINDOWED_BIAS,
    "models.visformer.Attention": _MAP,
    "models.volo.Attention": "its attention reads feature maps [B, H, W, C]",
    "models.volo.OutlookAttention": _WINDOWED,
}

# Layers whose work grows with N already: converting them would gain nothing.
_LINEAR = {
    "layers.attention_pool.AttentionPoolLatent": "attention pooling",
    "layers.attention_pool.AttentionPoolPrr": "attention pooling",
    "layers.attention_pool2d.AttentionPool2d": "attention pooling",
    "layers.attention_pool2d.RotAttentionPool2d": "attention pooling",
    "models.cait.ClassAttn": "class attention",
    "models.coat.FactorAttnConvRelPosEnc": "factorised attention",
    "models.crossvit.CrossAttention": "class attention",
    "models.davit.ChannelAttention": "channel attention",
    "models.davit.ChannelAttentionV2": "channel attention",
    "models.edgenext.CrossCovarianceAttn": "channel attention",
    "models.efficientvit_mit.LiteMLA": "multi-scale attention",
    "models.mobilevit.LinearSelfAttention": "separable attention",
    "models.swiftformer.EfficientAdditiveAttention": "additive attention",
    "models.volo.ClassAttention": "class attention",
    "models.xcit.ClassAttentionBlock": "class attention",
    "models.xcit.XCA": "channel attention",
}

# Families without any of the above whose tokens are mixed by something else.
_FAMILIES = {
    "mlp_mixer": "its tokens are mixed by fixed matrices (MLP)",
    "sequencer": "its tokens are mixed by recurrent layers",
    "efficientvim": "its tokens are mixed by state-space layers",
    "mambaout": "its tokens are mixed by gated convolutions",
}


def already_linear(model: nn.Module) -> tuple[str, ...]:
    """List attention that is left alone by rule, kind and class, with its place."""
    found: dict[str, str] = {}
    for path, module in model.named_modules():
        kind = _LINEAR.get(_key(module))
        if kind is not None:
            found.setdefault(f"{kind} ({type(module).__name__})", path)
    return tuple(f"{what} at {path}" for what, path in found.items())


def why_refused(model: nn.Module) -> str:
    """Say in one clause what stands where convertible attention would."""
    reasons: dict[str, set[str]] = {}
    for module in model.modules():
        key = _key(module)
        if key in _REFUSED:
            reasons.setdefault(_REFUSED[key], set()).add(type(module).__name__)
        elif key in _LINEAR:
            reason = f"its {_LINEAR[key]} is linear in tokens already, so left alone"
            reasons.setdefault(reason, set()).add(type(module).__name__)
    if reasons:
        return "; ".join(
            f"{reason} ({', '.join(sorted(names))})"
            for reason, names in sorted(reasons.items())
        )
    family = type(model).__module__.rpartition(".")[2]
    mixed = _FAMILIES.get(family, "it is convolutional")
    return f"{mixed}: it has no attention layer that mixes tokens"


def _key(module: nn.Module) -> str:
    kind = type(module)
    return f"{kind.__module__.removeprefix('timm.')}.{kind.__name__}"
