"""mixed_resolution.py: every pixel in one token, leaves as the greedy definition picks them, content, positions."""

import json
import math

import pytest
import torch
import torch.nn.functional as F

import mixed_resolution
from mixed_resolution import (
    SCORERS,
    SIZES,
    ScorerNetwork,
    Tokens,
    centre_positions,
    mosaic,
    resize,
    scores,
    tokenize,
    train_scorer,
    uniform_tokens,
)
from quadtree import Quadtree, greedy_reference, locate, quadtree, select, valid_counts
from utils import SettingsError, count_parameters

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
TRAINING = {
    "num_classes": 2,
    "mean": (0.5, 0.5, 0.5),
    "deviation": (0.25, 0.25, 0.25),
    "epochs": 6,
    "batch_size": 24,
    "learning_rate": 3e-3,
    "seed": 5,
}


def noise(count: int, size: int, seed: int = 0, device="cpu") -> torch.Tensor:
    """Images whose detail differs from place to place."""
    generator = torch.Generator().manual_seed(seed)
    smooth = resize(torch.randn(count, 3, 4, 4, generator=generator), size)
    strength = resize(torch.rand(count, 1, 4, 4, generator=generator), size) ** 3
    return (smooth + strength * torch.randn(count, 3, size, size, generator=generator)).to(device)


def random_importances(tree: Quadtree, count: int, seed: int, values: int | None = None) -> list[torch.Tensor]:
    """Uniform numbers, or whole numbers below `values` with many ties."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(count, (tree.image_size // size) ** 2) for size in tree.sizes[:-1]]
    if values is None:
        return [torch.rand(shape, generator=generator) for shape in shapes]
    return [torch.randint(values, shape, generator=generator).float() for shape in shapes]


def leaves(numbers: torch.Tensor, tree: Quadtree) -> list[list[tuple[int, int, int]]]:
    """(size, row, column) of every image's leaves."""
    return [
        list(zip(*(part.tolist() for part in image), strict=True)) for image in zip(*locate(numbers, tree), strict=True)
    ]


def expected(importances: list[torch.Tensor], tree: Quadtree) -> list[list[tuple[int, int, int]]]:
    return [greedy_reference([part[image] for part in importances], tree) for image in range(len(importances[0]))]


def trained_on_stripes(**options) -> ScorerNetwork:
    """A scorer that tells flat images from images with stripes."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(100) % 2
    stripes = (torch.arange(16) // 2 % 2 * 120).to(torch.uint8)
    images = torch.randint(100, (100, 3, 1, 1), generator=generator).to(torch.uint8).repeat(1, 1, 16, 16)
    images[labels == 1] += stripes
    return train_scorer(images, labels, **(TRAINING | options))


# -- the tree ----------------------------------------------------------------------------------------------------------


def test_valid_counts():
    assert list(valid_counts(64, 4, 16)) == list(range(16, 257, 3))
    assert list(valid_counts(8, 2, 8)) == [1, 4, 7, 10, 13, 16]
    assert list(valid_counts(12, 3, 6)) == [4, 7, 10, 13, 16]
    for size, (small, large) in SIZES.items():
        counts = valid_counts(size, small, large)
        assert (counts[0], counts[-1]) == (16, 256) and 34 in counts and 49 in counts and 64 in counts


def test_tree_of_the_lab():
    assert quadtree() == quadtree(64) == Quadtree()
    tree = Quadtree()
    assert (tree.sizes, tree.roots, tree.splits) == ([16, 8, 4], 16, 16)
    assert quadtree(32, num_tokens=34) == Quadtree(32, 2, 8, 34)
    assert quadtree(48, 3, 12).sizes == [12, 6, 3]
    assert quadtree(64, min_patch=2, num_tokens=16).sizes == [16, 8, 4, 2]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((0, 4, 16, 64), "--image_size must be at least 1, not 0"),
        ((64, 0, 16, 64), "--min_patch must be at least 1, not 0"),
        ((64, 16, 16, 64), "--max_patch 16 must be larger than --min_patch 16"),
        ((64, 16, 4, 64), "--max_patch 4 must be larger than --min_patch 16"),
        ((64, 4, 12, 64), "--max_patch 12 must be --min_patch 4 times a power of two"),
        ((64, 4, 18, 64), "--max_patch 18 must be --min_patch 4 times a power of two"),
        ((72, 4, 16, 64), "--image_size 72 must be a multiple of --max_patch 16"),
        ((64, 4, 16, 50), "--num_tokens 50 has no tree"),
        ((64, 4, 16, 50), "nearest: 49 and 52"),
        ((64, 4, 16, 13), "nearest: 16"),
        ((64, 4, 16, 300), "up to 256; nearest: 256"),
    ],
)
def test_wrong_trees(arguments, words):
    with pytest.raises(SettingsError) as error:
        Quadtree(*arguments)
    assert words in str(error.value) and "\n" not in str(error.value) and ". " not in str(error.value)


def test_sizes_without_usual_patches_need_them():
    with pytest.raises(SettingsError, match="--image_size 48 is none of 32, 64, 128, 256; give --min_patch"):
        quadtree(48)


# -- selection ---------------------------------------------------------------------------------------------------------

TREES = [(16, 4, 8), (24, 3, 12), (32, 4, 16), (32, 2, 16), (32, 1, 16)]


@pytest.mark.parametrize("shape", TREES)
@pytest.mark.parametrize("values", [None, 1, 2, 4, 30])
def test_selection_is_greedy(shape, values):
    counts = valid_counts(*shape)
    for place in sorted({0, 1, 2, len(counts) // 4, len(counts) // 2, len(counts) - 2, len(counts) - 1}):
        tree = Quadtree(*shape, counts[place])
        importances = random_importances(tree, 12, place, values)
        numbers = select(importances, tree)
        assert numbers.shape == (12, tree.num_tokens) and numbers.dtype == torch.int64
        assert leaves(numbers, tree) == expected(importances, tree)


def test_selection_of_hundreds_of_images():
    tree = Quadtree()
    for values in (None, 9):
        importances = random_importances(tree, 300, 1, values)
        assert leaves(select(importances, tree), tree) == expected(importances, tree)


@pytest.mark.parametrize("shape", [(16, 2, 8), (32, 2, 16)])
def test_importance_that_grows_with_depth(shape):
    counts = valid_counts(*shape)
    for count in counts[:: max(1, len(counts) // 16)]:
        tree = Quadtree(*shape, count)
        importances = [part + 2 * level for level, part in enumerate(random_importances(tree, 6, count))]
        assert leaves(select(importances, tree), tree) == expected(importances, tree)
        negative = [-part for part in importances]
        assert leaves(select(negative, tree), tree) == expected(negative, tree)


def test_grandchild_that_matters_most_waits_for_its_ancestors():
    tree = Quadtree(32, 2, 16, 13)
    importances = [
        torch.tensor([[0.1, 0.5, 0.2, 0.3]]),
        torch.rand(1, 16, generator=torch.Generator().manual_seed(0)) / 100,
        torch.zeros(1, 64),
    ]
    importances[2][0, 0] = 1e9  # the first pixels, below root 0, which is the last to be split
    assert leaves(select(importances, tree), tree) == expected(importances, tree)
    assert {size for size, _, _ in leaves(select(importances, tree), tree)[0]} == {16, 8}
    importances[0][0, 0] = 0.4  # now root 0 is split second, and then its best child
    importances[1][0, 0] = 0.35
    chosen = leaves(select(importances, tree), tree)
    assert chosen == expected(importances, tree) and (4, 0, 0) in chosen[0]
    assert (2, 0, 0) in leaves(select(importances, Quadtree(32, 2, 16, 16)), Quadtree(32, 2, 16, 16))[0]


def test_ties_go_to_larger_patches_and_then_row_by_row():
    tree = Quadtree(16, 4, 8, 7)
    assert leaves(select([torch.ones(1, 4)], tree), tree)[0][:3] == [(8, 0, 1), (8, 1, 0), (8, 1, 1)]
    tree = Quadtree(32, 4, 16, 16)  # all four roots before any of their children
    assert {size for size, _, _ in leaves(select([torch.ones(1, 4), torch.ones(1, 16)], tree), tree)[0]} == {8}


def test_wrong_importances_are_refused():
    with pytest.raises(ValueError, match="n = 16, 64"):
        select([torch.ones(1, 64), torch.ones(1, 16)], Quadtree())


# -- every pixel once --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(32, 8, 16), (32, 4, 16), (32, 2, 16)])
@pytest.mark.parametrize("scorer", SCORERS)
def test_every_pixel_is_in_exactly_one_token(shape, scorer):
    torch.manual_seed(0)
    network, images = ScorerNetwork(3), noise(6, 32)
    counts = valid_counts(*shape)
    for count in {counts[0], counts[1], counts[len(counts) // 3], counts[len(counts) // 2], counts[-2], counts[-1]}:
        tree = Quadtree(*shape, count)
        importances = scores(images, tree, scorer, network=network)
        assert [part.shape for part in importances] == [(6, (32 // size) ** 2) for size in tree.sizes[:-1]]
        assert not any(part.requires_grad for part in importances)
        tokens = tokenize(images, tree, importances)
        assert tokens.patches.shape == (6, count, 3 * shape[1] ** 2) and tokens.sizes.dtype == torch.int64
        painted = torch.zeros(6, 32, 32, dtype=torch.int64)
        for image in range(6):
            for size, (x, y) in zip(tokens.sizes[image].tolist(), tokens.corners[image].tolist(), strict=True):
                assert x % size == y % size == 0
                painted[image, y : y + size, x : x + size] += 1
        assert (painted == 1).all()
        assert leaves(select(importances, tree), tree) == expected(importances, tree)


# -- content and positions ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(32, 4, 16), (24, 3, 12), (32, 2, 16)])
def test_content_is_each_patch_shrunk_alone(shape):
    counts = valid_counts(*shape)
    tree = Quadtree(*shape, counts[len(counts) // 3])
    images = noise(4, shape[0])
    tokens = tokenize(images, tree, scores(images, tree, "pixel_blur"))
    assert len(tokens.sizes.unique()) == len(tree.sizes)
    for image in range(4):
        one = tokens.of_image(image)
        for patch, centre, size, (x, y) in zip(
            one.patches, one.centres.tolist(), one.sizes.tolist(), one.corners.tolist(), strict=True
        ):
            piece = images[image : image + 1, :, y : y + size, x : x + size]
            side = tree.min_patch
            shrunk = F.interpolate(piece, size=(side, side), mode="bilinear", align_corners=False)
            assert torch.allclose(patch, shrunk.flatten(), rtol=0, atol=1e-6)
            assert centre == [(x + size / 2) / side, (y + size / 2) / side]


def test_fewest_tokens_are_the_coarse_grid():
    tree, images = Quadtree(num_tokens=16), noise(2, 64)
    tokens = tokenize(images, tree, scores(images, tree, "pixel_blur"))
    shrunk = uniform_tokens(F.interpolate(images, size=(16, 16), mode="bilinear", align_corners=False), 4)
    assert torch.equal(tokens.patches, shrunk.patches) and (tokens.sizes == 16).all()
    assert torch.equal(tokens.corners, uniform_tokens(images, 16).corners)


def test_most_tokens_are_the_fine_grid():
    tree, images = Quadtree(num_tokens=256), noise(2, 64)
    tokens, uniform = tokenize(images, tree, scores(images, tree, "pixel_blur")), uniform_tokens(images, 4)
    for part, other in zip(tokens, uniform, strict=True):
        assert part.dtype == other.dtype and torch.equal(part, other)


def test_uniform_tokens():
    images = torch.arange(2 * 3 * 4 * 4).view(2, 3, 4, 4).float()
    tokens = uniform_tokens(images, 2)
    assert tokens.patches.shape == (2, 4, 12)
    assert tokens.patches[0, 1].tolist() == [2, 3, 6, 7, 18, 19, 22, 23, 34, 35, 38, 39]
    assert tokens.centres[1].tolist() == [[4, 4], [12, 4], [4, 12], [12, 12]]  # in sixteenths of the image
    assert tokens.corners[1].tolist() == [[0, 0], [2, 0], [0, 2], [2, 2]]
    assert tokens.sizes.tolist() == [[2] * 4] * 2
    with pytest.raises(SettingsError, match="--patch_size 3 must divide"):
        uniform_tokens(images, 3)


def test_centres_are_half_way_for_the_smallest_patches_only():
    tree = Quadtree(16, 4, 8, 7)
    tokens = tokenize(noise(1, 16), tree, [torch.tensor([[0.0, 0.0, 9.0, 0.0]])])
    assert tokens.sizes[0].tolist() == [8, 8, 8, 4, 4, 4, 4]
    assert tokens.centres[0].tolist() == [[1, 1], [3, 1], [3, 3], [0.5, 2.5], [1.5, 2.5], [0.5, 3.5], [1.5, 3.5]]


def test_positions():
    found = centre_positions(torch.tensor([[0.5, 2.0]]), 12)
    steps = [1.0, 0.01, 0.0001]
    hand = [function(value * step) for value in (0.5, 2.0) for function in (math.sin, math.cos) for step in steps]
    assert found.shape == (1, 12) and found.dtype == torch.float32
    assert torch.allclose(found, torch.tensor([hand]), atol=1e-6)
    batch = centre_positions(torch.rand(2, 5, 2), 8)
    assert batch.shape == (2, 5, 8)
    for width in (4, 10, 0):
        with pytest.raises(SettingsError, match=f"--embedding_dim {width} must be a multiple of 4 and at least 8"):
            centre_positions(torch.zeros(1, 2), width)


def test_resize():
    images = noise(2, 16)
    assert resize(images, 16) is images and resize(images, 24).shape == (2, 3, 24, 24)
    small = F.interpolate(images, size=(4, 4), mode="bilinear", align_corners=False, antialias=True)
    assert torch.equal(resize(images, 4), small)


def test_mosaic():
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    tree = Quadtree(32, 2, 8, 256)
    whole = tokenize(images, tree, scores(images, tree, "random"))
    assert torch.equal(mosaic(images[1], whole.of_image(1)), images[1])
    assert torch.equal(mosaic(images[1], uniform_tokens(images, 8).of_image(1)), images[1])
    coarse = Quadtree(32, 2, 8, 16)
    seen = mosaic(images[0], tokenize(images, coarse, scores(images, coarse, "random")).of_image(0))
    shrunk = F.interpolate(images[:1], size=(8, 8), mode="bilinear", align_corners=False)[0]
    assert torch.equal(seen, shrunk.repeat_interleave(4, 1).repeat_interleave(4, 2))


# -- importance --------------------------------------------------------------------------------------------------------


def test_pixel_blur_by_its_definition():
    tree, images = Quadtree(), noise(2, 64)
    for size, found in zip(tree.sizes[:-1], scores(images, tree, "pixel_blur"), strict=True):
        small = F.interpolate(images, scale_factor=4 / size, mode="bilinear", align_corners=False)
        error = (images - F.interpolate(small, size=(64, 64), mode="bilinear", align_corners=False)).square()
        hand = (size * F.avg_pool2d(error, size).mean(1)).sqrt().flatten(1)
        assert torch.allclose(found, hand, rtol=1e-5)


def test_pixel_blur_finds_the_detail():
    tree = Quadtree(num_tokens=28)
    flat = torch.full((1, 3, 64, 64), 0.3)
    assert all(part.max() < 1e-5 for part in scores(flat, tree, "pixel_blur"))
    assert all((part == 0).all() for part in scores(torch.ones(1, 3, 64, 64), tree, "pixel_blur"))
    rows = torch.arange(64)
    board = ((rows[:, None] + rows) % 2).float()
    board[:, :32] = board[32:] = 0.5  # only the upper right quadrant is left
    importances = scores(board.expand(1, 3, 64, 64), tree, "pixel_blur")
    for part, side in zip(importances, (4, 8), strict=True):
        quadrants = part.view(2, side // 2, 2, side // 2).mean((1, 3)).flatten()
        assert quadrants.argmax() == 1 and quadrants[1] > 5 * quadrants[[0, 2, 3]].max()
    tokens = tokenize(board.expand(1, 3, 64, 64), tree, importances)
    small = tokens.corners[tokens.sizes < 16]
    assert (small[:, 0] >= 32).all() and (small[:, 1] < 32).all() and len(small) == 16


def test_random_scores_follow_their_generator():
    tree, images = Quadtree(), noise(3, 64)
    first, again, other = (
        scores(images, tree, "random", generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)
    )
    for part, same, different in zip(first, again, other, strict=True):
        assert torch.equal(part, same) and not torch.equal(part, different)
        assert not torch.equal(part[0], part[1]) and part.min() >= 0 and part.max() < 1


def test_trained_scorer():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    network, again = trained_on_stripes(), trained_on_stripes()
    assert torch.equal(torch.get_rng_state(), before)
    other = trained_on_stripes(seed=6)
    assert network.epoch_losses[-1] < 0.5 * network.epoch_losses[0] and len(network.epoch_losses) == 6
    for left, right in zip(network.parameters(), again.parameters(), strict=True):
        assert torch.equal(left, right) and not left.requires_grad
    assert not torch.equal(network.head.weight, other.head.weight) and not network.training
    assert 45_000 < count_parameters(network) < 50_000
    tree = Quadtree()
    images = torch.zeros(1, 3, 64, 64)
    images[..., 24:40, 24:26] = 1.5  # a bar on flat ground: in the patches (1, 1) and (2, 1) of 16 pixels
    coarse, fine = (part[0] for part in scores(images, tree, "trained", network=network))
    assert coarse.view(4, 4)[1:3, 1].min() > 10 * coarse.view(4, 4)[1, 3]
    assert fine.view(8, 8)[3:5, 3].min() > 10 * fine.view(8, 8)[3:5, 6].max()


def test_trained_scores_by_their_definition():
    torch.manual_seed(0)
    network, tree, images = ScorerNetwork(2), Quadtree(), noise(2, 64)
    found = scores(images, tree, "trained", network=network)
    with torch.no_grad():
        loss = 0
        for factor in (2, 4):
            small = F.interpolate(images, scale_factor=1 / factor, mode="bilinear", align_corners=False)
            blurred = F.interpolate(small, size=(64, 64), mode="bilinear", align_corners=False)
            loss = loss + (network.features(images) - network.features(blurred)).square().mean(1, keepdim=True)
    assert network.features(images).shape == (2, 64, 16, 16)
    for part, cells in zip(found, (4, 2), strict=True):
        assert torch.allclose(part, F.avg_pool2d(loss, cells).flatten(1), rtol=1e-4)


def test_autocast_does_not_change_importances():
    torch.manual_seed(0)
    network, tree, images = ScorerNetwork(2), Quadtree(), noise(2, 64)
    for scorer in ("pixel_blur", "trained"):
        plain = scores(images, tree, scorer, network=network)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            inside = scores(images, tree, scorer, network=network)
        for part, other in zip(plain, inside, strict=True):
            assert other.dtype == torch.float32 and torch.equal(part, other)


@pytest.mark.parametrize(
    ("scorer", "tree", "size", "words"),
    [
        ("entropy", Quadtree(), 64, "--scorer entropy is unknown; choose one of pixel_blur, random, trained"),
        ("trained", Quadtree(), 64, "--scorer trained needs a trained network"),
        ("random", Quadtree(), 32, "--image_size 64 needs images of 3 x 64 x 64, not 3 x 32 x 32"),
    ],
)
def test_wrong_scorers(scorer, tree, size, words):
    with pytest.raises(SettingsError) as error:
        scores(noise(1, size), tree, scorer)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_wrong_uses_of_the_trained_scorer():
    with pytest.raises(SettingsError, match="multiples of 4, not 8, 4, 2"):
        scores(noise(1, 32), Quadtree(32, 1, 8, 16), "trained", network=ScorerNetwork(2))
    with pytest.raises(SettingsError, match="--scorer trained needs at least one image, one epoch"):
        trained_on_stripes(epochs=0)
    with pytest.raises(SettingsError, match="--image_size 64 needs images"):
        tokenize(noise(1, 32), Quadtree(), [torch.ones(1, 16), torch.ones(1, 64)])


# -- compiled ----------------------------------------------------------------------------------------------------------


def compiled_equals_eager(backend: str, device: str, scorers, trees) -> None:
    torch.manual_seed(0)
    network = ScorerNetwork(2).to(device)
    for tree in trees:
        images = noise(4, tree.image_size, device=device)
        for scorer in scorers:
            torch._dynamo.reset()

            def both(images, tree=tree, scorer=scorer):
                importances = scores(images, tree, scorer, network=network)
                tokens = tokenize(images, tree, importances)
                return tokens, centre_positions(tokens.centres, 16), importances

            tokens, positions, importances = torch.compile(both, backend=backend, fullgraph=True, dynamic=False)(images)
            assert isinstance(tokens, Tokens)
            eager = tokenize(images, tree, importances)  # random numbers and roundings of scores may differ
            for part, other in zip(tokens, eager, strict=True):
                assert torch.allclose(part, other, atol=1e-5)
            assert torch.allclose(positions, centre_positions(eager.centres, 16), atol=1e-5)
            if scorer != "random":
                for part, other in zip(importances, scores(images, tree, scorer, network=network), strict=True):
                    assert torch.allclose(part, other, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("scorer", "tree"), [("pixel_blur", Quadtree(32, 2, 16, 64)), ("random", Quadtree()), ("trained", Quadtree())]
)
def test_compiled_as_one_graph(scorer, tree):
    compiled_equals_eager("aot_eager", "cpu", [scorer], [tree])  # inductor's C++ takes 40 s here; it runs on a GPU


@pytest.mark.gpu
def test_gpu_compiled():
    compiled_equals_eager("inductor", "cuda", SCORERS, [Quadtree(), Quadtree(32, 2, 16, 64)])


@pytest.mark.gpu
def test_gpu_selection_is_greedy_and_does_not_wait():
    tree = Quadtree()
    for values in (None, 5):
        importances = [part.cuda() for part in random_importances(tree, 512, 2, values)]
        images = noise(512, 64, device="cuda")
        torch.cuda.set_sync_debug_mode("error")
        try:
            tokenize(images, tree, scores(images, tree, "pixel_blur"))
            numbers = select(importances, tree)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert leaves(numbers.cpu(), tree) == expected([part.cpu() for part in importances], tree)


@pytest.mark.gpu
def test_gpu_scorer_is_deterministic():
    labels = torch.arange(64, device="cuda") % 2
    images = torch.randint(255, (64, 3, 16, 16), generator=torch.Generator().manual_seed(0)).to(torch.uint8).cuda()
    first, again = (train_scorer(images, labels, **TRAINING) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))


# -- the script --------------------------------------------------------------------------------------------------------


def run_main(monkeypatch, folder, *more):
    words = ["--batch_size", "2", "--rounds", "1", "--repeats", "1", "--use_compile", "false", *more]
    monkeypatch.setattr("sys.argv", ["mixed_resolution.py", *words, "--output_folder", str(folder)])
    return mixed_resolution.main()


def test_main_times_every_scorer(tmp_path, monkeypatch, capsys):
    assert run_main(monkeypatch, tmp_path, "--image_size", "32", "--num_tokens", "34") == 0
    printed = capsys.readouterr().out
    assert "34 tokens; possible are 16 to 256 in steps of 3" in printed
    run = json.loads((tmp_path / "techniques" / "mixed_resolution" / "run.json").read_text())
    rows = {row["variant"]: row for row in run["results"]["rows"]}
    assert list(rows) == ["32 px uniform", *(f"32 px {name}" for name in SCORERS)]
    assert "us an image, 16 tokens" in rows["32 px uniform"]["note"]
    for name in SCORERS:
        assert rows[f"32 px {name}"]["exactness"] == "bitwise" and "us an image" in rows[f"32 px {name}"]["note"]
    assert run["results"]["trees"] == [{"image_size": 32, "sizes": [8, 4, 2], "num_tokens": 34}]


def test_main_with_another_tree_and_one_scorer(tmp_path, monkeypatch):
    words = ("--image_size", "48", "--min_patch", "3", "--max_patch", "12", "--scorer", "pixel_blur")
    assert run_main(monkeypatch, tmp_path, *words) == 0
    run = json.loads((tmp_path / "techniques" / "mixed_resolution" / "run.json").read_text())
    assert [row["variant"] for row in run["results"]["rows"]] == ["48 px uniform", "48 px pixel_blur"]


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--num_tokens", "65"], "--num_tokens 65 has no tree"),
        (["--repeats", "0"], "--repeats must be at least 1"),
        (["--min_patch", "2"], "give --image_size as well"),
        (["--image_size", "100"], "--image_size 100 is none of"),
    ],
)
def test_wrong_settings(tmp_path, monkeypatch, more, words):
    with pytest.raises(SettingsError, match=words):
        run_main(monkeypatch, tmp_path, *more)
