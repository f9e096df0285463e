"""attention_maps: what is shown is what the model applies."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import manyheads as mh
from manyheads.attention import MECHANISMS, AttentionSpec
from manyheads.attention.base import apply_maps
from manyheads.data.photographs import sample_photographs
from manyheads.errors import DataError, InvalidOption, ManyheadsError, MapsTooLarge
from manyheads.geometry import Geometry
from manyheads.hosts import mechanism_of
from manyheads.maps import attention_rollout
from tests.helpers import assert_close, tiny_vit

# The default landmarks want more patches than a tiny image has.
SMALL: dict[type[AttentionSpec], AttentionSpec] = {
    mh.Interactive: mh.Interactive(landmarks=(2, 2))
}
VARIANTS: tuple[AttentionSpec, ...] = (
    *(SMALL.get(kind, kind()) for kind in MECHANISMS),
    mh.Hydra(kernel="mean"),
    mh.Hydra(kernel="aft"),
    mh.Hydra(reference_tokens=9),
    mh.Interactive(landmarks=(2, 3), mix="both"),
    mh.Hallucinated(stage="logits", rank=2, cross_map=True),
    mh.Hallucinated(kernel_size=5, rank="full", exempt_prefix=False),
    mh.Hallucinated(layout="grid", rank=3, cross_map=True),
)
each_spec = pytest.mark.parametrize("spec", VARIANTS, ids=repr)


def _model(spec: AttentionSpec, **changes: object) -> nn.Module:
    return mh.convert(
        tiny_vit(depth=2, **changes), mh.Recipe(mh.Swap(blocks=[1], attention=spec))
    )


def _mixed(model: nn.Module, images: Tensor) -> list[Tensor]:
    """Record what every mechanism in the model gives."""
    outputs: list[Tensor] = []
    for module in model.modules():
        core = mechanism_of(module)
        if core is not None:
            core.register_forward_hook(lambda *args: outputs.append(args[2]))
    with torch.no_grad():
        model(images)
    return outputs


@pytest.mark.parametrize("size", [(32, 32), (40, 64)], ids=str)
@each_spec
def test_maps_applied_to_values_reproduce_the_block_s_output(
    spec: AttentionSpec, size: tuple[int, int]
) -> None:
    model = _model(spec, dynamic_img_size=True).double()
    images = torch.randn(2, 3, *size, dtype=torch.float64)
    found = mh.attention_maps(model, images)
    everywhere = mh.convert(
        model, mh.Recipe(mh.Swap(blocks=[0], attention=mh.Softmax()))
    )
    expected = _mixed(everywhere, images)
    assert [block.block for block in found.blocks] == [0, 1]
    for block, output in zip(found.blocks, expected, strict=True):
        assert_close(apply_maps(block.maps, block.values), output)


@each_spec
def test_part_of_the_maps_is_part_of_all_maps(spec: AttentionSpec) -> None:
    model, images = _model(spec), torch.randn(2, 3, 32, 32)
    whole = mh.attention_maps(model, images, blocks=[-1]).blocks[0]
    part = mh.attention_maps(
        model, images, blocks=[-1], heads=[3, 1], queries=[0, -1]
    ).blocks[0]
    assert (part.block, part.heads, part.queries) == (1, (3, 1), (0, 16))
    assert_close(part.maps, whole.maps[:, [3, 1]][:, :, [0, 16]])
    assert_close(part.influence, whole.influence[:, [0, 16]])
    none = mh.attention_maps(model, images, blocks=[-1], heads=(), queries=[0])
    assert none.blocks[0].maps.shape == (2, 0, 1, 17)
    assert_close(none.blocks[0].influence, whole.influence[:, :1])


@pytest.mark.parametrize("kernel", ["cosine", "mean", "aft"])
def test_hydra_s_influence_is_the_length_of_what_its_maps_add(kernel: str) -> None:
    model = _model(mh.Hydra(kernel=kernel)).double()
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    block = mh.attention_maps(model, images, blocks=[1]).blocks[0]
    assert block.per == "feature"
    assert block.maps.shape == (2, 48, 17, 17)
    values = block.values.flatten(2).transpose(1, 2)  # [B, D, N]
    added = block.maps * values[:, :, None]
    assert_close(block.influence, added.norm(dim=1))


def test_hydra_s_contributions_are_shares_of_the_summary() -> None:
    model = _model(mh.Hydra()).double()
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    block = mh.attention_maps(model, images, blocks=[1]).blocks[0]
    assert block.contributions is not None
    assert_close(block.contributions.sum(dim=1), torch.ones(2, dtype=torch.float64))
    # Leaving a token out takes exactly its share along the summary.
    unit_keys = block.maps[:, :, 0] / block.maps[:, :, 0].norm(dim=1, keepdim=True)
    assert unit_keys.isfinite().all()
    softmax = mh.attention_maps(model, images, blocks=[0]).blocks[0]
    assert softmax.contributions is None
    assert_close(softmax.maps.sum(dim=-1), torch.ones_like(softmax.maps[..., 0]))


def test_the_picture_lies_as_the_image_lies() -> None:
    model = tiny_vit(depth=1, class_token=False, global_pool="avg", reg_tokens=2)
    images = torch.zeros(1, 3, 32, 64)
    block = mh.attention_maps(model, images).blocks[0]
    assert block.grid == (4, 8)
    assert block.num_prefix_tokens == 2
    picture = block.on_grid(block.influence)
    assert picture.shape == (1, 34, 4, 8)
    assert torch.equal(picture[0, 0].flatten(), block.influence[0, 0, 2:])


def test_photographs_are_prepared_and_shown_as_the_model_saw_them() -> None:
    found = mh.attention_maps(
        tiny_vit(depth=1), list(sample_photographs()), image_size=(32, 60), queries=[0]
    )
    assert found.image_size == (32, 60)
    assert found.pictures.shape == (2, 3, 32, 64)
    assert 0 <= found.pictures.min() < found.pictures.max() <= 1
    assert found.blocks[0].grid == (4, 8)
    assert json.loads(json.dumps(found.to_json()))["blocks"][0]["grid"] == [4, 8]
    assert "block 0 blocks.0.attn: Softmax(), 4 heads, 1 queries" in str(found)


def test_the_model_is_not_touched() -> None:
    model = _model(mh.Hydra()).train()
    text = repr(model)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    mh.attention_maps(model, torch.randn(1, 3, 40, 40))
    assert repr(model) == text
    assert model.training
    assert not any(m._forward_pre_hooks for m in model.modules())
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])


def _stirred(spec: AttentionSpec, **changes: object) -> nn.Module:
    """A model whose mixes and kernels are no longer what they start as."""
    model = _model(spec, **changes)
    core = mechanism_of(model.blocks[1].attn)
    assert core is not None
    with torch.no_grad():
        for parameter in core.parameters():
            parameter.add_(torch.randn_like(parameter) / 3)
    return model


@each_spec
def test_rows_of_trained_maps_are_rows_of_all_maps(spec: AttentionSpec) -> None:
    # The class token, an inner patch, a corner, both ends of a row, one token twice.
    queries = [0, 11, 24, 6, 7, 11]
    model = _stirred(spec, dynamic_img_size=True).double()
    images = torch.randn(2, 3, 32, 48, dtype=torch.float64)
    whole = mh.attention_maps(model, images, blocks=[1]).blocks[0]
    # Of four heads the first two are real where half of them are hallucinated.
    for heads in ([2, 0, 3], [1], [3], [0, 1], [-1, 2, 3]):
        part = mh.attention_maps(
            model, images, blocks=[1], heads=heads, queries=queries
        )
        expected = whole.maps[:, heads][:, :, queries]
        assert_close(part.blocks[0].maps, expected)


@each_spec
def test_maps_that_are_built_in_parts_obey_the_same_law(spec: AttentionSpec) -> None:
    # Maps of 33 MiB and more, one image; Hydra has one for each of 48 features.
    size = 48 if isinstance(spec, mh.Hydra) else 64
    model = _stirred(spec, patch_size=2, img_size=size).double()
    images = torch.randn(1, 3, size, size, dtype=torch.float64)
    block = mh.attention_maps(model, images, blocks=[1]).blocks[0]
    assert block.maps.nbytes > 32 * 1024**2
    everywhere = mh.convert(
        model, mh.Recipe(mh.Swap(blocks=[0], attention=mh.Softmax()))
    )
    output = _mixed(everywhere, images)[1]
    assert_close(apply_maps(block.maps, block.values), output)
    if isinstance(spec, mh.Hydra):
        values = block.values.flatten(2).transpose(1, 2)
        expected = (block.maps * values[:, :, None]).norm(dim=1)
    else:
        expected = block.maps.mean(dim=1)
    assert_close(block.influence, expected)


@pytest.mark.parametrize("prefix", [0, 2], ids=["no prefix", "two prefix tokens"])
@pytest.mark.parametrize(
    "spec", [s for s in VARIANTS if not isinstance(s, mh.Softmax)], ids=repr
)
def test_rows_honour_a_mask_as_all_maps_do(spec: AttentionSpec, prefix: int) -> None:
    geometry = Geometry(
        dim=16,
        num_heads=4,
        head_dim=4,
        num_prefix_tokens=prefix,
        grid=(3, 4),
        scale=0.5,
    )
    core = spec.build(geometry).double()
    with torch.no_grad():
        for parameter in core.parameters():
            parameter.add_(torch.randn_like(parameter) / 3)
    tokens, real = 12 + prefix, spec.num_query_heads(geometry)
    q, k = torch.randn(2, 2, tokens, real, 4, dtype=torch.float64).unbind(0)
    mask = torch.rand(2, tokens) > 0.3
    whole = core.maps(q, k, mask, (3, 4))
    queries, heads = [tokens - 1, 0, 5], [3, 1]
    rows = core.rows(q, k, queries=queries, heads=heads, mask=mask, grid=(3, 4))
    assert_close(rows, whole[:, heads][:, :, queries])


@pytest.mark.parametrize("masked", [False, True], ids=["all keys", "masked"])
def test_hydra_s_rows_count_keys_where_these_are_fewer(masked: bool) -> None:
    geometry = Geometry(
        dim=8, num_heads=2, head_dim=4, num_prefix_tokens=0, grid=(4, 4), scale=0.5
    )
    core = mh.Hydra(reference_tokens=9).build(geometry).double()
    q = torch.randn(2, 16, 2, 4, dtype=torch.float64)
    k, v = torch.randn(2, 2, 4, 2, 4, dtype=torch.float64).unbind(0)
    mask = torch.tensor([[True, True, False, True]] * 2) if masked else None
    everything = {"queries": range(16), "mask": mask}
    rows = core.rows(q, k, heads=range(8), **everything)
    assert_close(rows, core.maps(q, k, mask))
    assert_close(apply_maps(rows, v), core(q, k, v, mask))
    added = rows * v.flatten(2).transpose(1, 2)[:, :, None]
    assert_close(core.influence(q, k, v, **everything), added.norm(dim=1))


class _Largest(TorchDispatchMode):
    """Notes the largest tensor that any operator gives, in bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self.bytes = max(self.bytes, tensor.numel() * tensor.element_size())
        return result


@pytest.mark.parametrize(
    "spec",
    [mh.Softmax(), mh.Hydra(), mh.Interactive(), mh.Hallucinated()],
    ids=repr,
)
def test_one_token_s_maps_at_1080p_never_hold_all_pairs(spec: AttentionSpec) -> None:
    geometry = Geometry(
        dim=384,
        num_heads=6,
        head_dim=64,
        num_prefix_tokens=1,
        grid=(68, 120),
        scale=0.125,
    )
    tokens = 1 + 68 * 120
    core = spec.build(geometry)
    real = spec.num_query_heads(geometry)
    q, k = torch.randn(2, 1, tokens, real, 64).unbind(0)
    v = torch.randn(1, tokens, 6, 64)
    with torch.no_grad(), _Largest() as largest:
        rows = core.rows(q, k, queries=[0], heads=[0, 5], grid=(68, 120))
        seen = core.influence(q, k, v, queries=[0], grid=(68, 120))
    assert rows.shape == (1, 2, 1, tokens)
    assert seen.shape == (1, 1, tokens)
    # All pairs of one head take 254 MiB; keys and values of all heads 12 MiB each.
    assert largest.bytes < 16 * 1024**2


class _Held(TorchDispatchMode):
    """Notes the most bytes that what operators gave has held at one time."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                seen = StorageWeakRef(storage)
                self.alive[seen.cdata] = seen, storage.nbytes()
        self.alive = {
            key: (seen, size)
            for key, (seen, size) in self.alive.items()
            if not seen.expired()
        }
        held = sum(size for _, size in self.alive.values())
        self.bytes = max(self.bytes, held)
        return result


@pytest.mark.parametrize(
    ("spec", "heads"),
    [
        (mh.Softmax(), [0]),
        (mh.Hydra(reference_tokens=9), [0]),
        (mh.Interactive(), [0]),
        (mh.Hallucinated(), []),
        (mh.Hallucinated(cross_map=True), [23]),
    ],
    ids=repr,
)
def test_heads_that_are_not_asked_for_are_never_held(
    spec: AttentionSpec, heads: list[int]
) -> None:
    model = _model(spec, patch_size=2, img_size=96, num_heads=24)
    images = torch.randn(1, 3, 96, 96)
    with _Held() as held:
        found = mh.attention_maps(
            model, images, blocks=[1], heads=heads, queries=range(1000)
        )
    one_map = 4 * 1000 * 2305
    assert found.blocks[0].maps.nbytes == one_map * len(heads)
    # These rows of one map take 9 MiB, of all heads 211, more than once on the way; a
    # part takes 32, and a mechanism holds a few of them.
    assert held.bytes < one_map * (len(heads) + 1) + 176 * 1024**2


@pytest.mark.parametrize(
    "spec",
    [mh.Hydra(), mh.Interactive(landmarks=(2, 2)), mh.Hallucinated()],
    ids=repr,
)
def test_maps_of_a_1080p_photograph_stay_small(spec: AttentionSpec) -> None:
    model = _model(spec, patch_size=16)
    with _Largest() as largest:
        found = mh.attention_maps(
            model,
            sample_photographs()[0],
            image_size=(1080, 1920),
            heads=[0, 3],
            queries=[0],
        )
    assert [block.grid for block in found.blocks] == [(68, 120)] * 2
    assert [block.maps.shape for block in found.blocks] == [(1, 2, 1, 8161)] * 2
    # The picture itself takes 25 MiB, all pairs of one head 254 MiB.
    assert largest.bytes < 50 * 1024**2


def test_a_few_rows_of_a_large_image_take_little_memory() -> None:
    model = _model(mh.Hydra(), patch_size=2, img_size=128)
    images = torch.randn(1, 3, 128, 128)
    with pytest.raises(MapsTooLarge, match=r"4\d+ tokens.*blocks=\[-1\]"):
        mh.attention_maps(model, images, blocks=[1])
    few = mh.attention_maps(model, images, heads=range(2), queries=[0])
    assert [tuple(b.maps.shape) for b in few.blocks] == [(1, 2, 1, 4097)] * 2


@pytest.mark.parametrize(
    ("options", "facts"),
    [
        ({"blocks": [2]}, r"blocks=\[2\].*there are 2"),
        ({"heads": [4], "blocks": [0]}, r"heads=\[4\].*there are 4.*blocks\.0\.attn"),
        ({"queries": [17]}, r"queries=\[17\].*from 0 to 16"),
    ],
)
def test_numbers_out_of_range_are_named(options: dict[str, object], facts: str) -> None:
    with pytest.raises(InvalidOption, match=facts):
        mh.attention_maps(_model(mh.Hydra()), torch.randn(1, 3, 32, 32), **options)


def test_images_of_the_wrong_form_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"\[3, 32, 32\].*\[B, 3, H, W\]"):
        mh.attention_maps(tiny_vit(depth=1), torch.randn(3, 32, 32))
    with pytest.raises(DataError, match=r"absent\.jpg.*No such file"):
        mh.attention_maps(tiny_vit(depth=1), tmp_path / "absent.jpg")


@pytest.mark.parametrize(
    ("broken", "facts"),
    [
        (torch.zeros(1, 3, 32, 32, dtype=torch.uint8), r"torch\.uint8"),
        (torch.full((2, 3, 32, 32), torch.nan), "image 0 and 1 others hold NaN"),
        (torch.full((1, 3, 32, 32), torch.inf), "infinity"),
        (torch.zeros(1, 4, 32, 32), "4 channels and the model wants 3"),
    ],
    ids=["uint8", "NaN", "infinity", "channels"],
)
def test_tensors_that_are_not_preprocessed_are_refused(
    broken: Tensor, facts: str
) -> None:
    for looking in (mh.attention_maps, attention_rollout):
        with pytest.raises(DataError, match=rf"{facts}.*float tensor \[B, 3, H, W\]"):
            looking(tiny_vit(depth=1), broken)


def test_a_rollout_through_softmax_is_the_published_product() -> None:
    model, images = tiny_vit(depth=3), torch.randn(2, 3, 32, 32)
    rolled = attention_rollout(model, images, queries=[0, 5])
    product = torch.eye(17, dtype=torch.float64)
    for block in mh.attention_maps(model, images).blocks:
        step = (torch.eye(17) + block.maps.mean(dim=1)) / 2
        product = step.double() @ product
    assert_close(rolled, product[:, [0, 5]].float())


@each_spec
def test_a_rollout_runs_through_mixed_models_and_its_rows_sum_to_one(
    spec: AttentionSpec,
) -> None:
    rolled = attention_rollout(_model(spec), torch.randn(2, 3, 32, 32))
    assert rolled.shape == (2, 1, 17)
    assert (rolled >= 0).all()
    assert_close(rolled.sum(dim=-1), torch.ones(2, 1))


def test_a_block_that_never_runs_is_an_error_and_no_empty_answer() -> None:
    model = tiny_vit(depth=2)
    model.blocks[1].forward = lambda x, **_: x
    with pytest.raises(ManyheadsError, match=r"block 1.*did not run.*blocks=\[0\]"):
        mh.attention_maps(model, torch.randn(1, 3, 32, 32))


def test_blocks_that_are_convolutions_have_no_maps_and_say_so() -> None:
    model = timm.create_model("nextvit_small", depths=(1, 1, 5, 1), num_classes=7)
    images = torch.randn(1, 3, 64, 64)
    found = mh.attention_maps(model.eval(), images, heads=(), queries=[0])
    assert [block.block for block in found.blocks] == [1, 6, 7]
    with pytest.raises(
        InvalidOption, match=r"block 0.*convolution.*blocks=\[1, 6, 7\]"
    ):
        mh.attention_maps(model, images, blocks=[0, 6])
    with pytest.raises(ManyheadsError, match=r"rollout.*convolution"):
        attention_rollout(model, images)
