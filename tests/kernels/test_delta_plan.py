"""Plans: a delta in published coordinates meets weights that are fused, sliced, stacked and transposed."""

from __future__ import annotations

import pytest
import torch
from tests.kernels.test_delta import digest_of
from tests.kernels.weights import changed, generator, random_bits, same_bits
from torch import Tensor

from treadle.kernels import native
from treadle.kernels.delta import Delta, apply_delta_, check_delta, encode_delta
from treadle.kernels.digest import Partial, combine
from treadle.kernels.errors import DeltaCorrupt, DeltaMismatch
from treadle.kernels.layout import Layout
from treadle.kernels.plan import Plan

D, FF, EXPERTS, VOCABULARY = 96, 160, 5, 700
SHAPES = {
    "embed": (VOCABULARY, D),
    "q": (D, D),
    "k": (D // 2, D),
    "v": (D // 2, D),
    "gate": (FF, D),
    "up": (FF, D),
    "down": (D, FF),
    **{f"expert.{e}.{part}": (FF, D) for e in range(EXPERTS) for part in ("w1", "w3")},
    "experts.stacked": (EXPERTS, D, FF),
    "norm": (D,),
}


def model(seed: int, dtype: torch.dtype) -> dict[str, Tensor]:
    return {
        name: random_bits(int(torch.Size(shape).numel()), dtype, seed + i).view(shape)
        for i, (name, shape) in enumerate(SHAPES.items())
    }


class Engine:
    """A receiver with layouts of its own; rank `rank` of `ranks`. `load` is its slow path, and the oracle."""

    def __init__(self, rank: int, ranks: int, dtype: torch.dtype) -> None:
        self.rank, self.ranks = rank, ranks
        zeros = {"dtype": dtype}
        self.qkv = torch.zeros(2 * D // ranks, D, **zeros)
        self.gate_up = torch.zeros(2 * FF // ranks, D, **zeros)
        self.down = torch.zeros(D, FF // ranks, **zeros)
        self.w13 = torch.zeros(EXPERTS, D, 2 * FF, **zeros)
        self.stacked = torch.zeros(EXPERTS, FF, D // ranks, **zeros)
        self.embed = torch.zeros(D, VOCABULARY, **zeros)
        self.head = torch.zeros(VOCABULARY, D, **zeros)
        self.norm = torch.zeros(D, **zeros)

    def places(self) -> list[tuple[str, Tensor, object, bool]]:
        """Name, destination, view of the published tensor, whether it is a further copy."""
        r, n = self.rank, self.ranks
        first = r > 0  # what all ranks hold is counted by the first

        def rows(size: int) -> slice:
            return slice(r * size // n, (r + 1) * size // n)

        q, k = D // n, D // 2 // n
        found: list[tuple[str, Tensor, object, bool]] = [
            ("q", self.qkv[:q], lambda w: w[rows(D)], False),
            ("k", self.qkv[q : q + k], lambda w: w[rows(D // 2)], False),
            ("v", self.qkv[q + k :], lambda w: w[rows(D // 2)], False),
            ("gate", self.gate_up[: FF // n], lambda w: w[rows(FF)], False),
            ("up", self.gate_up[FF // n :], lambda w: w[rows(FF)], False),
            ("down", self.down, lambda w: w[:, rows(FF)], False),
            ("experts.stacked", self.stacked, lambda w: w[:, rows(D)].transpose(1, 2), False),
            ("embed", self.embed, lambda w: w.t(), first),
            ("embed", self.head, lambda w: w, True),
            ("norm", self.norm, lambda w: w, first),
        ]
        for e in range(EXPERTS):
            found.append((f"expert.{e}.w1", self.w13[e, :, :FF], lambda w: w.t(), first))
            found.append((f"expert.{e}.w3", self.w13[e, :, FF:], lambda w: w.t(), first))
        return found

    def load(self, weights: dict[str, Tensor]) -> None:
        for name, destination, view, _ in self.places():
            destination.copy_(view(weights[name]))

    def plan(self, layout: Layout) -> Plan:
        plan = Plan(layout)
        for name, destination, view, copy in self.places():
            plan.place(name, destination, of=SHAPES[name], view=view, copy=copy)
        return plan

    def tensors(self) -> list[Tensor]:
        return [t for t in vars(self).values() if isinstance(t, Tensor)]


def delta_between(old: dict[str, Tensor], new: dict[str, Tensor], *, steps: bool) -> Delta:
    layout = Layout.of(old.items())
    digests = {"base": digest_of(layout, list(old.values())), "digest": digest_of(layout, list(new.values()))}
    return encode_delta(layout, list(new.values()), before=list(old.values()), steps=steps, **digests)


def moved(old: dict[str, Tensor], density: float) -> dict[str, Tensor]:
    out = {}
    for i, (name, tensor) in enumerate(old.items()):
        where = torch.rand(tensor.numel(), generator=generator(50 + i)) < density
        out[name] = changed(tensor.flatten(), where, 60 + i, ulps=2).view(tensor.shape)
    return out


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn, torch.float32], ids=str)
@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("steps", [True, False], ids=["steps", "values"])
def test_applying_is_loading_the_new_weights(
    backend: native.Library, dtype: torch.dtype, ranks: int, steps: bool
) -> None:
    """And the ranks' digests add up to the model's."""
    old = model(1, dtype)
    new = moved(old, 0.05)
    delta = delta_between(old, new, steps=steps)
    shares = []
    for rank in range(ranks):
        engine, oracle = Engine(rank, ranks, dtype), Engine(rank, ranks, dtype)
        engine.load(old)
        oracle.load(new)
        plan = engine.plan(delta.layout)
        shares.append(check_delta(delta, plan))
        apply_delta_(delta, plan, expected=shares[-1])
        assert all(same_bits(a, b) for a, b in zip(engine.tensors(), oracle.tensors(), strict=True))
    assert combine([delta.base, *shares]) == delta.digest


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_twin_applies_the_same(eager: None, ranks: int) -> None:
    old = model(1, torch.bfloat16)
    new = moved(old, 0.05)
    delta = delta_between(old, new, steps=True)
    engine, oracle = Engine(0, ranks, torch.bfloat16), Engine(0, ranks, torch.bfloat16)
    engine.load(old)
    oracle.load(new)
    plan = engine.plan(delta.layout)
    apply_delta_(delta, plan, expected=check_delta(delta, plan))
    assert all(same_bits(a, b) for a, b in zip(engine.tensors(), oracle.tensors(), strict=True))


def test_weights_other_than_the_senders_are_left_alone(backend: native.Library) -> None:
    """One bit in one of the elements that the delta changes; elements it does not touch are the base digest's."""
    old = model(1, torch.bfloat16)
    new = moved(old, 0.05)
    engine = Engine(0, 1, torch.bfloat16)
    engine.load(old)
    at = int((old["norm"].view(torch.int16) != new["norm"].view(torch.int16)).nonzero()[0])
    engine.norm.view(torch.int16)[at] ^= 1
    before = [t.clone() for t in engine.tensors()]
    for steps in (True, False):
        delta = delta_between(old, new, steps=steps)
        with pytest.raises(DeltaMismatch, match="publish all weights"):
            apply_delta_(delta, engine.plan(delta.layout))
        assert all(same_bits(a, b) for a, b in zip(engine.tensors(), before, strict=True))


def test_a_delta_of_steps_is_not_applied_twice(backend: native.Library) -> None:
    old = model(2, torch.bfloat16)
    new = moved(old, 0.02)
    delta = delta_between(old, new, steps=True)
    engine = Engine(0, 1, torch.bfloat16)
    engine.load(old)
    plan = engine.plan(delta.layout)
    apply_delta_(delta, plan)
    after = [t.clone() for t in engine.tensors()]
    with pytest.raises(DeltaMismatch):
        apply_delta_(delta, plan)
    assert all(same_bits(a, b) for a, b in zip(engine.tensors(), after, strict=True))


def test_a_piece_in_more_rectangles_than_one_pass_holds(backend: native.Library) -> None:
    """Every row lives in a tensor of its own; the CPU decoder takes 64 of a block's rectangles at a time."""
    old = random_bits(150 * 100, torch.bfloat16, 3).view(150, 100)
    new = changed(old.flatten(), torch.arange(15_000) % 7 == 3, 4).view(150, 100)
    delta = delta_between({"w": old}, {"w": new}, steps=True)
    rows = [row.clone() for row in old]
    plan = Plan(delta.layout)
    for i, row in enumerate(rows):
        plan.place("w", row, of=(150, 100), view=lambda w, i=i: w[i])
    apply_delta_(delta, plan)
    assert same_bits(torch.stack(rows), new)
    assert plan.placed_elements == 15_000


def test_places_that_do_not_fit_are_refused() -> None:
    layout = Layout.of([("w", torch.zeros(6, 4))])
    plan = Plan(layout)
    with pytest.raises(ValueError, match="x is not in the layout"):
        plan.place("x", torch.zeros(6, 4), of=(6, 4))
    with pytest.raises(ValueError, match="24 elements in the layout"):
        plan.place("w", torch.zeros(6, 5), of=(6, 5))
    with pytest.raises(ValueError, match="its destination"):
        plan.place("w", torch.zeros(6, 4), of=(6, 4), view=lambda w: w[:3])
    with pytest.raises(ValueError, match=r"its destination torch\.float64"):
        plan.place("w", torch.zeros(6, 4).double(), of=(6, 4))
    with pytest.raises(ValueError, match="repeats elements"):
        plan.place("w", torch.zeros(2, 6, 4), of=(6, 4), view=lambda w: w.expand(2, 6, 4))


def test_a_delta_of_another_layout_is_refused() -> None:
    layout, other = Layout.of([("w", torch.zeros(64))]), Layout.of([("v", torch.zeros(64))])
    delta = encode_delta(
        layout, [torch.ones(64)], before=[torch.zeros(64)], base=Partial(0, 0), digest=Partial(0, 0)
    )
    with pytest.raises(DeltaCorrupt, match="another layout"):
        apply_delta_(delta, Plan(other))
    with pytest.raises(DeltaCorrupt, match="another layout"):
        Delta.from_bytes(other, delta.to_bytes())
