"""image_augmentation.py: each operation by its formula, by PIL or by exact pixels, mixing, ranges, the compiler."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from image_augmentation import (
    CUTMIX,
    MIXUP,
    NO_MIXING,
    NUMBERS,
    OPERATIONS,
    Augmentation,
    apply_colour,
    augment,
    compose,
    crop_matrix,
    cutout_mask,
    draw_mixing,
    draw_numbers,
    mixing_weights,
    normalise,
    operation_matrix,
    resample,
    rotation_matrix,
    shift_and_flip,
)
from utils import SettingsError

CPU = torch.device("cpu")
NOTHING = Augmentation(flip=False, crop_padding=0)
MEAN, DEVIATION = torch.tensor([0.4, 0.5, 0.6]), torch.tensor([0.2, 0.25, 0.3])


pytestmark = pytest.mark.usefixtures("one_thread")


def random_pixels(count: int, size: int = 32, seed: int = 0) -> np.ndarray:
    """Smooth random images, so that JPEG and resampling have something to keep."""
    coarse = np.random.default_rng(seed).integers(0, 256, (count, 3, 4, 4), dtype=np.uint8)
    tensor = torch.nn.functional.interpolate(torch.from_numpy(coarse).float(), size=(size, size), mode="bilinear")
    return tensor.round().byte().numpy()


def batch_of(count: int = 12, size: int = 32) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.from_numpy(random_pixels(count, size)), torch.arange(count) % 5


def run(images, labels, augmentation, numbers=None, mixing=None, function=augment):
    numbers = (
        draw_numbers(len(images), augmentation, torch.Generator().manual_seed(1), CPU) if numbers is None else numbers
    )
    mixing = draw_mixing(1, augmentation, 0, 0, CPU)[0] if mixing is None else mixing
    return function(
        images,
        labels,
        numbers,
        mixing,
        augmentation=augmentation,
        mean=MEAN,
        deviation=DEVIATION,
        num_classes=5,
    )


def test_nothing_is_normalise():
    images, labels = batch_of()
    inputs, targets = run(images, labels, NOTHING)
    expected = (images.double() / 255 - MEAN.double()[:, None, None]) / DEVIATION.double()[:, None, None]
    assert torch.allclose(inputs.double(), expected, atol=1e-5)
    assert torch.equal(inputs, normalise(images, MEAN, DEVIATION))
    assert torch.equal(targets, torch.nn.functional.one_hot(labels, 5).float())


def test_flip_is_exact():
    images, labels = batch_of()
    numbers = torch.rand(len(images), NUMBERS)
    numbers[:, 0] = torch.arange(len(images)) % 2 * 0.5  # 0: mirrored, 0.5: not
    inputs, _ = run(images, labels, replace(NOTHING, flip=True), numbers)
    plain = normalise(images, MEAN, DEVIATION)
    assert torch.equal(inputs[::2], plain[::2].flip(3)) and torch.equal(inputs[1::2], plain[1::2])


@pytest.mark.parametrize("way", ["gather", "resample"])
def test_crop_is_an_exact_shift_with_black_around(way):
    images, _ = batch_of(81, 16)
    down, right = torch.arange(81) // 9 - 4, torch.arange(81) % 9 - 4
    mirrored = torch.arange(81) % 2 == 1
    if way == "gather":
        found = shift_and_flip(images, mirrored, down, right)
        assert found.dtype == torch.uint8
    else:
        found = resample(images, crop_matrix(mirrored, down, right, 16)).byte()
    for number in range(81):
        image = images[number].flip(2) if mirrored[number] else images[number]
        padded = torch.nn.functional.pad(image, (4, 4, 4, 4))
        top, left = 4 + down[number], 4 + right[number]
        assert torch.equal(found[number], padded[:, top : top + 16, left : left + 16])


def test_crop_offsets_cover_the_padding():
    images, labels = batch_of(400, 8)
    images[:] = 0
    images[:, :, 4, 4] = 255
    numbers = torch.rand(400, NUMBERS, generator=torch.Generator().manual_seed(0))
    numbers[0, 1:3], numbers[1, 1:3] = 0, 1 - 2**-24
    inputs, _ = run(images, labels, replace(NOTHING, crop_padding=2), numbers)
    places = inputs[:, 0].flatten(1).argmax(1)
    assert set((places // 8).tolist()) == set((places % 8).tolist()) == {2, 3, 4, 5, 6}
    assert places[0] == 6 * 8 + 6 and places[1] == 2 * 8 + 2


def test_rotation_by_90_degrees_is_rot90():
    images, labels = batch_of()
    numbers = torch.full((len(images), NUMBERS), 0.5)
    for number, turns in ((1.0, 1), (0.0, -1), (0.5, 0)):
        numbers[:, 3] = number
        inputs, _ = run(images, labels, replace(NOTHING, rotation_degrees=90), numbers)
        expected = normalise(torch.rot90(images, turns, (2, 3)), MEAN, DEVIATION)
        assert torch.allclose(inputs, expected, atol=1e-4)


def matrix_of(name: str, sign: float, magnitude: float = 10.0) -> torch.Tensor:
    return operation_matrix(torch.tensor([OPERATIONS.index(name)]), torch.tensor([sign]), magnitude)


def test_geometric_operations():
    images, _ = batch_of(1)
    for name in OPERATIONS:
        is_identity = torch.allclose(matrix_of(name, 1.0), torch.eye(2, 3)[None])
        assert is_identity == (name not in ("rotate", "shear_x", "shear_y", "translate_x", "translate_y"))
    moved = resample(images, matrix_of("translate_x", 1.0)).byte()  # 10 pixels of 32 at magnitude 10
    assert torch.equal(moved[..., :-10], images[..., 10:]) and moved[..., -10:].max() == 0
    moved = resample(images, matrix_of("translate_y", -1.0)).byte()
    assert torch.equal(moved[:, :, 10:], images[:, :, :-10]) and moved[:, :, :10].max() == 0
    for name, coefficients in (
        ("shear_x", (1, 0.3, -0.3 * 16, 0, 1, 0)),
        ("shear_y", (1, 0, 0, 0.3, 1, -0.3 * 16)),
    ):
        picture = Image.fromarray(images[0].permute(1, 2, 0).numpy())
        expected = picture.transform((32, 32), Image.Transform.AFFINE, coefficients, Image.Resampling.BILINEAR)
        found = resample(images, matrix_of(name, 1.0))[0].permute(1, 2, 0)
        difference = (found - torch.from_numpy(np.array(expected)).float())[4:-4, 10:-10].abs()
        assert difference.max() <= 2
    picture = Image.fromarray(images[0].permute(1, 2, 0).numpy()).rotate(30, Image.Resampling.BILINEAR)
    found = resample(images, matrix_of("rotate", 1.0))[0].permute(1, 2, 0)
    assert (found - torch.from_numpy(np.array(picture)).float())[8:-8, 8:-8].abs().max() <= 2


def test_compose_is_first_then_second():
    images, _ = batch_of(3)
    none, still = torch.zeros(3, dtype=torch.bool), torch.zeros(3, dtype=torch.int64)
    shift, turn = crop_matrix(none, still + 3, still - 2, 32), rotation_matrix(torch.full((3,), 90.0))
    expected = torch.rot90(shift_and_flip(images, none, still + 3, still - 2), 1, (2, 3))
    assert torch.equal(resample(images, compose(shift, turn)).byte(), expected)


def coloured(images: torch.Tensor, name: str, sign: float, magnitude: float) -> torch.Tensor:
    kinds = torch.full((len(images),), OPERATIONS.index(name))
    return apply_colour(images.float(), kinds, torch.full((len(images),), sign), magnitude)


def test_colour_operations_follow_their_formulas():
    images, _ = batch_of(4)
    pixels = images.float()
    assert torch.equal(coloured(images, "invert", 1.0, 5), 255 - pixels)
    for magnitude, threshold in ((0, 256), (5, 128), (10, 0)):
        expected = torch.where(pixels >= threshold, 255 - pixels, pixels)
        assert torch.equal(coloured(images, "solarize", 1.0, magnitude), expected)
    for magnitude, bits in ((0, 8), (5, 6), (10, 4)):
        expected = images >> (8 - bits) << (8 - bits)
        assert torch.equal(coloured(images, "posterize", 1.0, magnitude).byte(), expected)
    for sign in (-1.0, 1.0):
        expected = (pixels * (1 + sign * 0.45)).clamp(0, 255)
        assert (coloured(images, "brightness", sign, 5) - expected).abs().max() <= 0.501
        gray = (pixels * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(1, keepdim=True)
        expected = (gray + (1 + sign * 0.9) * (pixels - gray)).clamp(0, 255)
        assert (coloured(images, "color", sign, 10) - expected).abs().max() <= 0.51
        level = gray.mean((2, 3), keepdim=True).round()
        expected = (level + (1 + sign * 0.9) * (pixels - level)).clamp(0, 255)
        assert (coloured(images, "contrast", sign, 10) - expected).abs().max() <= 0.51
    for name in ("identity", "rotate", "shear_x", "shear_y", "translate_x", "translate_y"):
        assert torch.equal(coloured(images, name, 1.0, 9), pixels)
    for name in OPERATIONS:
        found = coloured(images, name, 1.0, 9)
        assert torch.equal(found, found.round()) and found.min() >= 0 and found.max() <= 255


@pytest.mark.parametrize("name", ["brightness", "contrast", "color", "sharpness", "autocontrast"])
def test_colour_operations_agree_with_pil(name):
    images, _ = batch_of(4)
    images = images // 2 + 40
    for sign in (-1.0, 1.0):
        found = coloured(images, name, sign, 6)
        for image, own in zip(images, found, strict=True):
            picture = Image.fromarray(image.permute(1, 2, 0).numpy())
            if name == "autocontrast":
                expected = ImageOps.autocontrast(picture)
            else:
                expected = getattr(ImageEnhance, name.capitalize())(picture).enhance(1 + sign * 0.9 * 0.6)
            assert (own.permute(1, 2, 0) - torch.from_numpy(np.array(expected)).float()).abs().max() <= 2


def test_sharpness_at_full_blend_is_pils_smooth_filter():
    images, _ = batch_of(1)
    found = coloured(images, "sharpness", -1.0, 10)  # 0.9 of the smoothed image
    smooth = np.array(Image.fromarray(images[0].permute(1, 2, 0).numpy()).filter(ImageFilter.SMOOTH), dtype=np.float32)
    expected = 0.9 * torch.from_numpy(smooth).permute(2, 0, 1) + 0.1 * images[0].float()
    assert (found[0] - expected).abs().max() <= 1.5


def test_autocontrast_leaves_flat_images():
    flat = torch.full((2, 3, 8, 8), 77, dtype=torch.uint8)
    assert torch.equal(coloured(flat, "autocontrast", 1.0, 9), flat.float())


def forced(count: int, *names: str, sign: float = 1.0) -> torch.Tensor:
    """Numbers that draw these operations, no flip, no shift, no rotation."""
    numbers = torch.full((count, NUMBERS), 0.5)
    for place, name in enumerate(names):
        numbers[:, 6 + 2 * place] = (OPERATIONS.index(name) + 0.5) / len(OPERATIONS)
        numbers[:, 7 + 2 * place] = 0.75 if sign > 0 else 0.25
    return numbers


def test_drawn_operations_are_applied():
    images, labels = batch_of()
    two = replace(NOTHING, operations=2, magnitude=10)
    plain = normalise(images, MEAN, DEVIATION)
    assert torch.equal(run(images, labels, two, forced(12, "identity", "identity"))[0], plain)
    assert torch.equal(run(images, labels, two, forced(12, "invert", "invert"))[0], plain)
    inverted = normalise(255 - images, MEAN, DEVIATION)
    assert torch.equal(run(images, labels, two, forced(12, "identity", "invert"))[0], inverted)
    dark = coloured(images, "brightness", -1.0, 10)
    inverted = run(images, labels, two, forced(12, "brightness", "invert", sign=-1))[0]
    assert torch.equal(inverted, normalise(255 - dark, MEAN, DEVIATION))  # in the drawn order
    moved = resample(images, matrix_of("translate_x", 1.0).expand(12, 2, 3))
    for names in (("translate_x", "invert"), ("invert", "translate_x")):  # geometry first
        found = run(images, labels, two, forced(12, *names))[0]
        assert torch.equal(found, normalise(255 - moved, MEAN, DEVIATION))
    weak = run(images, labels, replace(two, magnitude=0.0), forced(12, "rotate", "posterize"))[0]
    assert torch.equal(weak, plain)


def test_every_operation_is_drawn_equally_often():
    numbers = draw_numbers(28_000, Augmentation(operations=4), torch.Generator().manual_seed(0), CPU)
    assert numbers.shape == (28_000, NUMBERS) and numbers.min() >= 0 and numbers.max() < 1
    for place in range(4):
        counts = torch.bincount((numbers[:, 6 + 2 * place] * len(OPERATIONS)).long())
        assert counts.shape == (len(OPERATIONS),) and (counts - 2000).abs().max() < 250


@pytest.mark.parametrize("side", [1, 4, 5, 32])
def test_cutout_side(side):
    images, labels = batch_of()
    numbers = torch.full((12, NUMBERS), 0.5)
    numbers[0, 4:6] = 0.0
    inputs, _ = run(images, labels, replace(NOTHING, cutout=side), numbers)
    plain = normalise(images, MEAN, DEVIATION)
    begin = 16 - side // 2
    expected = plain.clone()
    expected[1:, :, begin : begin + side, begin : begin + side] = 0  # the mean colour
    kept = side - side // 2  # clipped at the corner
    expected[0, :, :kept, :kept] = 0
    assert torch.equal(inputs, expected)
    assert (~cutout_mask(numbers[1:, 4:6], side, 32)).sum((1, 2, 3)).tolist() == [side * side] * 11


# --- Mixing and targets -----------------------------------------------------------------------------------------------


def test_mixup_is_the_convex_combination():
    images, labels = batch_of()
    settings = replace(NOTHING, mixup_alpha=0.4, label_smoothing=0.1)
    share = 0.3
    inputs, targets = run(images, labels, settings, mixing=torch.tensor([MIXUP, share, 0.5, 0.5]))
    plain = normalise(images, MEAN, DEVIATION)
    assert torch.allclose(inputs, share * plain + (1 - share) * torch.cat([plain[1:], plain[:1]]), atol=1e-6)
    hard = torch.nn.functional.one_hot(labels, 5).float() * 0.9 + 0.1 / 5
    assert torch.allclose(targets, share * hard + (1 - share) * torch.cat([hard[1:], hard[:1]]), atol=1e-6)


@pytest.mark.parametrize(("row", "column"), [(0.5, 0.5), (0.0, 0.99), (0.02, 0.4)])
@pytest.mark.parametrize("share", [0.0, 0.31, 0.75, 1.0])
def test_cutmix_lambda_is_the_share_of_pixels(share, row, column):
    images, labels = torch.zeros(4, 3, 32, 32, dtype=torch.uint8), torch.arange(4)
    images += torch.arange(0, 200, 50, dtype=torch.uint8)[:, None, None, None]  # image i is flat
    settings = replace(NOTHING, cutmix_alpha=1.0)
    inputs, targets = run(images, labels, settings, mixing=torch.tensor([CUTMIX, share, row, column]))
    plain = normalise(images, MEAN, DEVIATION)
    own, others = inputs == plain, inputs == plain.roll(-1, 0)
    assert (own ^ others).all()
    for number in range(4):
        kept = own[number, 0].float().mean()
        assert targets[number, number] == pytest.approx(kept.item(), abs=1e-6)
        assert targets[number, (number + 1) % 4] == pytest.approx(1 - kept.item(), abs=1e-6)
    half = int(32 * math.sqrt(1 - share)) // 2
    ends = [(max(0, int(32 * c) - half), min(32, int(32 * c) + half)) for c in (row, column)]
    box = ~own[0, 0]
    assert box.sum() == (ends[0][1] - ends[0][0]) * (ends[1][1] - ends[1][0])
    assert box[ends[0][0] : ends[0][1], ends[1][0] : ends[1][1]].all()


def test_draw_mixing():
    both = replace(NOTHING, mixup_alpha=0.2, cutmix_alpha=1.0)
    rows = draw_mixing(2000, both, 0, 0, CPU)
    assert rows.shape == (2000, 4) and rows.dtype == torch.float32 and rows.min() >= 0
    assert torch.equal(rows, draw_mixing(2000, both, 0, 0, CPU))
    assert not torch.equal(rows, draw_mixing(2000, both, 0, 1, CPU))
    assert not torch.equal(rows, draw_mixing(2000, both, 1, 0, CPU))
    is_mixup = rows[:, 0] == MIXUP
    assert set(rows[:, 0].tolist()) == {MIXUP, CUTMIX} and abs(is_mixup.float().mean() - 0.5) < 0.05
    # The variance of Beta(a, a) is 1 / (4 (2 a + 1)).
    assert rows[is_mixup, 1].var().item() == pytest.approx(1 / (4 * 1.4), rel=0.1)
    assert rows[~is_mixup, 1].var().item() == pytest.approx(1 / 12, rel=0.1)
    for settings, kind in ((replace(both, mixup_alpha=0.0), CUTMIX), (replace(both, cutmix_alpha=0.0), MIXUP)):
        assert (draw_mixing(20, settings, 0, 0, CPU)[:, 0] == kind).all()
    assert draw_mixing(2, NOTHING, 0, 0, CPU)[:, :2].tolist() == [[NO_MIXING, 1], [NO_MIXING, 1]]
    assert mixing_weights(torch.tensor([NO_MIXING, 0.3, 0.5, 0.5]), 8).eq(1).all()


ALL = Augmentation(True, 4, 15.0, 2, 9.0, 8, 0.2, 1.0, 0.1)
WAYS = {
    "plain": Augmentation(),
    "nothing": NOTHING,
    "rotation": Augmentation(rotation_degrees=20.0, cutout=5),
    "operations": Augmentation(flip=False, crop_padding=0, operations=4),
    "mixup": Augmentation(mixup_alpha=0.2, label_smoothing=0.1),
    "all": ALL,
}


@pytest.mark.parametrize("name", WAYS)
def test_targets_sum_to_one_and_the_same_numbers_give_the_same_batch(name):
    images, labels = batch_of()
    before = images.clone()
    inputs, targets = run(images, labels, WAYS[name])
    assert inputs.shape == (12, 3, 32, 32) and inputs.dtype == targets.dtype == torch.float32
    assert inputs.isfinite().all() and torch.allclose(targets.sum(1), torch.ones(12), atol=1e-6)
    assert targets.min() >= 0
    again = run(images, labels, WAYS[name])
    assert torch.equal(again[0], inputs) and torch.equal(again[1], targets) and torch.equal(images, before)
    if name != "nothing":
        other = run(images, labels, WAYS[name], draw_numbers(12, WAYS[name], torch.Generator().manual_seed(2), CPU))
        assert not torch.equal(other[0], inputs)


def test_compiled_whole_equals_eager():
    """fullgraph=True: no break in the graph, so nothing waits for the device; compiled kernels run below."""
    once = replace(ALL, operations=1)
    torch.compiler.reset()
    images, labels = batch_of()
    compiled = torch.compile(augment, fullgraph=True, dynamic=False, backend="eager")
    for kind in (MIXUP, CUTMIX):
        mixing = torch.tensor([kind, 0.4, 0.3, 0.8])
        inputs, targets = run(images, labels, once, mixing=mixing)
        found = run(images, labels, once, mixing=mixing, function=compiled)
        assert torch.allclose(found[0], inputs, atol=1e-5) and torch.allclose(found[1], targets, atol=1e-6)
    torch.compiler.reset()


def test_autocast_does_not_change_the_geometry():
    images, labels = batch_of()
    inputs, targets = run(images, labels, ALL)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = run(images, labels, ALL)
    assert torch.equal(found[0], inputs) and torch.equal(found[1], targets)


@pytest.mark.gpu
def test_on_a_gpu_it_never_waits_and_costs_well_below_a_millisecond():
    device = torch.device("cuda")
    images, labels = (part.to(device) for part in batch_of(512))
    numbers = draw_numbers(512, ALL, torch.Generator(device).manual_seed(0), device)
    mixing = draw_mixing(1, ALL, 0, 0, device)[0]
    options = {"augmentation": ALL, "mean": MEAN.to(device), "deviation": DEVIATION.to(device), "num_classes": 5}
    compiled = torch.compile(augment, fullgraph=True, dynamic=False)
    found = compiled(images, labels, numbers, mixing, **options)
    torch.cuda.set_sync_debug_mode("error")
    try:
        inputs, targets = augment(images, labels, numbers, mixing, **options)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(20):
            compiled(images, labels, numbers, mixing, **options)
        end.record()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    assert begin.elapsed_time(end) / 20 < 1
    assert torch.allclose(found[1], targets, atol=1e-6)
    same = torch.isclose(found[0], inputs, atol=0.03).float().mean()  # a rounding of a byte may fall the other way
    assert same > 0.999


@pytest.mark.parametrize(
    ("changes", "flag"),
    [
        ({"crop_padding": -1}, "crop_padding"),
        ({"crop_padding": 32}, "crop_padding"),
        ({"rotation_degrees": 181.0}, "rotation_degrees"),
        ({"rotation_degrees": float("nan")}, "rotation_degrees"),
        ({"operations": 5}, "augment_operations"),
        ({"magnitude": 10.5}, "augment_magnitude"),
        ({"cutout": 33}, "cutout"),
        ({"mixup_alpha": -0.1}, "mixup_alpha"),
        ({"cutmix_alpha": float("inf")}, "cutmix_alpha"),
        ({"label_smoothing": 1.0}, "label_smoothing"),
    ],
)
def test_augmentation_out_of_range(changes, flag):
    ALL.check(32)
    with pytest.raises(SettingsError, match=f"^--{flag} must be"):
        replace(Augmentation(), **changes).check(32)
