"""Vision transformers of Hugging Face's transformers, versions 4.57 and 5."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from manyheads.attention import AttentionSpec, Softmax
from manyheads.errors import CheckpointError, ImageSizeError, ManyheadsError
from manyheads.ffn import CompactLinear
from manyheads.geometry import Geometry, Grid, fit_to_patches
from manyheads.hosts import hf_attention
from manyheads.hosts.base import Host, ImageInput, Site, TokenGrid, mechanism_of
from manyheads.hosts.heads import build_core
from manyheads.hosts.hf_names import (
    MODELS,
    REASONS,
    attention_of,
    ffn_output_of,
    first_of,
    is_layer,
    vision_root,
)
from manyheads.hosts.hf_processor import PROCESSOR_FILE, input_of, processor_of

__all__ = ["HuggingFaceViT"]

# Constructor arguments beside the configuration that change what is built.
_SWITCHES = ("add_pooling_layer", "use_mask_token")
_RESAVE = "Load only checkpoints written by manyheads.save()."


class HuggingFaceViT(Host):
    """Hosts the plain vision transformers of transformers, alone or in a CLIP.

    Only the tower that looks at images is touched; a text tower beside it keeps its
    attention function. A mechanism is a child `core` of the library's own attention
    module, whose projections stay where they are.
    """

    name: ClassVar[str] = "transformers"

    def recognises(self, model: nn.Module) -> bool:
        """Look at the class's module only, so that nothing need be imported."""
        return any(
            kind.__module__.startswith("transformers.") for kind in type(model).__mro__
        )

    def sites(self, model: nn.Module) -> tuple[Site, ...]:
        """List the blocks of the vision tower."""
        root_path, root = vision_root(model)
        if root is None:
            return ()
        found = [(path, m) for path, m in root.named_modules() if is_layer(m)]
        prefix = f"{root_path}." if root_path else ""
        return tuple(
            _site(root, index, f"{prefix}{path}", layer)
            for index, (path, layer) in enumerate(found)
        )

    def refusal(self, model: nn.Module) -> str:
        """Name what the family does; the table is in `hf_names`."""
        name = type(model).__name__
        for prefix, reason in REASONS.items():
            if name.startswith(prefix):
                return reason
        return f"the blocks of {name} are not among those whose forward pass is known"

    def left_alone(self, model: nn.Module) -> tuple[str, ...]:
        """List attention pooling: one query, so that its work is linear in tokens."""
        return tuple(
            f"attention pooling ({type(module).__name__}) at {path}"
            for path, module in model.named_modules()
            if type(module).__name__.endswith("MultiheadAttentionPoolingHead")
        )

    def swap_attention(
        self, model: nn.Module, site: Site, spec: AttentionSpec
    ) -> nn.Module:
        """Give the library's attention module a mechanism and have it called."""
        hf_attention.register()
        attention: Any = model.get_submodule(site.attention_path)
        like = first_of(attention, "q_proj", "query").weight
        attention.core = build_core(spec, site.geometry, like)
        # One configuration serves the whole tower, and no other.
        attention.config._attn_implementation = hf_attention.NAME
        return attention  # type: ignore[no-any-return]

    def track_grid(self, model: nn.Module) -> None:
        """Hook the patch convolution where a mechanism asks for the grid."""
        layers: list[Any] = [m for m in model.modules() if mechanism_of(m) is not None]
        waiting = [m for m in layers if m.core.needs_grid]
        known = next((m.token_grid for m in layers if hasattr(m, "token_grid")), None)
        convolution = _patch_convolution(vision_root(model)[1])
        if waiting and known is None and convolution is not None:
            known = TokenGrid()
            convolution.register_forward_hook(known.watch_map)
        for layer in waiting:
            if known is not None:
                layer.token_grid = known

    def feed(self, model: Any, images: Tensor) -> Any:
        """Run the vision tower; SigLIP 2 gets its patches, ViT-MAE fixed noise."""
        root = vision_root(model)[1]
        if root.config._attn_implementation == hf_attention.NAME:
            # A model that was pickled meets a process that never converted one.
            hf_attention.register()
        runs = root if hasattr(model, "get_image_features") else model
        embeddings = type(root.embeddings).__name__
        if embeddings == "Siglip2VisionEmbeddings":
            return _feed_patches(runs, images, root.config.patch_size)
        if embeddings == "ViTMAEEmbeddings":
            patch = _pair(root.config.patch_size)
            count = (images.shape[-2] // patch[0]) * (images.shape[-1] // patch[1])
            # The same patches for every image and every model: student and teacher.
            chance = torch.rand(1, count, generator=torch.Generator().manual_seed(0))
            noise = chance.to(images.device).expand(images.shape[0], -1)
            return runs(images, noise=noise)
        with _rotation_without_values(root, images):
            return runs(images)

    def output(self, result: Any) -> Tensor:
        """Give logits, an image embedding, feature maps or all tokens: the first of it.

        Raises:
            ManyheadsError: The model returned none of these.
        """
        if isinstance(result, tuple | list):
            result = result[0]
        if isinstance(result, Tensor):
            return result
        for name in ("logits", "image_embeds", "feature_maps", "last_hidden_state"):
            value = getattr(result, name, None)
            if value is not None:
                tensor: Tensor = value[-1] if isinstance(value, tuple) else value
                return tensor
        raise ManyheadsError(
            asked="comparing what two models return",
            found=f"{type(result).__name__} holds no logits, embedding or tokens",
            fix="Use a model with a head, or one that returns last_hidden_state.",
        )

    def gives_scores(self, model: nn.Module, output: Tensor) -> bool:
        """Look at the class: only these have a classifier; others give features."""
        return "ForImageClassification" in type(model).__name__

    def image_input(self, model: Any) -> ImageInput:
        """Read the image processor; without one, the family's usual statistics."""
        root = vision_root(model)[1]
        return input_of(model, root, _native_size(root))

    def resize(self, model: Any, image_size: tuple[int, int]) -> tuple[int, int]:
        """Have the library resample its positions on the fly, at any whole grid.

        Families that need it are called with `interpolate_pos_encoding=True` from now
        on, through a hook on their embeddings; no weight changes.
        """
        root = vision_root(model)[1]
        actual = fit_to_patches(image_size, _pair(root.config.patch_size))
        embeddings = root.embeddings
        if actual == _native_size(root) or _is_interpolating(embeddings):
            return actual
        if not _takes_interpolation(embeddings):
            if type(embeddings).__name__ in _ANY_SIZE:
                return actual
            height, width = _native_size(root)
            raise ImageSizeError(
                asked=f"image_size={image_size[0]}x{image_size[1]}",
                found=f"{type(root).__name__} is built for {height}x{width}",
                why="its embeddings cannot interpolate their positions",
                fix=f"Use image_size=({height}, {width}).",
            )
        embeddings.register_forward_pre_hook(_interpolate, with_kwargs=True)
        return actual

    def labels(self, model: Any) -> tuple[str, ...]:
        """Read the class names of the configuration, where there is a classifier."""
        if "ForImageClassification" not in type(model).__name__:
            return ()
        names = model.config.id2label
        return tuple(str(names[index]) for index in sorted(names))

    def describe(self, model: Any) -> dict[str, Any]:
        """Give the class's name, its configuration and the image processor's."""
        import transformers

        name = type(model).__name__
        if name not in MODELS or getattr(transformers, name, None) is not type(model):
            raise CheckpointError(
                asked=f"saving a {name}",
                found="it is no class of transformers that this version may rebuild",
                why="a checkpoint holds data only, so the model must be built by name",
                fix=f"Use one of {', '.join(sorted(MODELS))}.",
            )
        config = json.loads(model.config.to_json_string(use_diff=False))
        root = vision_root(model)[1]
        present = {
            "add_pooling_layer": getattr(root, "pooler", None) is not None,
            "use_mask_token": getattr(root.embeddings, "mask_token", None) is not None,
        }
        parameters = inspect.signature(type(model).__init__).parameters
        return {
            "class": name,
            "major": transformers.__version__.partition(".")[0],
            "config": {k: v for k, v in config.items() if k not in _DROPPED},
            "switches": {k: present[k] for k in _SWITCHES if k in parameters},
            "interpolate": _is_interpolating(root.embeddings),
            "processor": processor_of(model),
        }

    def rebuild(self, description: dict[str, Any]) -> nn.Module:
        """Build a listed class from its configuration alone; no code is fetched."""
        import transformers

        name, config = description.get("class"), description.get("config")
        switches, problem = description.get("switches"), None
        major = transformers.__version__.partition(".")[0]
        if name not in MODELS or not hasattr(transformers, name):
            problem = f"{name!r} is no class that a checkpoint may name"
        elif description.get("major") != major:
            problem = (
                f"it was written with transformers {description.get('major')!r} and "
                f"this is {transformers.__version__}: parts have other names"
            )
        elif not isinstance(config, dict) or _DROPPED & set(config):
            problem = "its configuration is missing or names code or files"
        elif not isinstance(switches, dict) or set(switches) - set(_SWITCHES):
            problem = f"its switches are {switches!r}"
        if problem:
            raise _not_buildable(name, problem)
        kind = getattr(transformers, str(name))
        try:
            model: Any = kind(kind.config_class.from_dict(config), **(switches or {}))
        except Exception as error:
            raise _not_buildable(name, f"transformers refuses: {error}") from error
        if description.get("interpolate"):
            embeddings = vision_root(model)[1].embeddings
            embeddings.register_forward_pre_hook(_interpolate, with_kwargs=True)
        processor = description.get("processor")
        if processor is not None:
            model.manyheads_processor = processor
        return model  # type: ignore[no-any-return]

    def extra_files(self, model: nn.Module) -> dict[str, str]:
        """Write the image processor where `AutoImageProcessor` looks for it."""
        processor = processor_of(model)
        return {PROCESSOR_FILE: json.dumps(processor, indent=2)} if processor else {}


# Fields that lead to files or code, or that say nothing about the architecture.
_DROPPED = frozenset({"_name_or_path", "auto_map", "architectures", "custom_pipelines"})
# Embeddings that take any whole grid without being told.
_ANY_SIZE = frozenset(
    {
        "Dinov2Embeddings",
        "Dinov2WithRegistersEmbeddings",
        "DINOv3ViTEmbeddings",
        "Siglip2VisionEmbeddings",
    }
)


def _site(root: Any, index: int, path: str, layer: nn.Module) -> Site:
    attention_path, projections = attention_of(layer)
    attention = layer.get_submodule(attention_path)
    core = mechanism_of(attention)
    ffn = ffn_output_of(layer)
    output = layer.get_submodule(ffn[0]) if ffn else None
    return Site(
        index=index,
        path=path,
        attention_path=f"{path}.{attention_path}",
        ffn_path=f"{path}.{ffn[0]}" if ffn else None,
        geometry=core.geometry if core else _geometry(root, attention),
        attention=core.spec if core else Softmax(),
        ffn=output.spec if isinstance(output, CompactLinear) else None,
        attention_parts=(f"{path}.{projections}",),
        ffn_parts=tuple(f"{path}.{part}" for part in ffn[1]) if ffn else (),
        fixed_query_heads="transformers reshapes queries by the layer's own head count",
    )


def _geometry(root: Any, attention: Any) -> Geometry:
    num_heads = first_of(attention, "num_heads", "num_attention_heads")
    head_dim = first_of(attention, "head_dim", "attention_head_size")
    query = first_of(attention, "q_proj", "query")
    return Geometry(
        dim=query.in_features,
        num_heads=num_heads,
        head_dim=head_dim,
        num_prefix_tokens=_num_prefix_tokens(root.embeddings),
        grid=_native_grid(root),
        scale=first_of(attention, "scaling", "scale"),
        attention_dropout=first_of(
            attention, "attention_dropout", "dropout_prob", "dropout"
        ),
    )


def _num_prefix_tokens(embeddings: Any) -> int:
    single = ("cls_token", "class_embedding", "distillation_token")
    count = sum(getattr(embeddings, name, None) is not None for name in single)
    registers = getattr(embeddings, "register_tokens", None)
    return count + (registers.shape[1] if registers is not None else 0)


def _native_size(root: Any) -> tuple[int, int]:
    if hasattr(root.config, "image_size"):
        return _pair(root.config.image_size)
    # SigLIP 2 knows a number of patches; its positions are a square of that area.
    side = root.config.patch_size * int(root.config.num_patches**0.5)
    return side, side


def _native_grid(root: Any) -> Grid | None:
    """Give the grid, or None where blocks do not see all patches in their order."""
    if _patch_convolution(root) is None or hasattr(root.config, "mask_ratio"):
        return None
    patch = _pair(root.config.patch_size)
    height, width = _native_size(root)
    return height // patch[0], width // patch[1]


def _patch_convolution(root: Any) -> nn.Conv2d | None:
    found = (m for m in root.embeddings.modules() if isinstance(m, nn.Conv2d))
    return next(found, None)


def _feed_patches(model: Any, images: Tensor, side: int) -> Any:
    """Cut images into rows of patch values, as SigLIP 2's image processor does."""
    B, C, height, width = images.shape
    rows, columns = height // side, width // side
    patches = images.reshape(B, C, rows, side, columns, side)
    patches = patches.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)
    return model(
        patches,
        pixel_attention_mask=None,
        spatial_shapes=torch.tensor([[rows, columns]] * B),
    )


@contextmanager
def _rotation_without_values(root: Any, images: Tensor) -> Iterator[None]:
    """Count DINOv3 on the meta device, where version 4 cannot make its rotation."""
    rotation = getattr(root, "rope_embeddings", None)
    if rotation is None or images.device.type != "meta":
        yield
        return
    patch = _pair(root.config.patch_size)
    count = (images.shape[-2] // patch[0]) * (images.shape[-1] // patch[1])
    waves = images.new_empty(count, rotation.head_dim)
    rotation.forward = lambda _: (waves, waves)
    try:
        yield
    finally:
        del rotation.forward


def _interpolate(
    _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Forward pre-hook: have positions resampled to the image's grid."""
    return args, kwargs | {"interpolate_pos_encoding": True}


def _is_interpolating(embeddings: nn.Module) -> bool:
    return _interpolate in embeddings._forward_pre_hooks.values()


def _takes_interpolation(embeddings: nn.Module) -> bool:
    return (
        "interpolate_pos_encoding" in inspect.signature(embeddings.forward).parameters
    )


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[1])


def _not_buildable(name: object, found: str) -> CheckpointError:
    return CheckpointError(
        asked=f"building the transformers model {name!r}",
        found=found,
        why="a checkpoint may name listed classes, not files, addresses or code",
        fix=_RESAVE,
    )
