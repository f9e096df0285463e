"""iViT-style backbones: convolutions early, interactive attention in the deeper stages.

iViT-style; the paper's exact configuration is not published in a form we could read.
The sizes here are ours, chosen to sit near 5, 13 and 30 million parameters.

Kang, Yang, Ryu, "Interactive Multi-Head Self-Attention with Linear Complexity", 2024,
arXiv 2402.17507.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import (
    ClassifierHead,
    ConvNormAct,
    LayerNorm2d,
    calculate_drop_path_rates,
    trunc_normal_,
)
from timm.models import (
    build_model_with_cfg,
    generate_default_cfgs,
    register_model,
)
from timm.models._features import feature_take_indices  # exported nowhere else
from torch import Tensor, nn

from manyheads.attention.interactive import Interactive, Mix
from manyheads.backbones.blocks import ConvBlock, Stage, TokenBlock
from manyheads.errors import InvalidOption

__all__ = ["IVit", "ivit_base", "ivit_small", "ivit_tiny"]

NATIVE_SIDE = 224


class IVit(nn.Module):
    """A hierarchical backbone with linear cost in the number of pixels.

    Four stages at strides 4, 8, 16 and 32. The first two are convolutional; the last
    two attend through landmarks, with heads that talk (`Interactive`). Places are told
    by convolutions, so any image size runs, and the same weights serve all of them; on
    a picture with fewer rows or columns than landmarks the landmarks' cells overlap.

    Note:
        iViT-style; the paper's exact configuration is not published in a form we could
        read. There are no trained weights. `torch.jit` is not supported (torch has
        deprecated it); `torch.export`, `torch.compile` and `torch.fx` are.

    Args:
        in_chans: Colour channels.
        num_classes: Classes; 0 for none.
        global_pool: "avg", "max", "avgmax", "catavgmax", or "" for none.
        dims: Width of each stage; the last two are multiples of 32.
        depths: Blocks of each stage.
        mlp_ratio: Hidden width over width.
        landmarks: Rows and columns of landmarks.
        mix: Where heads are mixed; see `Interactive`.
        drop_rate: Dropout before the classifier.
        proj_drop_rate: Dropout after projections.
        drop_path_rate: Probability to skip the last block; grows from 0.
        device: Where parameters are made.
        dtype: What parameters are made of.

    Raises:
        InvalidOption: A width is no multiple of 32, or the mechanism refuses
            `landmarks` or `mix`.
    """

    def __init__(
        self,
        *,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        dims: Sequence[int] = (40, 80, 160, 320),
        depths: Sequence[int] = (2, 2, 6, 2),
        mlp_ratio: float = 4.0,
        landmarks: tuple[int, int] | list[int] = (7, 7),
        mix: Mix = "after",
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _require_widths(dims)
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.num_classes, self.in_chans = num_classes, in_chans
        # A list is what a pair becomes on its way through JSON.
        rows, columns = landmarks
        attention = Interactive(landmarks=(rows, columns), mix=mix)
        options = {"mlp_ratio": mlp_ratio, "proj_drop": proj_drop_rate, **dd}
        drops = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        self.stem = nn.Sequential(
            ConvNormAct(
                in_chans, dims[0] // 2, 3, stride=2, act_layer=nn.GELU, padding=1, **dd
            ),
            ConvNormAct(
                dims[0] // 2, dims[0], 3, stride=2, apply_act=False, padding=1, **dd
            ),
        )
        stages = []
        for i, dim in enumerate(dims):
            side = NATIVE_SIDE // 2 ** (i + 2)
            blocks: list[nn.Module] = [
                ConvBlock(dim, drop_path=drop, **options)
                if i < 2
                else TokenBlock(
                    dim,
                    grid=(side, side),
                    attention=attention,
                    drop_path=drop,
                    **options,
                )
                for drop in drops[i]
            ]
            stages.append(Stage(_downsample(dims, i, dd), blocks))
        self.stages = nn.Sequential(*stages)
        self.feature_info = [
            {"num_chs": dim, "reduction": 2 ** (i + 2), "module": f"stages.{i}"}
            for i, dim in enumerate(dims)
        ]
        self.num_features = dims[-1]
        self.norm = LayerNorm2d(dims[-1], **dd)
        self.head = ClassifierHead(
            dims[-1], num_classes, pool_type=global_pool, drop_rate=drop_rate, **dd
        )
        self.head_hidden_size = self.head.num_features
        self.apply(_initialise)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Name the head mixes: decay would pull the identity towards silence."""
        return {name for name, _ in self.named_parameters() if ".core.mix_" in name}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Group parameters by depth, for rates that differ by layer."""
        blocks = r"^stages\.(\d+)\.blocks\.(\d+)"
        fine = [
            (blocks, None),
            (r"^stages\.(\d+)\.downsample", (0,)),
            (r"^norm", (99999,)),
        ]
        return {"stem": r"^stem", "blocks": r"^stages\.(\d+)" if coarse else fine}

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Trade time for memory in training: keep block inputs, redo the rest."""
        for stage in self.stages.children():
            if isinstance(stage, Stage):
                stage.set_grad_checkpointing(enable)

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """Give the last layer."""
        classifier: nn.Module = self.head.fc
        return classifier

    def reset_classifier(
        self, num_classes: int, global_pool: str | None = None
    ) -> None:
        """Replace the last layer, and the pooling if given."""
        self.num_classes = num_classes
        self.head.reset(
            num_classes, pool_type=global_pool, in_features=self.num_features
        )
        self.head_hidden_size = self.head.num_features

    def forward_intermediates(
        self,
        x: Float[Tensor, "B channels height width"],
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """Give the features of stages, and the last ones unless told otherwise.

        Args:
            x: Images.
            indices: Stages: the last so many, or these; None for all.
            norm: Normalise the last stage's features as the classifier sees them.
            stop_early: Do not run stages past the last one asked for.
            output_fmt: "NCHW", the only form there is.
            intermediates_only: Give the list alone.

        Raises:
            InvalidOption: `output_fmt` is another.
        """
        if output_fmt != "NCHW":
            raise InvalidOption(
                asked=f"forward_intermediates(output_fmt={output_fmt!r})",
                found="features of this backbone are pictures",
                fix="Use output_fmt='NCHW'.",
            )
        wanted, last_wanted = feature_take_indices(len(self.stages), indices)
        stages = self.stages[: last_wanted + 1] if stop_early else self.stages
        last = len(self.stages) - 1
        features = []
        x = self.stem(x)
        for i, stage in enumerate(stages):
            x = stage(x)
            if i in wanted:
                features.append(self.norm(x) if norm and i == last else x)
        if intermediates_only:
            return features
        return self.norm(x) if len(stages) == len(self.stages) else x, features

    def prune_intermediate_layers(
        self,
        indices: int | list[int] = 1,
        prune_norm: bool = False,
        prune_head: bool = True,
    ) -> list[int]:
        """Drop what the asked-for stages do not need, in place; give their numbers."""
        wanted, last_wanted = feature_take_indices(len(self.stages), indices)
        shorter = last_wanted < len(self.stages) - 1
        if prune_norm or shorter:
            self.norm = nn.Identity()
        self.stages = self.stages[: last_wanted + 1]
        if shorter:
            width = self.feature_info[last_wanted]["num_chs"]
            self.num_features = self.head_hidden_size = width
        if prune_head or shorter:
            self.reset_classifier(0, "")
        return list(wanted)

    def forward_features(self, x: Float[Tensor, "B channels height width"]) -> Tensor:
        """Give the last stage's features, normalised, as a picture at stride 32."""
        features: Tensor = self.norm(self.stages(self.stem(x)))
        return features

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pool and classify."""
        out: Tensor = self.head(x, pre_logits=pre_logits)
        return out

    def forward(self, x: Float[Tensor, "B channels height width"]) -> Tensor:
        """Classify images of any size."""
        return self.forward_head(self.forward_features(x))


def _downsample(dims: Sequence[int], stage: int, dd: dict[str, Any]) -> nn.Module:
    """Halve the picture on the way into a stage; the stem did so for the first."""
    if stage == 0:
        return nn.Identity()
    made: nn.Module = ConvNormAct(
        dims[stage - 1], dims[stage], 3, stride=2, padding=1, apply_act=False, **dd
    )
    return made


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Conv2d):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def _require_widths(dims: Sequence[int]) -> None:
    if len(dims) == 4 and all(dim % 32 == 0 for dim in dims[2:]):
        return
    raise InvalidOption(
        asked=f"dims={tuple(dims)}",
        found="it is not four widths of which the last two are multiples of 32",
        why="a head is 32 wide",
        fix="Use e.g. dims=(40, 80, 160, 320).",
    )


def _cfg(**changes: Any) -> dict[str, Any]:
    return {
        "url": "",
        "num_classes": 1000,
        "input_size": (3, NATIVE_SIDE, NATIVE_SIDE),
        "pool_size": (7, 7),
        "crop_pct": 0.9,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "stem.0.conv",
        "classifier": "head.fc",
        "fixed_input_size": False,
        "license": "apache-2.0",
        **changes,
    }


default_cfgs = generate_default_cfgs(
    {"ivit_tiny": _cfg(), "ivit_small": _cfg(), "ivit_base": _cfg()}
)


def _create(variant: str, pretrained: bool, options: dict[str, Any]) -> nn.Module:
    """Give the model, or timm's wrapper around it with `features_only=True`."""
    out_indices = options.pop("out_indices", (0, 1, 2, 3))
    model: nn.Module = build_model_with_cfg(
        IVit,
        variant,
        pretrained,
        feature_cfg={"flatten_sequential": True, "out_indices": out_indices},
        **options,
    )
    return model


# timm calls what it registers with `pretrained` and whatever create_model was given.


@register_model
def ivit_tiny(pretrained: bool = False, **options: Any) -> nn.Module:
    """Build the size near 5 million parameters."""
    size = {"dims": (40, 80, 160, 320), "depths": (2, 2, 6, 2)}
    return _create("ivit_tiny", pretrained, size | options)


@register_model
def ivit_small(pretrained: bool = False, **options: Any) -> nn.Module:
    """Build the size near 13 million parameters."""
    size = {"dims": (48, 96, 256, 448), "depths": (2, 2, 8, 2)}
    return _create("ivit_small", pretrained, size | options)


@register_model
def ivit_base(pretrained: bool = False, **options: Any) -> nn.Module:
    """Build the size near 30 million parameters."""
    size = {"dims": (64, 128, 384, 640), "depths": (3, 3, 9, 2)}
    return _create("ivit_base", pretrained, size | options)
