"""What an unsharded model holds, and by plain loops what each rank has of it: written without the code that is tested."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from hypothesis import strategies as st


def numbered(*shape: int, start: int = 1, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Each element is its own number."""
    return torch.arange(start, start + math.prod(shape)).to(dtype).reshape(shape)


def fused_of(parts: list[torch.Tensor], rank: int, ranks: int, axis: int = 0) -> torch.Tensor:
    """Of each of several weights, this rank's share, one below the other."""
    return torch.cat([torch.chunk(part, ranks, dim=axis)[rank] for part in parts], dim=axis)


@dataclass(frozen=True)
class Attention:
    """Sizes of a fused projection."""

    groups: int
    queries_per_group: int
    size: int
    value_size: int
    hidden: int | None

    @property
    def query(self) -> int:
        return self.groups * self.queries_per_group

    def heads(self, start: int = 1) -> dict[str, list[torch.Tensor]]:
        """Every head of the unsharded model, [elements, hidden], or [elements] for a bias."""
        inner = () if self.hidden is None else (self.hidden,)
        counts = {"q": (self.query, self.size), "k": (self.groups, self.size), "v": (self.groups, self.value_size)}
        return {
            name: [numbered(size, *inner, start=start + 1000 * (100 * n + head)) for head in range(count)]
            for n, (name, (count, size)) in enumerate(counts.items())
        }

    def local(self, heads: dict[str, list[torch.Tensor]], rank: int, ranks: int, order: str) -> torch.Tensor:
        """What a rank holds: its query heads, and the key and value heads that these attend to."""
        share = self.query // ranks
        mine = list(range(rank * share, (rank + 1) * share))
        groups = sorted({head // self.queries_per_group for head in mine})
        if order == "blocks":
            rows = [heads["q"][head] for head in mine]
            rows += [heads[name][group] for name in ("k", "v") for group in groups]
        else:
            rows = []
            for group in groups:
                rows += [heads["q"][head] for head in mine if head // self.queries_per_group == group]
                rows += [heads["k"][group], heads["v"][group]]
        return torch.cat(rows)

    def rank_counts(self) -> list[int]:
        """Numbers of ranks that can divide it."""
        return [n for n in range(1, self.query + 1) if self.query % n == 0 and (self.groups % n == 0 or n % self.groups == 0)]


def attentions() -> st.SearchStrategy[Attention]:
    return st.builds(
        Attention,
        groups=st.integers(1, 4),
        queries_per_group=st.integers(1, 4),
        size=st.integers(1, 3),
        value_size=st.integers(1, 3),
        hidden=st.sampled_from([None, 1, 3]),
    )


@st.composite
def flat_cuts(draw: st.DrawFn, total: int) -> list[slice]:
    """The flattened tensor divided into ranges, some of them empty."""
    inner = sorted(draw(st.lists(st.integers(0, total), max_size=3)))
    return [slice(a, b) for a, b in zip([0, *inner], [*inner, total], strict=True)]
