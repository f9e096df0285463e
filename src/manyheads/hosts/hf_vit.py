"""Vision transformers of Hugging Face's transformers, versions 4.57 and 5."""

from __future__ import annotations

import inspect
import json
from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from manyheads.attention import AttentionSpec, Softmax
from manyheads.errors import CheckpointError, ImageSizeError, ManyheadsError
from manyheads.ffn import CompactLinear
from manyheads.geometry import Geometry, fit_to_patches
from manyheads.hosts import hf_attention
from manyheads.hosts.base import Host, ImageInput, Site, TokenGrid, mechanism_of
from manyheads.hosts.heads import (
    RealHeads,
    build_core,
    head_index,
    no_plain_matrix,
    permute_inputs,
    permute_outputs,
)
from manyheads.hosts.hf_images import (
    feed_images,
    interpolate,
    is_interpolating,
    native_grid,
    native_size,
    pair_of,
    patch_convolution,
    takes_any_size,
)
from manyheads.hosts.hf_names import (
    MODELS,
    PROJECTIONS,
    REASONS,
    attention_of,
    ffn_output_of,
    first_of,
    is_layer,
    output_of,
    vision_root,
)
from manyheads.hosts.hf_processor import PROCESSOR_FILE, input_of, processor_of

__all__ = ["HuggingFaceViT"]

# Constructor arguments beside the configuration that change what is built.
_SWITCHES = ("add_pooling_layer", "use_mask_token")
# Fields of what models return, the last layer's first. Version 4 warns of the `logits`
# that stand beside a reconstruction.
_OUTPUTS = (
    "reconstruction",
    "logits",
    "image_embeds",
    "predicted_depth",
    "feature_maps",
    "last_hidden_state",
)
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
        """Give the library's attention module a mechanism and have it called.

        Where a mechanism takes fewer query heads, projections of queries and keys are
        replaced by ones of the real heads.
        """
        hf_attention.register()
        attention: Any = model.get_submodule(site.attention_path)
        like = first_of(attention, "q_proj", "query").weight
        attention.core = build_core(spec, site.geometry, like)
        kept = spec.num_query_heads(site.geometry) * site.geometry.head_dim
        for names in PROJECTIONS[:2]:
            name = next(name for name in names if hasattr(attention, name))
            projection = getattr(attention, name)
            if len(projection.weight) > kept:
                setattr(attention, name, RealHeads(projection, kept))
        # One configuration serves the whole tower, and no other.
        attention.config._attn_implementation = hf_attention.NAME
        hf_attention.guard(attention)
        return attention  # type: ignore[no-any-return]

    def permute_heads(self, model: nn.Module, site: Site, order: Sequence[int]) -> None:
        """Reorder rows of the three projections and columns of the output."""
        attention = model.get_submodule(site.attention_path)
        index = head_index(order, site.geometry.head_dim)
        for names in PROJECTIONS:
            permute_outputs(first_of(attention, *names), index)
        permute_inputs(output_of(model, site.attention_path), index)

    def track_grid(self, model: nn.Module) -> None:
        """Hook the patch convolution where a mechanism asks for the grid."""
        layers: list[Any] = [m for m in model.modules() if mechanism_of(m) is not None]
        waiting = [m for m in layers if m.core.needs_grid]
        known = next((m.token_grid for m in layers if hasattr(m, "token_grid")), None)
        convolution = patch_convolution(vision_root(model)[1])
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
        return feed_images(model, root, images)

    def output(self, result: Any) -> Tensor:
        """Give the first that there is: picture, logits, embedding, maps or tokens.

        Raises:
            ManyheadsError: The model returned none of these.
        """
        if isinstance(result, tuple | list):
            result = result[0]
        if isinstance(result, Tensor):
            return result
        for name in _OUTPUTS:
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
        return input_of(model, root, native_size(root))

    def resize(self, model: Any, image_size: tuple[int, int]) -> tuple[int, int]:
        """Have the library resample its positions on the fly, at any whole grid.

        Families that need it are called with `interpolate_pos_encoding=True` from now
        on, through a hook; no weight changes.
        """
        root = vision_root(model)[1]
        actual = fit_to_patches(image_size, pair_of(root.config.patch_size))
        if actual == native_size(root) or takes_any_size(model, root):
            return actual
        if not interpolate(model, root):
            height, width = native_size(root)
            raise ImageSizeError(
                asked=f"image_size={image_size[0]}x{image_size[1]}",
                found=f"{type(root).__name__} is built for {height}x{width}",
                why="its embeddings cannot interpolate their positions",
                fix=f"Use image_size=({height}, {width}).",
            )
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
            "interpolate": is_interpolating(model, root),
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
            interpolate(model, vision_root(model)[1])
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
        fixed_query_heads=no_plain_matrix(attention, *sum(PROJECTIONS, ()))
        or no_plain_matrix(attention, "o_proj", "out_proj"),
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
        grid=native_grid(root),
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


def _not_buildable(name: object, found: str) -> CheckpointError:
    return CheckpointError(
        asked=f"building the transformers model {name!r}",
        found=found,
        why="a checkpoint may name listed classes, not files, addresses or code",
        fix=_RESAVE,
    )
