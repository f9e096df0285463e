"""Interactive attention: landmarks, mixes, masks, grids, cost, and real hosts."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import manyheads as mh
from manyheads.attention import interactive
from manyheads.attention.base import apply_maps
from manyheads.attention.interactive import InteractiveAttention, interactive_maps
from manyheads.errors import (
    GeometryMismatch,
    InvalidOption,
    InvalidRecipe,
    MaskRefused,
    SwapRefused,
)
from manyheads.geometry import Geometry, Grid
from manyheads.hosts import find_host
from manyheads.kernels import interactive as kernel
from manyheads.ledger import keep_books
from tests.helpers import assert_close, tiny_vit

MIXES = ("after", "before", "both", "none")
# Grid, prefix tokens, landmarks: N = 1, 2, 6, 63, 68, 197, 257, 261.
LAYOUTS: list[tuple[Grid, int, Grid]] = [
    ((1, 1), 0, (1, 1)),
    ((1, 1), 1, (1, 1)),
    ((1, 5), 1, (1, 3)),
    ((7, 9), 0, (7, 7)),
    ((7, 9), 5, (2, 4)),
    ((14, 14), 1, (7, 7)),
    ((16, 16), 1, (7, 7)),
    ((16, 16), 5, (3, 16)),
]


def _geometry(grid: Grid, prefix: int, heads: int = 3, width: int = 8) -> Geometry:
    return Geometry(
        dim=heads * width,
        num_heads=heads,
        head_dim=width,
        num_prefix_tokens=prefix,
        grid=grid,
        scale=width**-0.5,
    )


def _core(
    grid: Grid, prefix: int, landmarks: Grid, mix: str = "after"
) -> InteractiveAttention:
    """Build a core whose mixes are far from the identity."""
    core = mh.Interactive(landmarks=landmarks, mix=mix).build(_geometry(grid, prefix))
    with torch.no_grad():
        for parameter in core.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return core


def _tokens(
    grid: Grid, prefix: int, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor]:
    N = prefix + grid[0] * grid[1]
    q, k, v = torch.randn(3, 2, N, 3, 8, dtype=torch.float64).to(dtype).unbind(0)
    return q, k, v


def _outcome(core: nn.Module, form: str, tokens: tuple[Tensor, ...], *rest) -> list:
    """Give the output and every gradient of one form."""
    leaves = [t.detach().clone().requires_grad_() for t in tokens]
    out = getattr(core, form)(*leaves, *rest)
    direction = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    inputs = [*leaves, *core.parameters()]
    return [out, *torch.autograd.grad(out, inputs, direction)]


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_fast_equals_slow_in_output_and_every_gradient(
    layout: tuple[Grid, int, Grid], mix: str
) -> None:
    grid, prefix, landmarks = layout
    core = _core(grid, prefix, landmarks, mix).double()
    tokens = _tokens(grid, prefix)
    fast = _outcome(core, "forward", tokens, None, grid)
    slow = _outcome(core, "reference", tokens, None, grid)
    for ours, theirs in zip(fast, slow, strict=True):
        assert_close(ours, theirs)


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_narrow_types_stay_near_the_exact_result(dtype: torch.dtype, mix: str) -> None:
    core = _core((14, 14), 1, (7, 7), mix).to(dtype)
    tokens = _tokens((14, 14), 1, dtype)
    exact = copy.deepcopy(core).double()
    expected = exact(*(t.double() for t in tokens), None, (14, 14)).to(dtype)
    assert_close(core(*tokens, None, (14, 14)), expected)
    with torch.no_grad():
        assert_close(core(*tokens, None, (14, 14)), expected)


@pytest.mark.parametrize("mix", MIXES)
def test_serving_queries_in_portions_changes_nothing(
    mix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    core, tokens = _core((14, 14), 1, (7, 7), mix).double(), _tokens((14, 14), 1)
    whole = core(*tokens, None, (14, 14))
    seen = []

    def small(weights_per_token: int, like: Tensor) -> int:
        seen.append(weights_per_token)
        return 30

    monkeypatch.setattr(kernel, "tokens_at_once", small)
    with torch.no_grad():
        assert_close(core(*tokens, None, (14, 14)), whole)
    # Two images, 49 + 1 landmarks, three heads; unmixed heads never hold weights.
    assert seen == ([] if mix == "none" else [2 * 50 * 3])


def test_portions_are_taken_without_gradients_only() -> None:
    like = torch.zeros(1)
    assert kernel.tokens_at_once(600, like) is None
    with torch.no_grad():
        assert kernel.tokens_at_once(600, like) == 2**18 // 600
        assert kernel.tokens_at_once(10**9, like) == 16


def test_a_packed_projection_is_read_in_place() -> None:
    core = _core((7, 9), 1, (2, 4)).double()
    q, k, v = _tokens((7, 9), 1)
    packed = torch.cat([x.flatten(2) for x in (q, k, v)], dim=-1)
    parts = [p.reshape(2, 64, 3, 8) for p in packed.split([24, 24, 24], dim=-1)]
    assert not parts[0].is_contiguous()
    assert_close(core(*parts, None, (7, 9)), core(q, k, v, None, (7, 9)))


@pytest.mark.parametrize("mix", MIXES)
def test_maps_applied_to_values_reproduce_the_output(mix: str) -> None:
    core = _core((7, 9), 1, (2, 4), mix).double()
    q, k, v = _tokens((7, 9), 1)
    maps = core.maps(q, k, None, (7, 9))
    assert maps.shape == (2, 3, 64, 64)
    assert_close(core(q, k, v, None, (7, 9)), apply_maps(maps, v))


def test_unmixed_maps_have_rows_that_sum_to_one_and_rank_of_the_landmarks() -> None:
    q, k, _ = _tokens((7, 9), 1)
    maps = interactive_maps(q, k, grid=(7, 9), landmarks=(2, 3), scale=0.35)
    assert_close(maps.sum(dim=-1), torch.ones(2, 3, 64, dtype=torch.float64))
    assert torch.linalg.matrix_rank(maps).max() <= 2 * 3 + 1


@pytest.mark.parametrize("mix", ["after", "before", "both"])
def test_a_fresh_mix_is_the_identity(mix: str) -> None:
    geometry, tokens = _geometry((7, 9), 1), _tokens((7, 9), 1)
    fresh = mh.Interactive(mix=mix).build(geometry).double()
    none = mh.Interactive(mix="none").build(geometry)
    assert_close(fresh(*tokens, None, (7, 9)), none(*tokens, None, (7, 9)))
    matrices = {"after": 2, "before": 2, "both": 4}[mix]
    assert sum(p.numel() for p in fresh.parameters()) == matrices * 3**2
    assert not list(none.parameters())


@pytest.mark.parametrize(
    "layout", [((7, 9), (7, 7)), ((5, 3), (3, 2)), ((8, 8), (4, 2))]
)
def test_cells_are_those_of_adaptive_average_pooling(layout: tuple[Grid, Grid]) -> None:
    (rows, columns), cells = layout
    x = torch.randn(2, rows * columns, 5, dtype=torch.float64)
    picture = x.transpose(1, 2).reshape(2, 5, rows, columns)
    expected = F.adaptive_avg_pool2d(picture, cells).flatten(2).transpose(1, 2)
    assert_close(kernel.cell_means(x, (rows, columns), cells), expected)


# --- masks --------------------------------------------------------------------------


@pytest.mark.parametrize("mix", MIXES)
def test_a_key_mask_is_honoured_in_output_and_gradients(mix: str) -> None:
    core, tokens = _core((7, 9), 1, (3, 4), mix).double(), _tokens((7, 9), 1)
    mask = torch.rand(2, 64) > 0.4
    mask[:, 1:28] = False  # the first three rows: a whole row of landmarks is empty
    mask[1] = False  # nothing at all is left of the second image
    fast = _outcome(core, "forward", tokens, mask, (7, 9))
    slow = _outcome(core, "reference", tokens, mask, (7, 9))
    for ours, theirs in zip(fast, slow, strict=True):
        assert_close(ours, theirs)
    assert fast[0][1].abs().max() == 0
    with torch.no_grad():
        assert_close(core(*tokens, mask[:, None, None], (7, 9)), fast[0].detach())


def test_masking_a_register_equals_leaving_it_out() -> None:
    core = _core((7, 9), 3, (3, 4)).double()
    q, k, v = _tokens((7, 9), 3)
    mask = torch.ones(2, 66, dtype=torch.bool)
    mask[:, 1] = False
    left = torch.arange(66) != 1
    fewer = copy.deepcopy(core)
    fewer.geometry = _geometry((7, 9), 2)
    assert_close(
        core(q, k, v, mask, (7, 9))[:, left],
        fewer(q[:, left], k[:, left], v[:, left], None, (7, 9)),
    )


def test_masking_padded_rows_equals_leaving_them_out() -> None:
    """Where cells of both grids coincide: 8 of 12 rows, 6 rows of landmarks of 4."""
    padded, plain = _core((12, 6), 1, (6, 3)).double(), _core((8, 6), 1, (4, 3))
    plain = plain.double()
    plain.load_state_dict(padded.state_dict())
    q, k, v = _tokens((12, 6), 1)
    mask = torch.arange(73).expand(2, 73) < 1 + 8 * 6
    expected = plain(q[:, :49], k[:, :49], v[:, :49], None, (8, 6))
    assert_close(padded(q, k, v, mask, (12, 6))[:, :49], expected)


def test_masked_tokens_may_hold_anything_finite() -> None:
    core = _core((7, 9), 1, (3, 4)).double()
    q, k, v = _tokens((7, 9), 1)
    mask = torch.rand(2, 64) > 0.3
    before = core(q, k, v, mask, (7, 9))
    for x in (q, k, v):
        x[~mask] = 1e6
    assert_close(core(q, k, v, mask, (7, 9))[mask], before[mask])


def test_a_pair_mask_is_refused() -> None:
    core, tokens = _core((7, 9), 0, (2, 2)), _tokens((7, 9), 0, torch.float32)
    causal = torch.ones(63, 63, dtype=torch.bool).tril()[None, None]
    with pytest.raises(MaskRefused, match=r"Interactive.*\[1, 1, 63, 63\]"):
        core(*tokens, causal, (7, 9))


# --- the spec -----------------------------------------------------------------------


def test_the_recipe_comes_back_from_json_with_its_pair() -> None:
    recipe = mh.Recipe(mh.Swap(attention=mh.Interactive(landmarks=(3, 5), mix="both")))
    assert '"landmarks": [' in recipe.to_json()
    assert mh.Recipe.from_json(recipe.to_json()) == recipe
    assert repr(mh.Interactive()) == "Interactive()"
    assert repr(mh.Interactive(landmarks=(3, 5))) == "Interactive(landmarks=(3, 5))"


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize("sides", [7, (7,), (7, 0), (7, 7.0), (True, 7), "77", [7, 7]])
def test_landmarks_that_are_no_pair_are_refused(sides: object) -> None:
    with pytest.raises(InvalidOption, match=r"pair of positive.*landmarks=\(7, 7\)"):
        mh.Interactive(landmarks=sides)


@pytest.mark.usefixtures("untyped")
def test_an_unknown_mix_names_the_nearest() -> None:
    with pytest.raises(InvalidOption, match=r"mix='aftr'.*Did you mean 'after'"):
        mh.Interactive(mix="aftr")
    text = mh.Recipe(mh.Swap(attention=mh.Interactive())).to_json()
    with pytest.raises(InvalidRecipe, match="aftr"):
        mh.Recipe.from_json(text.replace('"after"', '"aftr"'))


# --- cost ---------------------------------------------------------------------------


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_closed_form_equals_counted_products(
    layout: tuple[Grid, int, Grid], mix: str
) -> None:
    grid, prefix, landmarks = layout
    core = mh.Interactive(landmarks=landmarks, mix=mix).build(_geometry(grid, prefix))
    N = prefix + grid[0] * grid[1]
    tokens = torch.empty(1, N, 3, 8, device="meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        core.to("meta")(tokens, tokens, tokens, None, grid)
    closed = core.spec.core_cost(core.geometry, N)
    assert (closed.attention, closed.elementwise) == (counter.get_total_flops() // 2, 0)


def test_the_cost_is_of_the_published_order() -> None:
    """O(2 N L H (K + H)): ours is between that and twice that, plus the averages."""
    for side in (14, 28, 56, 90):
        N, H, K, L = side * side, 12, 32, 49
        geometry = _geometry((side, side), 0, heads=H, width=K)
        published = 2 * N * L * H * (K + H)
        counted = mh.Interactive().core_cost(geometry, N).attention
        averages = 2 * 7 * H * K * (N + 7 * side)
        assert counted - averages == published + 2 * N * L * H * K
        assert published <= counted <= 2.2 * published


def test_doubling_the_tokens_doubles_the_cost() -> None:
    few, many = (
        mh.Interactive().core_cost(_geometry((rows, 64), 0), rows * 64).attention
        for rows in (64, 128)
    )
    assert many == 2 * few


def test_the_ledger_counts_a_rectangular_image_exactly() -> None:
    spec = mh.Interactive(landmarks=(2, 3))
    model = mh.convert(tiny_vit(), mh.Recipe(mh.Swap(attention=spec)))
    host, sites = find_host(model)
    books = keep_books(model, host, sites, (32, 96))
    blank = copy.deepcopy(model).to("meta")
    blank.set_input_size(img_size=(32, 96))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        blank(torch.empty(1, 3, 32, 96, device="meta"))
    inside = counter.get_flop_counts()["VisionTransformer.blocks"]
    assert sum(block.matmul for block in books.blocks) == sum(inside.values()) // 2


# --- real models --------------------------------------------------------------------

SMALL = {"img_size": 64, "depth": 2, "num_classes": 7}
MODELS: dict[str, tuple[str, dict[str, object]]] = {
    "deit": ("deit_tiny_patch16_224", SMALL),
    "distilled": ("deit_tiny_distilled_patch16_224", SMALL),
    "registers": ("vit_small_patch14_reg4_dinov2", SMALL | {"img_size": 56}),
    "siglip": (
        "vit_base_patch16_siglip_224",
        SMALL | {"embed_dim": 48, "num_heads": 4},
    ),
    "13 heads": ("vit_tiny_patch16_224", SMALL | {"embed_dim": 52, "num_heads": 13}),
    "other attention width": ("vit_so150m2_patch16_reg1_gap_256", SMALL),
    "hybrid": ("vit_tiny_r_s16_p8_224", {"depth": 2, "img_size": 64}),
    "two branches": ("vit_small_patch16_18x2_224", SMALL),
    "features": ("vit_tiny_patch16_224", {"img_size": 64, "features_only": True}),
}


def _converted(model: nn.Module, landmarks: Grid = (2, 2)) -> nn.Module:
    spec = mh.Interactive(landmarks=landmarks)
    student = mh.convert(model, mh.Recipe(mh.Swap(attention=spec)))
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            if "core.mix" in name:
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return student


def _slow(model: nn.Module) -> nn.Module:
    """The same model with every mechanism in its slow form."""
    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, InteractiveAttention):
            module.forward = module.reference
    return model


@pytest.mark.parametrize("name", MODELS)
def test_real_models_keep_their_projections_and_run_as_their_slow_form(
    name: str,
) -> None:
    architecture, options = MODELS[name]
    model = timm.create_model(architecture, **options).eval()
    student = _converted(model)
    kept, added = model.state_dict(), student.state_dict()
    assert all(torch.equal(added[key], tensor) for key, tensor in kept.items())
    blocks = [m for m in student.modules() if isinstance(m, InteractiveAttention)]
    for core in blocks:
        assert (
            sum(p.numel() for p in core.parameters()) == 2 * core.geometry.num_heads**2
        )
    new = added.keys() - kept.keys()
    assert len(new) == 2 * len(blocks) > 0
    assert all(".core.mix_" in key for key in new)
    side = options["img_size"]
    with torch.no_grad():
        image = torch.randn(2, 3, side, side)
        results = student(image), _slow(student)(image)
    pairs = zip(*(r if isinstance(r, list) else [r] for r in results), strict=True)
    for fast, slow in pairs:
        assert_close(fast, slow)


def test_every_mix_gets_a_gradient_and_so_can_be_healed() -> None:
    student = _converted(tiny_vit())
    student(torch.randn(2, 3, 32, 32)).square().sum().backward()
    for name, parameter in student.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


def test_saved_and_loaded_gives_the_same_logits(tmp_path: Path) -> None:
    student = _converted(tiny_vit(), landmarks=(2, 3)).eval()
    again = mh.load(mh.save(student, tmp_path / "student"))
    image = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(again(image), student(image))


@pytest.mark.parametrize("size", [(32, 32), (32, 64), (64, 32), (16, 88), (96, 96)])
def test_changing_sizes_run_without_rebuilding(size: Grid) -> None:
    student = _converted(tiny_vit(dynamic_img_size=True))
    with torch.no_grad():
        student(torch.randn(1, 3, 32, 32))
        image = torch.randn(2, 3, *size)
        assert_close(student(image), _slow(student)(image))


def test_a_padded_image_has_the_padded_grid() -> None:
    student = _converted(tiny_vit(dynamic_img_size=True, dynamic_img_pad=True))
    with torch.no_grad():
        image = torch.randn(2, 3, 30, 51)
        padded = F.pad(image, (0, 5, 0, 2))
        assert_close(student(image), student(padded))


def test_set_input_size_features_and_copies_see_the_new_grid() -> None:
    student = _converted(tiny_vit())
    student.set_input_size(img_size=(32, 64))
    image = torch.randn(2, 3, 32, 64)
    twin = copy.deepcopy(student)
    with torch.no_grad():
        expected = student.forward_features(image)
        twin.set_input_size(img_size=(64, 32))
        twin(torch.randn(1, 3, 64, 32))
        assert torch.equal(student.forward_features(image), expected)
        last = student.forward_intermediates(image, intermediates_only=True)[-1]
        assert last.shape == (2, 48, 4, 8)
        assert_close(expected, _slow(student).forward_features(image))


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    student, image = _converted(tiny_vit()).train(), torch.randn(2, 3, 32, 32)
    saving = copy.deepcopy(student)
    saving.set_grad_checkpointing()
    for model in (student, saving):
        model(image).square().sum().backward()
    for ours, theirs in zip(saving.parameters(), student.parameters(), strict=True):
        assert_close(ours.grad, theirs.grad)


def test_half_precision_autocast_runs_near_full_precision() -> None:
    student = _converted(tiny_vit(qk_norm=True))
    image = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = student(image)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert_close(student(image).float(), expected.bfloat16().float(), slack=1e4)


# --- refusals -----------------------------------------------------------------------


def test_more_landmarks_than_the_grid_are_refused_at_conversion() -> None:
    recipe = mh.Recipe(mh.Swap(attention=mh.Interactive()))
    with pytest.raises(
        GeometryMismatch,
        match=r"landmarks=\(7, 7\).*4 x 4.*blocks\.0\.attn.*landmarks=\(4, 4\)",
    ):
        mh.convert(tiny_vit(), recipe)
    with pytest.raises(GeometryMismatch, match="4 x 4"):
        mh.preview(tiny_vit(), recipe)


def test_an_image_smaller_than_the_landmarks_is_refused_at_run_time() -> None:
    student = _converted(tiny_vit(dynamic_img_size=True), landmarks=(3, 4))
    with pytest.raises(GeometryMismatch, match=r"2 x 8.*landmarks=\(2, 4\)"):
        student(torch.randn(1, 3, 16, 64))


def test_dropped_patches_are_refused_by_name() -> None:
    student = _converted(tiny_vit(patch_drop_rate=0.5)).train()
    with pytest.raises(GeometryMismatch, match=r"9 tokens.*\(4, 4\).*patch dropout"):
        student(torch.randn(1, 3, 32, 32))


@pytest.mark.parametrize("name", ["mobilevit_xxs", "pit_ti_224", "crossvit_9_240"])
def test_models_without_one_patch_grid_are_refused(name: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
    with pytest.raises(SwapRefused, match=r"no rows and columns.*attn"):
        mh.convert(model, mh.Recipe(mh.Swap(attention=mh.Interactive())))


def test_attention_dropout_is_refused() -> None:
    recipe = mh.Recipe(mh.Swap(attention=mh.Interactive(landmarks=(2, 2))))
    with pytest.raises(SwapRefused, match=r"p=0\.1.*attn_drop_rate=0"):
        mh.convert(tiny_vit(attn_drop_rate=0.1), recipe)


# --- compiled and exported ----------------------------------------------------------

_EXPORT = """
import copy, sys, torch
from torch.export import Dim
import manyheads as mh
from tests.helpers import tiny_vit

torch.manual_seed(0)
spec = mh.Interactive(landmarks=(2, 3), mix=sys.argv[1])
recipe = mh.Recipe(mh.Swap(attention=spec))
student = mh.convert(tiny_vit(dynamic_img_size=True), recipe)
for parameter in student.parameters():
    parameter.data += 0.1 * torch.randn_like(parameter)
shapes = ({2: 8 * Dim("rows", min=3, max=32), 3: 8 * Dim("columns", min=3, max=32)},)
example = torch.randn(2, 3, 32, 48)
sizes = [(32, 32), (32, 64), (64, 32), (24, 200), (72, 56)]
"""
_TORCH_EXPORT = """
run = torch.export.export(student, (example,), dynamic_shapes=shapes).module()
copy.deepcopy(student)
with torch.no_grad():
    for size in sizes:
        image = torch.randn(2, 3, *size)
        torch.testing.assert_close(run(image), student(image))
print("done", len(sizes))
"""
_ONNX = """
import onnxruntime
torch.onnx.export(
    student, (example,), sys.argv[2], dynamo=True, dynamic_shapes=shapes, verbose=False
)
session = onnxruntime.InferenceSession(sys.argv[2])
name = session.get_inputs()[0].name
with torch.no_grad():
    for size in sizes:
        image = torch.randn(2, 3, *size)
        (out,) = session.run(None, {name: image.numpy()})
        torch.testing.assert_close(
            torch.from_numpy(out), student(image), rtol=1e-4, atol=1e-5
        )
print("done", len(sizes))
"""


def _run(script: str, *arguments: str) -> str:
    """Run where no type checker wraps the functions: tracing meets symbolic sizes."""
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize("mix", ["both", "none"])
def test_an_exported_program_is_right_at_every_size(mix: str) -> None:
    assert "done 5" in _run(_EXPORT + _TORCH_EXPORT, mix)


@pytest.mark.parametrize("mix", ["both", pytest.param("none", marks=pytest.mark.slow)])
def test_an_onnx_file_is_right_at_every_size(mix: str, tmp_path: Path) -> None:
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    assert "done 5" in _run(_EXPORT + _ONNX, mix, str(tmp_path / "student.onnx"))


_COMPILE = """
from torch._dynamo.utils import counters
run = torch.compile(student, dynamic=True, fullgraph=True, backend="aot_eager")
with torch.no_grad():
    for size in sizes:
        image = torch.randn(2, 3, *size)
        torch.testing.assert_close(run(image), student(image))
print("done", len(sizes), "graphs", counters["stats"]["unique_graphs"])
"""


@pytest.mark.slow
def test_a_compiled_model_is_one_graph_and_right_at_every_size() -> None:
    assert "done 5 graphs" in _run(_EXPORT + _COMPILE, "after")


def test_the_mechanism_is_public() -> None:
    assert mh.Interactive is interactive.Interactive
