"""One-sided least squares: examples that must read 1 or more, and others 0 or less.

    beta = hinge(gram, wanted, usable, slack)      # many small systems at once

The squared hinge is minimised by Newton's method. Each step is one ridge solve in the space of the
examples, over those that still violate what is wanted (Chapelle 2007,
https://doi.org/10.1162/neco.2007.19.5.1155). It ends when they stay the same.
"""

from __future__ import annotations

import torch
from torch import Tensor

_STEPS = 15
"""Newton steps at most. It ends by itself, usually after 4 to 8."""


def hinge(gram: Tensor, wanted: Tensor, usable: Tensor, slack: Tensor) -> Tensor:
    """Return the coefficients β of u = Σ βⱼ zⱼ that minimise the squared hinge, for b systems.

        ‖u‖² + Σ (1 − fⱼ)²₊ / slackⱼ where 1 is wanted + Σ (fⱼ)²₊ / slackⱼ where 0 is,   f = gram β

    Args:
        gram: (b, k, k) the inner products of the examples.
        wanted: (b, k) 1: read 1 or more. 0: read 0 or less.
        usable: (b, k) whether an example counts at all.
        slack: (b, k) above 0: how much a violation of each example is forgiven.

    Returns:
        (b, k) float64, zero for examples that have what they want.
    """
    gram, wanted = gram.double(), wanted.double()
    beta = torch.zeros_like(wanted)
    active = usable.clone()
    todo = torch.arange(len(gram), device=gram.device)
    sign = 1 - 2 * wanted  # an own input violates below 1, a stranger above 0
    for _ in range(_STEPS):
        chosen = active[todo].double()
        system = gram[todo] * chosen[:, :, None] * chosen[:, None, :]
        # A row that is not chosen is that of the identity, so its coefficient is 0.
        system.diagonal(dim1=1, dim2=2).add_(torch.where(active[todo], slack[todo], 1.0))
        right = (wanted[todo] * chosen)[:, :, None]
        solved = torch.cholesky_solve(right, torch.linalg.cholesky(system))[:, :, 0] * chosen
        beta[todo] = solved
        reads = (gram[todo] @ solved[:, :, None])[:, :, 0]
        violating = usable[todo] & (sign[todo] * (reads - wanted[todo]) > 0)
        changed = (violating != active[todo]).any(1)
        active[todo] = violating
        todo = todo[changed]
        if not len(todo):
            break
    return beta
