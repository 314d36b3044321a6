"""Quadtrees over images: which patches are split when a fixed number of the most important ones may be.

    from quadtree import quadtree, select
    numbers = select(importances, quadtree(image_size=64, num_tokens=34))

mixed_resolution.py cuts images along them, and says why and when that helps. `select` finds the leaves of a whole batch
at once on its device; `greedy_reference` is the definition that the tests hold it against.

Source: Ronen, Levy, Golbert 2023, Vision Transformers with Mixed-Resolution Tokenization, arXiv 2304.00287.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from utils import SettingsError

SIZES = {32: (2, 8), 64: (4, 16), 128: (8, 32), 256: (16, 64)}  # the lab's (min_patch, max_patch) by side of the image


@dataclass(frozen=True)
class Quadtree:
    """Which trees an image may become. Its nodes are numbered scale by scale, largest patches first, each row-major.

    Args:
        image_size: side of the image in pixels.
        min_patch: side of the smallest patch, and of every token, in pixels.
        max_patch: side of the largest patch; min_patch times a power of two, and a divisor of image_size.
        num_tokens: leaves K, one of `valid_counts`.

    Raises:
        SettingsError: sides that do not fit into each other, or a number of tokens that no tree has.
    """

    image_size: int = 64
    min_patch: int = 4
    max_patch: int = 16
    num_tokens: int = 64

    def __post_init__(self) -> None:
        counts = valid_counts(self.image_size, self.min_patch, self.max_patch)
        if self.num_tokens in counts:
            return
        below = [count for count in counts if count < self.num_tokens][-1:]
        above = [count for count in counts if count > self.num_tokens][:1]
        near = " and ".join(str(count) for count in below + above)
        raise SettingsError(
            f"--num_tokens {self.num_tokens} has no tree: {self.image_size} pixels in patches of {self.max_patch} to "
            f"{self.min_patch} give {counts[0]} + 3 x splits, up to {counts[-1]}; nearest: {near}"
        )

    @property
    def sizes(self) -> list[int]:
        """Sides of the patches in pixels, from max_patch to min_patch."""
        return [self.max_patch >> level for level in range((self.max_patch // self.min_patch).bit_length())]

    @property
    def roots(self) -> int:
        """Patches of the uniform grid that every tree begins with."""
        return (self.image_size // self.max_patch) ** 2

    @property
    def splits(self) -> int:
        """How many leaves are replaced by their children."""
        return (self.num_tokens - self.roots) // 3


def valid_counts(image_size: int, min_patch: int, max_patch: int) -> range:
    """The numbers of tokens that a tree can have: (S / max_patch)^2, + 3, + 6, ..., (S / min_patch)^2.

    Raises:
        SettingsError: sides that do not fit into each other.
    """
    for name, value in (("image_size", image_size), ("min_patch", min_patch)):
        if value < 1:
            raise SettingsError(f"--{name} must be at least 1, not {value}")
    if max_patch <= min_patch:
        raise SettingsError(f"--max_patch {max_patch} must be larger than --min_patch {min_patch}")
    ratio = max_patch // min_patch
    if max_patch % min_patch or ratio & (ratio - 1):
        raise SettingsError(f"--max_patch {max_patch} must be --min_patch {min_patch} times a power of two")
    if image_size % max_patch:
        raise SettingsError(f"--image_size {image_size} must be a multiple of --max_patch {max_patch}")
    return range((image_size // max_patch) ** 2, (image_size // min_patch) ** 2 + 1, 3)


def quadtree(
    image_size: int = 64, min_patch: int | None = None, max_patch: int | None = None, num_tokens: int = 64
) -> Quadtree:
    """A checked tree; patch sides that are None are the lab's for this image (`SIZES`).

    Raises:
        SettingsError: as `Quadtree`, or a size that the lab has no patches for.
    """
    if min_patch is None or max_patch is None:
        if image_size not in SIZES:
            raise SettingsError(
                f"--image_size {image_size} is none of {', '.join(map(str, SIZES))}; give --min_patch and --max_patch"
            )
        usual = SIZES[image_size]
        min_patch = usual[0] if min_patch is None else min_patch
        max_patch = usual[1] if max_patch is None else max_patch
    return Quadtree(image_size, min_patch, max_patch, num_tokens)


def children(grid: torch.Tensor) -> torch.Tensor:
    """(b, g, g) values of nodes -> (b, 2g, 2g): each of the four children has its parent's."""
    return grid.repeat_interleave(2, 1).repeat_interleave(2, 2)


def ranks(values: torch.Tensor) -> torch.Tensor:
    """(b, n) -> (b, n) int64: how many values of the same row are smaller; equal ones share a rank.

    Compares every pair instead of sorting: n^2 comparisons and, uncompiled, as many bytes for each row. Compiled, that
    is one reduction, while the sort that Inductor writes in Triton is a network of exchanges, slow to compile.
    """
    return (values[:, None, :] < values[:, :, None]).sum(2)


def select(importances: Sequence[torch.Tensor], tree: Quadtree) -> torch.Tensor:
    """Which patches are the leaves after m splits of the most important leaf, found without splitting one by one.

    Number the nodes above min_patch by falling importance (equal ones: larger patches first, then row-major): rank 1 is
    the most important. Greedy search always splits the lowest rank at hand, so before it splits a rank r it has split
    every node whose path from the root stays below r, and no other. Hence a node's turn depends first on the worst rank
    on its path. Nodes that share it lie below one and the same node, which goes first; among the others the rest of the
    path counts in the same way. That is the lexicographic order of

        (max(r_0 .. r_l), max(r_1 .. r_l), ..., r_l, 0, ..., 0)    for a node of level l whose path has the ranks r,

    and the first m nodes in it are split. Every rank is found by comparing all pairs of the nodes above min_patch, 80
    of them in the lab's trees; the only loops are over scales, and nothing waits for the device.

    Args:
        importances: of each scale above min_patch, largest first: (b, (S / p)^2), row-major; must not be NaN.
        tree: the shape of the tree.

    Returns:
        (b, K) int64: numbers of the leaves, rising. All max_patch patches come first, row-major, then the next scale's.
    """
    scales = tree.sizes[:-1]
    sides = [tree.image_size // size for size in scales]
    if [part.shape[1] for part in importances] != [side * side for side in sides]:
        raise ValueError(f"importances must be (b, n) with n = {', '.join(str(side * side) for side in sides)}")
    images, device = importances[0].shape[0], importances[0].device
    wanted = torch.arange(tree.num_tokens, device=device).expand(images, -1).contiguous()  # (b, K)
    if tree.splits == 0:
        return wanted

    def by_scale(nodes: torch.Tensor) -> list[torch.Tensor]:  # (b, nodes) -> (b, g, g) of each scale
        parts = nodes.split([side * side for side in sides], 1)
        return [part.unflatten(1, (side, side)) for part, side in zip(parts, sides, strict=True)]

    values = torch.cat(tuple(importances), 1)  # (b, nodes)
    places = torch.arange(values.shape[1], device=device)
    others, own = values[:, None, :], values[:, :, None]
    before = (others > own) | ((others == own) & (places < places[:, None]))  # (b, nodes, nodes)
    order = before.sum(2) + 1
    worst: list[list[torch.Tensor]] = []  # of each scale: max(r_j .. r_l) for j = 0 .. l
    for rank in by_scale(order):
        above = [torch.maximum(children(column), rank) for column in worst[-1]] if worst else []
        worst.append([*above, rank])
    columns = [
        torch.cat([(part[level] if level < len(part) else torch.zeros_like(part[0])).flatten(1) for part in worst], 1)
        for level in range(len(scales))
    ]
    keys = columns[-1]
    for column in reversed(columns[:-1]):
        keys = column * (values.shape[1] + 1) + ranks(keys)  # ranks, so that no product can overflow
    chosen = ranks(keys) < tree.splits  # no two keys are equal

    leaves, there = [], torch.ones_like(chosen[:, : tree.roots]).unflatten(1, (sides[0], sides[0]))
    for split in by_scale(chosen):  # a node goes after its parent, so a split one has a split parent
        leaves.append((there & ~split).flatten(1))
        there = children(split)
    leaves.append(there.flatten(1))
    counted = torch.cat(leaves, 1).cumsum(1)  # (b, all patches of all scales): leaves up to here
    return torch.searchsorted(counted, wanted + 1)


def locate(numbers: torch.Tensor, tree: Quadtree) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Where patches lie: sides in pixels, rows and columns in the grid of their own scale, each shaped as numbers."""
    sizes, starts, start = torch.full_like(numbers, tree.max_patch), torch.zeros_like(numbers), 0
    for larger, size in zip(tree.sizes[:-1], tree.sizes[1:], strict=True):
        start += (tree.image_size // larger) ** 2
        sizes = torch.where(numbers >= start, size, sizes)
        starts = torch.where(numbers >= start, start, starts)
    places, sides = numbers - starts, tree.image_size // sizes
    return sizes, places // sides, places % sides


def greedy_reference(importances: Sequence[torch.Tensor], tree: Quadtree) -> list[tuple[int, int, int]]:
    """The definition, one split after another, for one image; for tests.

    Args:
        importances: of each scale above min_patch: ((S / p)^2,).
        tree: the shape of the tree.

    Returns:
        The leaves as (side in pixels, row, column in the grid of that side), in the order of `select`.
    """
    values = [part.tolist() for part in importances]
    sides = [tree.image_size // size for size in tree.sizes]
    heap = [(-value, 0, place) for place, value in enumerate(values[0])]
    heapq.heapify(heap)
    finest = []
    for _ in range(tree.splits):
        _, level, place = heapq.heappop(heap)
        row, column = divmod(place, sides[level])
        for child_row in (2 * row, 2 * row + 1):
            for child_column in (2 * column, 2 * column + 1):
                child = child_row * sides[level + 1] + child_column
                if level + 1 < len(values):
                    heapq.heappush(heap, (-values[level + 1][child], level + 1, child))
                else:
                    finest.append((level + 1, child))
    leaves = sorted([(level, place) for _, level, place in heap] + finest)
    return [(tree.sizes[level], *divmod(place, sides[level])) for level, place in leaves]
