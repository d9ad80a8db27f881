"""Tokens to their experts and back."""

from __future__ import annotations

import pytest
import torch
from tests.kernels.weights import generator, misaligned, random_bits, same_bits
from torch import Tensor

from treadle.kernels import native
from treadle.kernels.moe import Routing, combine_eager, moe_permute, moe_unpermute, route
from treadle.kernels.reduce import KINDS

T, K, H, E = 77, 3, 40, 6


def choices(seed: int, *, crowded: bool = False) -> Tensor:
    """Expert 4 gets nothing; one choice in ten is masked. `crowded`: nearly all go to expert 2."""
    found = torch.randint(0, E - 1, (T, K), generator=generator(seed))
    found[found == 4] = 5
    if crowded:
        found[torch.rand(T, K, generator=generator(seed + 1)) < 0.9] = 2
    found[torch.rand(T, K, generator=generator(seed + 2)) < 0.1] = -1
    return found


def plainly(expert_of: Tensor, hidden: Tensor, align: int) -> tuple[Tensor, list[int]]:
    """The rows, one expert after the other, from the definition."""
    rows, starts = [], [0]
    for e in range(E):
        mine = [
            hidden[t]
            for t in range(len(expert_of))
            for j in range(expert_of.shape[1])
            if expert_of[t, j] == e
        ]
        padding = -len(mine) % align
        rows += [*mine, *[torch.zeros_like(hidden[0])] * padding]
        starts.append(len(rows))
    return torch.stack(rows), starts


@pytest.mark.parametrize("dtype", list(KINDS), ids=str)
@pytest.mark.parametrize("align", [1, 16])
@pytest.mark.parametrize("crowded", [False, True])
def test_rows_are_those_of_the_definition_and_every_expert_is_signalled(
    backend: native.Library, dtype: torch.dtype, align: int, crowded: bool
) -> None:
    hidden = torch.randn(T, H, generator=generator(1)).to(dtype)
    expert_of = choices(3, crowded=crowded)
    routing = route(expert_of, experts=E, align=align)
    flags = torch.zeros(E, dtype=torch.int32)
    found = moe_permute(hidden, routing, flags=flags, epoch=7)
    expected, starts = plainly(expert_of, hidden, align)
    assert routing.offsets.tolist() == starts
    assert same_bits(found[: starts[-1]], expected)
    assert not found[starts[-1] :].any()
    assert flags.tolist() == [7] * E


@pytest.mark.parametrize("dtype", list(KINDS), ids=str)
def test_the_way_back_adds_in_order_as_the_twin_does(backend: native.Library, dtype: torch.dtype) -> None:
    routing = route(choices(5), experts=E, align=8)
    rows = torch.randn(routing.rows, H, generator=generator(6)).to(dtype)
    rows[3, 3] = float("nan")
    weights = torch.rand(T, K, generator=generator(7))
    for given in (weights, None):
        out = torch.empty(T, H, dtype=dtype)
        torch.ops.treadle.combine_rows_(rows, routing.row_of, given, out)
        assert same_bits(out, combine_eager(rows, routing.row_of, given))
    masked = (routing.row_of < 0).all(-1)
    assert not moe_unpermute(rows, routing, weights)[masked].any()


@pytest.mark.parametrize("dtype", list(KINDS), ids=str)
@pytest.mark.parametrize("width", [1, 31, 37])
def test_any_bits_in_rows_of_odd_width_at_odd_addresses_travel_as_they_are(
    backend: native.Library, dtype: torch.dtype, width: int
) -> None:
    """NaNs, infinities and subnormal numbers."""
    hidden = misaligned(random_bits(T * width, dtype, 11), 1).view(T, width)
    routing = route(choices(12), experts=E, align=3)
    expected, starts = plainly(choices(12), hidden, 3)
    assert same_bits(moe_permute(hidden, routing)[: starts[-1]], expected)
    rows = misaligned(random_bits(routing.rows * width, dtype, 13), 3).view(routing.rows, width)
    out = misaligned(torch.zeros(T * width, dtype=dtype), 1).view(T, width)
    weights = torch.rand(T, K, generator=generator(14))
    torch.ops.treadle.combine_rows_(rows, routing.row_of, weights, out)
    assert same_bits(out, combine_eager(rows, routing.row_of, weights))


def test_an_expert_with_a_row_too_few_is_not_signalled(backend: native.Library) -> None:
    routing = route(choices(3), experts=E)
    counts = routing.counts.clone()
    counts[2] += 1
    late = Routing(routing.expert_of, routing.row_of, routing.offsets, counts, routing.rows)
    flags = torch.zeros(E, dtype=torch.int32)
    moe_permute(torch.randn(T, H), late, flags=flags)
    assert flags.tolist() == [1, 1, 0, 1, 1, 1]


def test_gradients_are_those_of_indexing(backend: native.Library) -> None:
    routing = route(choices(9), experts=E, align=4)
    hidden = torch.randn(T, H, generator=generator(1), requires_grad=True)
    weights = torch.rand(T, K, generator=generator(2)).requires_grad_()
    scale = torch.randn(routing.rows, 1, generator=generator(3))
    direction = torch.randn(T, H, generator=generator(4))

    def gradients(out: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad((out * direction).sum(), (hidden, weights))

    ours = gradients(moe_unpermute(moe_permute(hidden, routing) * scale, routing, weights))
    masked = routing.row_of < 0
    factor = torch.where(masked, 0, weights * scale[routing.row_of.clamp(min=0).long(), 0])
    theirs = gradients(hidden * factor.sum(-1, keepdim=True))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_the_twins_do_the_same(eager: None) -> None:
    routing = route(choices(3), experts=E, align=16)
    hidden = torch.randn(T, H, generator=generator(1))
    flags = torch.zeros(E, dtype=torch.int32)
    found = moe_permute(hidden, routing, flags=flags, epoch=2)
    expected, starts = plainly(choices(3), hidden, 16)
    assert same_bits(found[: starts[-1]], expected)
    assert flags.tolist() == [2] * E
    ones = torch.ones(T, K)
    counted = (routing.row_of >= 0).sum(-1, keepdim=True)
    torch.testing.assert_close(moe_unpermute(found, routing, ones), hidden * counted)


def test_threads_do_not_change_the_result(cpu_library: object, threads: int) -> None:
    routing = route(choices(11), experts=E)
    rows, weights = torch.randn(routing.rows, H), torch.rand(T, K)
    assert same_bits(moe_unpermute(rows, routing, weights), combine_eager(rows, routing.row_of, weights))


def test_shapes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"need \[T, K\]"):
        route(torch.zeros(3).long(), experts=2)
    routing = route(torch.zeros(3, 2).long(), experts=2, align=4)
    with pytest.raises(ValueError, match="need 3 rows"):
        moe_permute(torch.zeros(4, 5), routing)
    with pytest.raises(ValueError, match=r"flags must be int32 \[2\]"):
        moe_permute(torch.zeros(3, 5), routing, flags=torch.zeros(3).int())
    with pytest.raises(ValueError, match="need 12 rows"):
        moe_unpermute(torch.zeros(4, 5), routing, torch.zeros(3, 2))
    with pytest.raises(ValueError, match=r"weights must be float32 \(3, 2\)"):
        moe_unpermute(torch.zeros(12, 5), routing, torch.zeros(3, 1))
