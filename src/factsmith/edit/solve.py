"""The closed forms, as plain tensors: no model, no tokenizer, no file.

    factor = cholesky(C)                              # once for a layer
    left, right = rome(k_star, k_prompt, residual, factor)
    left, right = memit(keys, residuals, factor, weight=15_000)
    W + left @ right

Every editor asks for the same thing and differs in what it gives up for it: new outputs for some keys (memorisation), little change on
all others (preservation). With keys kᵢ and residuals rᵢ = v_starᵢ − W kᵢ as the rows of K (n, m) and R (n, d),

    ΔW = argmin Σᵢ ‖ΔW kᵢ − rᵢ‖² + ρ · tr(ΔW A ΔWᵀ) = Rᵀ (K A⁻¹ Kᵀ + ρ I)⁻¹ K A⁻¹            `least_change`

| editor    | A (what stays)                              | ρ           |
|-----------|---------------------------------------------|-------------|
| ROME      | C                                           | 0, one fact |
| EMMET     | C                                           | 0, or a ridge |
| MEMIT     | C + Σ stored k kᵀ / λ                      | λ           |
| AlphaEdit | l2 · I + Σ stored k kᵀ, on the null space of C | 1       |

The unified view is Gupta et al. 2024, https://arxiv.org/abs/2403.14236. Everything is computed in float64 through Cholesky factors; no
inverse is formed. Shapes: d = d_model, m = d_ff; facts are rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.errors import InputError, NumericsError
from ..corpus.factors import cholesky, positive, solve_moment, whitened

MIN_INDEPENDENCE = 1e-10
"""Smallest eigenvalue of the keys' cosines under A⁻¹ that an exact solution divides by; below it rounding decides the result."""

MIN_OVERLAP = 1e-6
"""Smallest |⟨k, u⟩| / ‖k‖ that ROME divides by; below it the update would be a million times larger than the residual."""


def rome(
    k_star: Tensor, k_prompt: Tensor, residual: Tensor, factor: Tensor
) -> tuple[Tensor, Tensor]:
    """ROME's rank-one update as factors (d, 1) and (1, m), float64. https://arxiv.org/abs/2202.05262, equation 2.

        u = C⁻¹ k_star / ‖C⁻¹ k_star‖,      ΔW = (v_star − W k_prompt) uᵀ / ⟨k_prompt, u⟩

    k_star (m,) is the key averaged over contexts, k_prompt (m,) the key of the bare prompt, residual (d,) = v_star − W k_prompt.
    The paper writes one key for both; the authors' code, which made the tables, divides by the bare prompt's, so that the prompt
    itself is answered exactly. Raises NumericsError when an input is not finite or the two keys do not overlap under C⁻¹.
    """
    k_star, k_prompt, residual = (x.to(factor) for x in (k_star, k_prompt, residual))
    for name, value in (
        ("k_star", k_star),
        ("the prompt's key", k_prompt),
        ("the residual", residual),
    ):
        if not torch.isfinite(value).all():
            raise NumericsError(
                f"{name} holds NaN or infinity; the model does not compute finite states for this fact"
            )
    u = solve_moment(factor, k_star[None])[0]
    u = u / u.norm()
    overlap = k_prompt @ u
    if (
        not overlap.abs() > MIN_OVERLAP * k_prompt.norm()
    ):  # also true for a key of zeros, where u is NaN
        raise NumericsError(
            f"⟨k, u⟩ is {overlap:.3g} for a key of norm {k_prompt.norm():.3g}: the prompt's key and its average over contexts hardly "
            "overlap, and the update would blow up; use other contexts or another layer"
        )
    return (residual / overlap)[:, None], u[None]


def least_change(
    keys: Tensor, residuals: Tensor, factor: Tensor, ridge: float
) -> tuple[Tensor, Tensor]:
    """The update of the table above as factors (d, n) and (n, m), float64: left is Rᵀ, and right maps a key to its fact.

    keys (n, m), residuals (n, d), factor = cholesky(A) (m, m), ridge = ρ of at least 0. Solved in the smaller of the two spaces, facts or
    neurons. Raises InputError when shapes do not fit or ρ is negative; NumericsError when an input is not finite, or when ρ is 0 and the
    keys are not independent (two facts with one key, or more facts than neurons): then no update gives every key its own output.
    """
    n, m = keys.shape
    if residuals.shape[:1] != (n,) or factor.shape != (m, m):
        raise InputError(
            f"keys {tuple(keys.shape)}, residuals {tuple(residuals.shape)} and a factor {tuple(factor.shape)} do not fit; "
            "expected (n, d_ff), (n, d_model), (d_ff, d_ff)"
        )
    if not 0 <= ridge < float("inf"):
        raise InputError(f"a ridge is a finite number of at least 0; got {ridge!r}")
    keys, residuals = keys.to(factor), residuals.to(factor)
    for name, rows in (("key", keys), ("residual", residuals)):
        if not torch.isfinite(rows).all():
            bad = (~torch.isfinite(rows).all(1)).nonzero()[:, 0].tolist()
            raise NumericsError(
                f"the {name} of fact {bad[0]} holds NaN or infinity; the model does not compute finite states for it"
            )
    if ridge and n > m:
        system = ridge * (factor @ factor.T) + keys.T @ keys
        primal: Tensor = torch.cholesky_solve(
            keys.T, positive(system, "the keys' system")
        )  # (m, n)
        return residuals.T, primal.T
    solved = solve_moment(factor, keys)  # A⁻¹ kᵢ, (n, m)
    gram = solved @ keys.T
    if not ridge:
        _check_independent(gram)
    gram = (gram + gram.T) / 2 + ridge * torch.eye(n, dtype=gram.dtype, device=gram.device)
    right: Tensor = torch.cholesky_solve(solved, positive(gram, "the keys' Gram matrix"))
    return residuals.T, right


def memit(keys: Tensor, residuals: Tensor, factor: Tensor, weight: float) -> tuple[Tensor, Tensor]:
    """MEMIT's update of one layer, ΔW = Rᵀ K (λC + KᵀK)⁻¹. https://arxiv.org/abs/2210.07229, equation 14.

    factor = `cholesky(C)`, or that of C + Σ stored k kᵀ / λ (`with_stored`); weight is λ, how many observations of ordinary text stand
    against each fact. Shapes, factors and errors as `least_change`.
    """
    if weight <= 0:
        raise InputError(
            f"MEMIT's moment_weight is above 0; got {weight!r}: for an exact solution use EMMET with ridge 0"
        )
    return least_change(keys, residuals, factor, weight)


def emmet(
    keys: Tensor, residuals: Tensor, factor: Tensor, weight: float = 1.0, ridge: float = 0.0
) -> tuple[Tensor, Tensor]:
    """EMMET's update of one layer, ΔW = Rᵀ (K (wC)⁻¹ Kᵀ + ridge · I)⁻¹ K (wC)⁻¹. https://arxiv.org/abs/2403.14236, equation 15.

    With ridge 0 every key gets its output exactly, and the weight cancels; with a ridge this is MEMIT at λ = weight · ridge.
    Shapes, factors and errors as `least_change`.
    """
    return least_change(keys, residuals, factor, weight * ridge)


def alphaedit(
    keys: Tensor, residuals: Tensor, basis: Tensor, l2: float, stored: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """AlphaEdit's update of one layer, ΔW = Rᵀ K P (P (KᵀK + Σ stored k kᵀ) + l2 · I)⁻¹. https://arxiv.org/abs/2410.02355, equation 14.

    basis (m, q) spans the null space, P = basis basisᵀ (`null_space`); stored (m, m) is the sum over keys already written. Solved in the q
    coordinates of the null space, where the system is symmetric. Raises InputError for an empty basis or l2 not above 0; else as
    `least_change`.
    """
    if basis.shape[1] == 0 or l2 <= 0:
        raise InputError(
            f"AlphaEdit needs a null space and l2 above 0; got {basis.shape[1]} dimensions and l2 = {l2!r}: raise the threshold"
        )
    basis = basis.double()
    preserved = l2 * torch.eye(basis.shape[1], dtype=basis.dtype, device=basis.device)
    if stored is not None:
        preserved = preserved + basis.T @ stored.to(basis) @ basis
    left, right = least_change(keys.to(basis) @ basis, residuals, cholesky(preserved), 1.0)
    return left, right @ basis.T


def with_stored(matrix: Tensor, stored: Tensor, weight: float) -> Tensor:
    """C + Σ stored k kᵀ / λ: the second moment with keys already written counted as λ⁻¹ observations each, (m, m) float64.

    MEMIT solved with it keeps what earlier rounds wrote, as the authors' sequential variant does: λC + Σ stored k kᵀ + KᵀK.
    """
    return matrix.double() + stored.to(matrix.device).double() / weight


def share(residuals: Tensor, layers_left: int, spread: str) -> Tensor:
    """What one of `layers_left` remaining layers takes of the residuals: an equal part (MEMIT), or 1/√ of them (PMET: "sqrt").

    https://arxiv.org/abs/2210.07229, equation 20; https://arxiv.org/abs/2308.08742, equation 12.
    """
    return residuals / float(layers_left**0.5 if spread == "sqrt" else layers_left)


def anchored(v_star: Tensor, norm: float) -> Tensor:
    """v_star (n, d) rescaled to one norm: what keeps norms from feeding on themselves over many rounds (norm-anchor scaling, NAS)."""
    norms: Tensor = v_star.norm(dim=-1, keepdim=True)
    return v_star * (norm / norms)


def closest(keys: Tensor, factor: Tensor, groups: Tensor) -> tuple[Tensor, Tensor]:
    """For every key the one of another group that is most like it: its index (n,) int64 and their cosine under A⁻¹ (n,) float64.

    keys (n, m), factor = cholesky(A), groups (n,) int64. The cosine is −1 where there is no other group. What an editor writes for one key
    arrives at another in this proportion, unless the two outputs are asked for exactly.
    """
    white = whitened(keys, factor)
    white = white / white.norm(dim=1, keepdim=True).clamp(min=torch.finfo(white.dtype).tiny)
    groups = groups.to(white.device)
    best = [
        (rows @ white.T).masked_fill(own[:, None] == groups, -1.0).max(dim=1)
        for rows, own in zip(torch.split(white, _ROWS), torch.split(groups, _ROWS), strict=True)
    ]
    return torch.cat([b.indices for b in best]), torch.cat([b.values for b in best])


_ROWS = 1024
"""Keys compared with all others at a time."""


def explained(keys: Tensor, others: Tensor, factor: Tensor) -> Tensor:
    """Which share of each key lies in the span of others, in the metric of C⁻¹: (n,) in [0, 1], float64.

    keys, others  (n, d_ff) and (m, d_ff); factor: the Cholesky factor of C, (d_ff, d_ff)

    1 where keys are others' combinations: whatever is written for one of them arrives there too. Least squares in the whitened space.
    """
    ours, theirs = whitened(keys, factor).T, whitened(others, factor).T
    basis, sizes, _ = torch.linalg.svd(theirs, full_matrices=False)
    inside = basis[:, sizes > 1e-9 * theirs.norm()].T @ ours
    share: Tensor = inside.square().sum(0) / ours.square().sum(0).clamp(
        min=torch.finfo(ours.dtype).tiny
    )
    return share.clamp(0, 1)


def disturbance(left: Tensor, right: Tensor, weight: Tensor, matrix: Tensor) -> float:
    """How much an update changes what a layer puts out on ordinary text, √(tr(Δ C Δᵀ) / tr(W C Wᵀ)): root mean square, relative.

    left (d, r), right (r, m), weight (d, m) before the update, bias apart; matrix is C (m, m).
    """
    left, right, weight, matrix = (
        x.to(matrix.device, torch.float32) for x in (left, right, weight, matrix)
    )
    change = ((right @ matrix @ right.T) * (left.T @ left)).sum()
    whole = ((weight @ matrix) * weight).sum()
    return float((change.clamp(min=0) / whole.clamp(min=torch.finfo(whole.dtype).tiny)).sqrt())


def compact(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """The same update with as few columns as its shape allows: unchanged when it has fewer facts than d, else (d, d) and (d, m)."""
    d = left.shape[0]
    if left.shape[1] <= d:
        return left, right
    return torch.eye(d, dtype=left.dtype, device=left.device), left @ right


def _check_independent(gram: Tensor) -> None:
    """Raises NumericsError, naming two facts, when keys are too close for each to have an output of its own."""
    scale = gram.diagonal().clamp(min=0).sqrt()
    cosine = gram / (scale[:, None] * scale).clamp(min=torch.finfo(gram.dtype).tiny)
    if torch.linalg.eigvalsh(cosine)[0] > MIN_INDEPENDENCE:
        return
    closest = int(
        (cosine.abs() - 2 * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)).argmax()
    )
    a, b = divmod(closest, len(gram))
    raise NumericsError(
        f"{len(gram)} keys are not independent (facts {min(a, b)} and {max(a, b)} are the closest, with a cosine of "
        f"{float(cosine[a, b]):.6f} under C⁻¹), so no update gives each its own output; give a ridge above 0, or leave one of them out"
    )
