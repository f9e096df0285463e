"""What images say before converting: which heads are alike, what layers put out."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from timm.layers import Attention
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset

import manyheads as mh
from manyheads.attention.pairing import choose_heads, map_similarity
from manyheads.data import image_source
from manyheads.errors import DataError
from manyheads.hosts import find_host
from tests.helpers import assert_close, tiny_vit

HALF = mh.Recipe(mh.Swap(attention=mh.Hallucinated()))
COMPACT = mh.Recipe(mh.Swap(ffn=mh.Compact(rank=8)))


def _digits() -> tuple[Tensor, Tensor]:
    """Real handwritten digits, 8x8 pixels enlarged to 16x16."""
    pictures, labels = load_digits(return_X_y=True)
    images = torch.tensor(pictures, dtype=torch.float32).view(-1, 1, 8, 8) / 8 - 1
    return F.interpolate(images, scale_factor=2), torch.tensor(labels)


@pytest.fixture(scope="module")
def trained() -> nn.Module:
    """A tiny ViT after two short passes over the digits."""
    torch.manual_seed(0)
    images, labels = _digits()
    model = tiny_vit(img_size=16, patch_size=4, in_chans=1, depth=2).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(2):
        for rows in torch.randperm(1536).split(64):
            loss = F.cross_entropy(model(images[rows]), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model.eval()


class Lone(Dataset[Tensor]):
    """Single images without labels."""

    def __init__(self, images: Tensor) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        return self.images[index]


def _ffn_error(model: nn.Module, student: nn.Module, images: Tensor) -> float:
    """Mean squared error of the output matrices on what the original feeds them."""
    errors = []
    for before, after in zip(model.blocks, student.blocks, strict=True):
        seen: list[Tensor] = []
        handle = before.mlp.fc2.register_forward_pre_hook(
            lambda _, args, seen=seen: seen.append(args[0])
        )
        with torch.no_grad():
            model(images)
            handle.remove()
            wanted, given = before.mlp.fc2(seen[0]), after.mlp.fc2(seen[0])
        errors.append((given - wanted).square().mean().item())
    return sum(errors)


def _maps(model: nn.Module, images: Tensor) -> Tensor:
    """The maps of the first block on these images."""
    found: list[Tensor] = []
    core = model.blocks[0].attn.core
    handle = core.register_forward_pre_hook(
        lambda core, args: found.append(core.maps(args[0], args[1]))
    )
    with torch.no_grad():
        model(images)
    handle.remove()
    return found[0]


def test_a_calibrated_compact_layer_is_closer_on_images_it_never_saw(
    trained: nn.Module,
) -> None:
    images, _ = _digits()
    plain = mh.convert(trained, COMPACT)
    seen = mh.convert(trained, COMPACT, images=images[:256].split(64))
    unseen = images[1536:]
    assert _ffn_error(trained, seen, unseen) < 0.8 * _ffn_error(trained, plain, unseen)


@pytest.mark.parametrize("bias", [0.0, 0.3], ids=["zero", "biased"])
def test_a_matrix_of_zeros_is_compacted_to_one(bias: float) -> None:
    model = tiny_vit(depth=2)
    nn.init.zeros_(model.blocks[0].mlp.fc2.weight)
    nn.init.constant_(model.blocks[0].mlp.fc2.bias, bias)
    recipe = mh.Recipe(mh.Swap(blocks=[0], ffn=mh.Compact()))
    images = torch.randn(4, 3, 32, 32)
    student = mh.convert(model, recipe, images=images)
    assert_close(student(images), model(images))


def test_chosen_heads_are_more_alike_than_the_first_half(trained: nn.Module) -> None:
    images, _ = _digits()
    report = mh.preview(trained, HALF, images=images[:64])
    assert len(report.heads) == 2
    for choice in report.heads:
        assert sorted(choice.order) == [0, 1, 2, 3]
        assert set(choice.partner) <= set(choice.real)
        assert choice.mean >= choice.first_half
    text, data = str(report), json.loads(json.dumps(report.to_json()))
    assert "mean similarity" in text
    assert data["heads"][0]["path"] == "blocks.0.attn"
    assert mh.preview(trained, HALF).heads == ()


def test_a_fresh_hallucinated_head_has_its_most_similar_map(
    trained: nn.Module,
) -> None:
    images = _digits()[0][:32]
    choice = mh.preview(trained, HALF, images=images).heads[0]
    student = mh.convert(trained, HALF, images=images)
    plain = mh.convert(trained, mh.Recipe(mh.Swap(attention=mh.Softmax())))
    theirs = _maps(plain, images)
    ours = _maps(student, images)
    half = len(choice.real)
    for place, head in enumerate(choice.real):
        assert_close(ours[:, place], theirs[:, head])
    for place, (head, partner) in enumerate(
        zip(choice.hallucinated, choice.partner, strict=True)
    ):
        assert_close(ours[:, half + place], theirs[:, partner])
        alike = map_similarity(theirs).mean(0)[head]
        assert alike[partner] == max(alike[list(choice.real)])


def test_planted_twins_are_found_and_cost_nothing() -> None:
    model = tiny_vit(num_heads=4, depth=1)
    attention = model.blocks[0].attn
    width = attention.head_dim
    with torch.no_grad():
        for tensor in (attention.qkv.weight, attention.qkv.bias):
            heads = tensor.view(3, 4, width, -1)
            heads[:2, 0] = heads[:2, 1]
            heads[:2, 3] = heads[:2, 1]
    images = torch.randn(4, 3, 32, 32)
    choice = mh.preview(model, HALF, images=images).heads[0]
    assert len({0, 1, 3} & set(choice.real)) == 1
    assert set(choice.real) & {2}
    assert choice.similarity == pytest.approx((1.0, 1.0))
    student = mh.convert(model, HALF, images=images)
    assert_close(student(images), model(images))


@pytest.mark.parametrize(
    "changes",
    [{}, {"num_heads": 3}, {"qk_norm": True, "scale_attn_norm": True}],
    ids=str,
)
def test_another_order_of_heads_changes_no_logit(changes: dict[str, object]) -> None:
    model = tiny_vit(**changes)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    host, sites = find_host(model)
    image = torch.randn(2, 3, 32, 32)
    before = model(image)
    order = torch.randperm(sites[0].geometry.num_heads).tolist()
    for site in sites:
        host.permute_heads(model, site, order)
    assert_close(model(image), before)


def test_a_gate_follows_the_order_of_heads() -> None:
    model = tiny_vit()
    for block in model.blocks:
        block.attn = Attention(48, num_heads=4, qkv_bias=True, gated=True).eval()
    host, sites = find_host(model)
    image = torch.randn(2, 3, 32, 32)
    before = model(image)
    host.permute_heads(model, sites[1], (2, 0, 3, 1))
    assert_close(model(image), before)


def test_chosen_partners_survive_saving(trained: nn.Module, tmp_path: object) -> None:
    images = _digits()[0][:32]
    student = mh.convert(trained, HALF, images=images)
    student.blocks[0].attn.core.pair((1, 1))
    again = mh.load(mh.save(student, f"{tmp_path}/student"))
    assert torch.equal(again(images), student(images))
    other = mh.Recipe(mh.Swap(blocks=[0], attention=mh.Hallucinated(stage="logits")))
    assert mh.convert(student, other).blocks[0].attn.core.pairing == (1, 1)


def test_the_teacher_sees_the_images_and_stays_as_it_was(trained: nn.Module) -> None:
    before = {name: t.clone() for name, t in trained.state_dict().items()}
    both = mh.Recipe(*HALF.swaps, *COMPACT.swaps)
    mh.convert(trained, both, images=_digits()[0][:16])
    for name, tensor in trained.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in trained.modules())


@pytest.mark.parametrize("heads", [2, 3, 7, 12])
def test_the_choice_is_never_worse_than_the_first_half(heads: int) -> None:
    for _ in range(5):
        alike = torch.rand(heads, heads)
        alike = (alike + alike.t()) / 2
        choice = choose_heads(alike, block=0, path="here")
        assert len(choice.real) == -(-heads // 2)
        assert choice.mean >= choice.first_half - 1e-6
        counts = [choice.partner.count(head) for head in choice.real]
        assert counts == sorted(counts, reverse=True)
        assert list(choice.pairing) == sorted(choice.pairing)
        assert dataclasses.asdict(choice)["block"] == 0


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize(
    "images", [[], torch.zeros(0, 3, 8, 8), [1], torch.zeros(3, 8)]
)
def test_what_is_no_image_is_refused(images: object) -> None:
    with pytest.raises(DataError, match="calibrating"):
        mh.convert(tiny_vit(), HALF, images=images)


def test_a_folder_is_looked_at_like_the_batches_it_makes(
    trained: nn.Module, tmp_path: Path
) -> None:
    pictures = load_digits().images[:40] * 15
    for number, picture in enumerate(pictures):
        image = Image.fromarray(picture.astype("uint8")).resize((16, 16))
        image.save(tmp_path / f"{number:02}.png")
    source = image_source(trained, tmp_path, labelled=False)
    images = next(source.batches(range(40), 40)).images
    both = mh.Recipe(*HALF.swaps, *COMPACT.swaps)
    expected = mh.convert(trained, both, images=images).state_dict()
    pair = (images, torch.zeros(40, dtype=torch.long))
    for given in (tmp_path, str(tmp_path), pair, images.split(16), Lone(images)):
        made = mh.convert(trained, both, images=given).state_dict()
        for name, tensor in made.items():
            assert torch.equal(tensor, expected[name]), (given, name)
    assert len(mh.preview(trained, HALF, images=tmp_path).heads) == 2


def test_unreadable_calibration_pictures_are_counted_and_named(
    trained: nn.Module, tmp_path: Path
) -> None:
    for number in range(300):
        Image.new("L", (16, 16), number % 256).save(tmp_path / f"{number:03}.png")
    (tmp_path / "150.png").write_text("broken")
    with pytest.warns(UserWarning, match=r"1 of 150 pictures .*150\.png"):
        mh.convert(trained, COMPACT, images=tmp_path)
