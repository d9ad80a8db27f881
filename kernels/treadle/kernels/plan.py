"""Where the elements of a layout live on a receiver: a list of strided rectangles, made once.

Receivers keep weights in layouts of their own: query, key and value fused into one matrix, gate and up stacked,
slices of a tensor-parallel rank, experts in one block, transposed. A delta is applied through the plan straight
into them, without building the tensor that was published.

P pieces, R rectangles, D destinations.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from treadle.kernels.layout import Layout

COLUMNS = 9  # of a rectangle: start, rows, cols, stride, destination, offset, row step, column step, counted
Rectangle = tuple[int, ...]


class Plan:
    """The way from a layout's elements to a receiver's tensors.

    Example, for a fused projection of rank 0 of 2:

        plan = Plan(layout)
        plan.place("q_proj.weight", qkv[0:512], of=(1024, 2048), view=lambda w: w[:512])
        plan.place("lm_head.weight", head.t(), of=(32000, 2048))

    Every element is to be placed at most once per plan, but for `copy=True`; elements that are not placed belong to
    another rank. Destinations are all on one device, and are held by the plan.
    """

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.destinations: list[Tensor] = []
        self._rectangles: list[list[Rectangle]] = [[] for _ in layout.pieces]
        self._baked: tuple[Tensor, Tensor] | None = None

    @classmethod
    def direct(cls, layout: Layout, tensors: Iterable[tuple[str, Tensor]]) -> Plan:
        """The plan of a receiver that keeps whole tensors under their published names."""
        plan = cls(layout)
        for name, tensor in tensors:
            plan.place(name, tensor, of=tuple(tensor.shape))
        return plan

    def place(
        self,
        name: str,
        destination: Tensor,
        *,
        of: Sequence[int],
        view: Callable[[Tensor], Tensor] = lambda whole: whole,
        copy: bool = False,
    ) -> None:
        """Says that `destination` holds what `view` selects of tensor `name`, which has shape `of`.

        `view` is any chain of slices, transpositions and reshapes without a copy; the destination has the view's
        shape, any strides, and the piece's dtype. `copy` marks further copies of elements that are placed elsewhere
        too (tied embeddings), so that the digest counts them once. Raises `ValueError` where this does not fit.
        """
        if name not in self.layout.index:
            raise ValueError(f"plan: {name} is not in the layout")
        at = self.layout.index[name]
        piece = self.layout.pieces[at]
        whole = torch.empty(tuple(of), dtype=piece.dtype, device="meta")
        source = view(whole)
        if whole.numel() != piece.numel or piece.flat_offset:
            raise ValueError(
                f"plan: {name} has {piece.numel} elements in the layout, shape {tuple(of)} has not"
            )
        if source.shape != destination.shape or source.dtype != destination.dtype:
            raise ValueError(
                f"plan: {name}: the view is {source.dtype} {tuple(source.shape)}, its destination "
                f"{destination.dtype} {tuple(destination.shape)}"
            )
        if self.destinations and destination.device != self.destinations[0].device:
            raise ValueError(
                f"plan: {name} is on {destination.device}, others on {self.destinations[0].device}"
            )
        target = len(self.destinations)
        self.destinations.append(destination.detach())
        self._rectangles[at] += _rectangles(source, destination, target, counted=not copy)
        self._baked = None

    @property
    def device(self) -> torch.device:
        return self.destinations[0].device if self.destinations else torch.device("cpu")

    @property
    def placed_elements(self) -> int:
        """Elements of the layout that this receiver holds, copies not counted."""
        return sum(r[1] * r[2] for piece in self._rectangles for r in piece if r[8])

    def baked(self) -> tuple[Tensor, Tensor]:
        """Rectangles [R, 9] and the first rectangle of each piece [P + 1], int64 on the destinations' device."""
        if self._baked is None:
            rows = list(itertools.chain.from_iterable(self._rectangles))
            first = [0, *itertools.accumulate(map(len, self._rectangles))]
            self._baked = (
                torch.tensor(rows, dtype=torch.int64).reshape(-1, COLUMNS).to(self.device),
                torch.tensor(first, dtype=torch.int64).to(self.device),
            )
        return self._baked


def _rectangles(source: Tensor, destination: Tensor, target: int, *, counted: bool) -> list[Rectangle]:
    """Both have the same shape; their strides say where an element comes from and where it goes."""
    if source.numel() == 0:
        return []
    dims = _merged(
        [
            (size, steps)
            for size, *steps in zip(source.shape, source.stride(), destination.stride(), strict=True)
            if size > 1
        ]
    )
    if any(0 in steps for _, steps in dims):
        raise ValueError("plan: the view or its destination repeats elements; place each copy on its own")
    if not dims or dims[-1][1][0] != 1:
        dims.append((1, [1, 0]))  # no run of neighbours: columns of one element
    if len(dims) < 2:
        dims.insert(0, (1, [source.numel(), 0]))
    *outer, (rows, (stride, row_step)), (cols, (_, col_step)) = dims
    found: list[Rectangle] = []
    for place in itertools.product(*(range(size) for size, _ in outer)):
        start = int(source.storage_offset()) + sum(
            i * steps[0] for i, (_, steps) in zip(place, outer, strict=True)
        )
        offset = sum(i * steps[1] for i, (_, steps) in zip(place, outer, strict=True))
        found.append((start, rows, cols, stride, target, offset, row_step, col_step, int(counted)))
    return found


def _merged(dims: list[tuple[int, list[int]]]) -> list[tuple[int, list[int]]]:
    """Dimensions in the order of the source's memory, neighbours joined where both sides run on."""
    merged: list[tuple[int, list[int]]] = []
    for size, steps in sorted(dims, key=lambda dim: -dim[1][0]):
        if merged and all(outer == size * inner for outer, inner in zip(merged[-1][1], steps, strict=True)):
            merged[-1] = (merged[-1][0] * size, steps)
        else:
            merged.append((size, steps))
    return merged
