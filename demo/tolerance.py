"""How far the losses of two layouts may lie apart: derived from the order of reductions, not tuned.

After loading, all layouts start from the same bits (which the demo checks) and compute the same sums in float32,
but in another order: tensor parallelism cuts a sum over features into two partial sums, FSDP2 cuts the sum over
the batch, and matrix kernels block other shapes otherwise. How much can that change the loss?

1. A sum of n terms makes n - 1 roundings, each off by at most u = 2**-24 of the partial sum. Roundings of
   unrelated numbers are as good as independent and of mean zero, so their effect grows like the length of a random
   walk: about sqrt(n) u, relative to the sum (Higham and Mary, "A New Approach to Probabilistic Rounding Error
   Analysis", 2019; the worst case, never seen in practice, is n u).
2. The longest chain of sums through one step, forward to the loss and back to a gradient, has N terms in all
   (`longest_chain`). By the same argument it is off by about sqrt(N) u.
3. Two orders are each off by that much: their results differ by at most e = 2 sqrt(N) u, relatively.
4. The first step after loading starts from equal parameters: its loss may differ by e times the loss. AdamW itself
   is elementwise, so an update inherits the relative deviation e of its gradient; what this changes in the next loss
   is e times what a whole update changes, to first order, which is taken to be no more than the loss itself.
   So each step adds one more e times the loss: growth is linear.

       |difference at step k after loading| <= k * 2 * sqrt(N) * 2**-24 * loss

Not covered: cancellation and chaotic growth. Over the few steps of the demo, one update changes the loss by a few
percent, not by all of it, which leaves room for them. That the bound is not too wide to mean anything is shown by a
control: a run that forgets Adam's moments must break it.
"""

from __future__ import annotations

import math

from model import GptShape

UNIT_ROUNDOFF = 2.0**-24


def longest_chain(shape: GptShape, tokens: int) -> int:
    """Terms of all sums, one after another, on the longest way through one training step.

    Args:
        shape: of the model.
        tokens: bytes of text in the global batch.
    """
    norm = 2 * shape.width  # mean and variance
    head_width = shape.width // shape.heads
    # Scores sum over a head's features; softmax and the mix of values over the context.
    attention = shape.width + head_width + 2 * shape.context + shape.width
    mlp = shape.width + shape.hidden
    forward = shape.layers * (2 * norm + attention + mlp) + norm + shape.width
    loss = shape.vocabulary + tokens  # log-sum-exp, mean
    # Backward, sums run over the other side of each matrix; gradients of query, key and value flow together.
    backward = shape.vocabulary + shape.layers * (2 * norm + attention + 2 * shape.width + mlp) + norm
    weights = tokens  # a weight's gradient sums over the batch
    return forward + loss + backward + weights


def tolerance(shape: GptShape, tokens: int, steps: int, loss: float) -> float:
    """By how much a loss may differ `steps` steps after loading."""
    return steps * 2 * math.sqrt(longest_chain(shape, tokens)) * UNIT_ROUNDOFF * loss
