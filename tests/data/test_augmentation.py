"""Augmentation: timm's values and pixels, and a function of nothing but its seed."""

from __future__ import annotations

import dataclasses
import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import Mixup, create_transform
from torch import Tensor

from manyheads.data import Augmentation, image_source
from manyheads.data.preprocessing import Preprocessing
from manyheads.data.seeds import mix, seeded
from manyheads.errors import InvalidOption
from manyheads.hosts import ImageInput
from tests.helpers import tiny_vit

WANTED = ImageInput(
    channels=3,
    size=(32, 32),
    mean=(0.5, 0.4, 0.3),
    std=(0.2, 0.25, 0.3),
    interpolation="bicubic",
    crop=0.9,
)
IMAGES = torch.linspace(-1, 1, 6 * 3 * 32 * 32).reshape(6, 3, 32, 32)


def noise(size: tuple[int, int] = (64, 48), seed: int = 0) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 255, (*size, 3), dtype=np.uint8)
    return Image.fromarray(values)


def test_the_deit_recipe_has_its_published_values() -> None:
    deit = Augmentation.deit()
    assert (deit.rand_magnitude, deit.rand_spread, deit.rand_operations) == (9, 0.5, 2)
    assert (deit.mixup, deit.cutmix, deit.label_smoothing) == (0.8, 1.0, 0.1)
    assert (deit.erasing, deit.repeats, deit.color_jitter) == (0.25, 3, 0.0)
    assert (deit.mix_probability, deit.cutmix_share) == (1.0, 0.5)


@pytest.mark.parametrize("erasing", [0.25, 1.0])
def test_a_seed_gives_what_timm_gives_for_it(erasing: float) -> None:
    deit = dataclasses.replace(Augmentation.deit(), erasing=erasing, rand_magnitude=7)
    theirs = create_transform(
        (3, 32, 32),
        is_training=True,
        auto_augment="rand-m7-mstd0.5-inc1",
        interpolation="bicubic",
        re_prob=erasing,
        re_mode="pixel",
        hflip=0.5,
        color_jitter=None,
        mean=WANTED.mean,
        std=WANTED.std,
    )
    for seed in range(20):
        ours = Preprocessing(WANTED).picture(noise(), seed, deit)
        with seeded(seed):
            expected = theirs(noise())
        torch.testing.assert_close(ours, expected, atol=1e-6, rtol=1e-6)


def test_the_strongest_operation_is_one_that_pillow_does() -> None:
    # timm posterises to zero bits at strength 10; Pillow has refused that since 13.
    strongest = Augmentation(rand_magnitude=10, rand_spread=5, rand_operations=15)
    for channels in (1, 3):
        wanted = dataclasses.replace(
            WANTED,
            channels=channels,
            mean=WANTED.mean[:channels],
            std=WANTED.std[:channels],
        )
        picture = noise() if channels == 3 else noise().convert("L")
        for seed in range(20):
            made = Preprocessing(wanted).picture(picture, seed, strongest)
            assert made.shape == (channels, 32, 32)
            assert made.isfinite().all()


def test_crops_with_padding_and_jitter_without_randaugment() -> None:
    small = Augmentation(crop_padding=4, flip=0.5, color_jitter=0.4)
    made = [Preprocessing(WANTED).picture(noise(), seed, small) for seed in range(8)]
    assert all(image.shape == (3, 32, 32) for image in made)
    black = -torch.tensor(WANTED.mean) / torch.tensor(WANTED.std)
    corners = torch.stack([m[:, y, x] for m in made for y in (0, -1) for x in (0, -1)])
    assert (corners - black).abs().sum(1).min() < 1e-5, "no crop reaches the padding"


@pytest.mark.usefixtures("untyped")  # beartype itself draws from random
def test_no_generator_is_left_changed() -> None:
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    Preprocessing(WANTED).picture(noise(), 3, Augmentation.deit())
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == random.getstate()
    assert np.array_equal(before[2], np.random.get_state()[1])


@pytest.mark.parametrize(
    ("options", "fact"),
    [
        ({"flip": 1.5}, "flip=1.5"),
        ({"mixup": -1.0}, "mixup=-1.0"),
        ({"erasing": float("nan")}, "erasing=nan"),
        ({"rand_magnitude": 11}, "rand_magnitude=11"),
        ({"repeats": 0}, "repeats=0"),
        ({"crop_area": (0.5, 0.2)}, "crop_area=(0.5, 0.2)"),
        ({"crop_area": (0.5, 2.0)}, "<= 1"),
        ({"crop_area": (0.1, 1.0), "crop_padding": 4}, "crop_padding=4"),
        ({"rand_magnitude": 9, "color_jitter": 0.3}, "changes colours already"),
    ],
    ids=str,
)
def test_what_no_augmentation_can_have_is_refused(
    options: dict[str, object], fact: str
) -> None:
    with pytest.raises(InvalidOption) as caught:
        Augmentation(**options)
    assert fact in str(caught.value)


def test_two_problems_are_told_together() -> None:
    with pytest.raises(InvalidOption, match=r"0 to 1.*flip.*0 to 100.*cutmix"):
        Augmentation(flip=2, cutmix=-1)


@pytest.mark.parametrize(
    "given", [Augmentation.none(), Augmentation.light(), Augmentation.deit()], ids=str
)
def test_there_and_back_through_json(given: Augmentation) -> None:
    assert Augmentation.from_json(json.loads(json.dumps(given.to_json()))) == given
    assert eval(repr(given), {"Augmentation": Augmentation}) == given


def test_an_unknown_option_names_the_nearest() -> None:
    assert Augmentation.from_json({"flip": 0.5}) == Augmentation(flip=0.5)
    with pytest.raises(InvalidOption, match="cutmix"):
        Augmentation.from_json({"cut_mix": 1.0})


def batches(images: object, given: Augmentation, **options: object) -> list[object]:
    source = image_source(tiny_vit(), images, labelled=False)
    order = options.pop("order", range(len(source)))
    size = options.pop("batch_size", len(source))
    return list(
        source.batches(order, size, augment_seed=1, augmentation=given, **options)
    )


def test_tensors_are_cropped_flipped_and_erased_at_their_own_size() -> None:
    (flipped,) = batches(IMAGES, Augmentation(flip=1.0))
    assert torch.equal(flipped.images, IMAGES.flip(-1))
    (erased,) = batches(IMAGES, Augmentation(erasing=1.0))
    changed = (erased.images != IMAGES).any(1).flatten(1).float().mean(1)
    assert ((changed > 0.01) & (changed < 0.4)).all()
    (cropped,) = batches(IMAGES, Augmentation(crop_area=(0.1, 0.5)))
    assert cropped.images.shape == IMAGES.shape
    assert cropped.images.isfinite().all()
    assert torch.equal(IMAGES, torch.linspace(-1, 1, IMAGES.numel()).view_as(IMAGES))
    (default,) = batches(IMAGES, Augmentation.none())
    assert torch.equal(default.images, IMAGES)


@pytest.mark.parametrize("part", ["rand_magnitude", "color_jitter"])
def test_what_tensors_cannot_have_is_refused_before_the_first_batch(part: str) -> None:
    source = image_source(tiny_vit(), IMAGES, labelled=False)
    with pytest.raises(InvalidOption, match="tensors") as caught:
        source.batches([0], 1, augment_seed=0, augmentation=Augmentation(**{part: 1}))
    assert "rand_magnitude=None" in caught.value.fix


def mixed(given: Augmentation, labels: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Mix the six images, and say by timm what should come out."""
    labels = torch.arange(6) if labels is None else labels
    source = image_source(tiny_vit(), (IMAGES, labels), labelled=True)
    (batch,) = source.batches(
        range(6), 6, augment_seed=5, augmentation=given, num_classes=10
    )
    return batch.images, batch.targets


@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_neighbours_are_mixed_by_one_draw_and_labels_with_them(kind: str) -> None:
    images, targets = mixed(Augmentation(**{kind: 1.0}, label_smoothing=0.1))
    torch.testing.assert_close(targets.sum(1), torch.ones(6))
    share = (targets[0, 0] - targets[0, 9]) / 0.9
    assert 0 < share < 1
    for a, b in ((0, 1), (2, 3), (4, 5)):
        for mine, other in ((a, b), (b, a)):
            if kind == "mixup":
                expected = share * IMAGES[mine] + (1 - share) * IMAGES[other]
                torch.testing.assert_close(images[mine], expected)
            else:
                kept = (images[mine] == IMAGES[mine]).float().mean()
                torch.testing.assert_close(kept, share)
                gone = (images[mine] == IMAGES[other]).float().mean()
                torch.testing.assert_close(gone, 1 - share)
            off = 0.1 / 10
            expected = torch.full((10,), off)
            expected[mine] += 0.9 * share
            expected[other] += 0.9 * (1 - share)
            torch.testing.assert_close(targets[mine], expected)


def test_the_blending_is_timms_own() -> None:
    order = [0, 2, 4, 5, 3, 1]
    timms = Mixup(mixup_alpha=0.8, cutmix_alpha=1.0, num_classes=10)
    for seed in range(6):
        source = image_source(tiny_vit(), (IMAGES, torch.arange(6)), labelled=True)
        (batch,) = source.batches(
            range(6),
            6,
            augment_seed=seed,
            augmentation=Augmentation(mixup=0.8, cutmix=1.0, label_smoothing=0.1),
            num_classes=10,
        )
        with seeded(mix(seed, "batch", 0)):
            images, targets = timms(IMAGES[order].clone(), torch.tensor(order))
        assert torch.equal(batch.images[order], images)
        assert torch.equal(batch.targets[order], targets)


def test_labels_stay_numbers_without_softening_and_vanish_when_only_images_mix() -> (
    None
):
    pair = (IMAGES, torch.arange(6))
    (plain,) = batches(pair, Augmentation(flip=0.5), num_classes=10)
    assert plain.targets is None
    assert plain.labels.tolist() == list(range(6))
    (healing,) = batches(pair, Augmentation(mixup=0.8))
    assert healing.targets is None
    assert healing.labels.tolist() == [-1] * 6
    (smooth,) = batches(pair, Augmentation(label_smoothing=0.1), num_classes=10)
    assert torch.equal(smooth.images, IMAGES)
    assert smooth.targets[3].argmax() == 3
    torch.testing.assert_close(smooth.targets[3, 3], torch.tensor(0.91))


@pytest.mark.parametrize("labels", [None, torch.arange(6) + 7])
def test_targets_need_labels_among_the_classes(labels: Tensor | None) -> None:
    images = IMAGES if labels is None else (IMAGES, labels)
    with pytest.raises(ValueError, match="10 classes"):
        batches(images, Augmentation(mixup=0.8), num_classes=10)


def test_the_odd_one_out_and_the_neighbour_of_a_gap_stay_as_they_are(
    tmp_path: Path,
) -> None:
    for number in range(5):
        noise((32, 32), number).save(tmp_path / f"{number}.png")
    (tmp_path / "2.png").write_text("broken")
    source = image_source(tiny_vit(), tmp_path, labelled=False, max_unreadable=0.5)
    (plain,) = source.batches(range(5), 5)
    (batch,) = source.batches(
        range(5), 5, augment_seed=0, augmentation=Augmentation(mixup=0.8)
    )
    # 0 and 1 are a pair; 2 cannot be read, so 3 is alone; 4 is the odd one.
    same = [torch.equal(a, b) for a, b in zip(batch.images, plain.images, strict=True)]
    assert same == [False, False, True, True]


def test_repeats_keep_the_length_and_are_augmented_each_anew(tmp_path: Path) -> None:
    for number in range(20):
        noise((40, 40), number).save(tmp_path / f"{number:02}.png")
    source = image_source(tiny_vit(), tmp_path, labelled=False)
    order = source.order(0, 0, repeats=3)
    assert len(order) == 20
    assert len(set(order)) == 8
    for seed in range(20):
        drawn = source.order(seed, 0, repeats=3)
        assert all(a != b for a, b in zip(drawn[::2], drawn[1::2], strict=True))
    assert source.order(0, 0) == source.order(0, 0, repeats=1)
    given = Augmentation(crop_area=(0.2, 0.8), repeats=3)
    made: dict[int, list[Tensor]] = {}
    options = {"augment_seed": 4, "augmentation": given}
    whole = [batch.images for batch in source.batches(order, 4, **options)]
    for image, tensor in zip(order, torch.cat(whole), strict=True):
        made.setdefault(image, []).append(tensor)
    for versions in made.values():
        for a in range(len(versions)):
            assert not any(torch.equal(versions[a], b) for b in versions[:a])
    late = [batch.images for batch in source.batches(order, 4, start=3, **options)]
    assert torch.equal(torch.cat(late), torch.cat(whole[3:]))
