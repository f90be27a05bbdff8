"""The closed forms of the editing methods, as plain tensors: no model, no tokenizer, no file.

    factor = cholesky(C)                              # once for each layer
    left, right = rome(k_star, k_prompt, residual, factor)
    left, right = memit(keys, residuals, factor, weight=15_000)
    W + left @ right

All methods want new outputs for some keys (memorisation) and little change for all others
(preservation). They differ in the weight of the two. With the keys kᵢ and the residuals
rᵢ = v_starᵢ − W kᵢ as the rows of K (n, m) and R (n, d), `least_change` solves

    ΔW = argmin Σᵢ ‖ΔW kᵢ − rᵢ‖² + ρ · tr(ΔW A ΔWᵀ) = Rᵀ (K A⁻¹ Kᵀ + ρ I)⁻¹ K A⁻¹

| method    | A (what is preserved)                          | ρ             |
|-----------|------------------------------------------------|---------------|
| ROME      | C                                              | 0, one fact   |
| EMMET     | C                                              | 0, or a ridge |
| MEMIT     | C + Σ stored k kᵀ / λ                          | λ             |
| AlphaEdit | l2 · I + Σ stored k kᵀ, on the null space of C | 1             |

This unified view is that of Gupta et al. 2024, https://arxiv.org/abs/2403.14236. All systems are
solved in float64 through Cholesky factors. No inverse is formed. In the shapes d is d_model, m is
d_ff, and facts are rows. "Stored" keys are those of earlier edits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.errors import InputError, NumericsError
from ..corpus.factors import cholesky, positive, solve_moment, whitened

MIN_INDEPENDENCE = 1e-10
"""Smallest eigenvalue of the keys' cosines under A⁻¹ that an exact solution may divide by. Below
it, rounding decides the result."""

MIN_OVERLAP = 1e-6
"""Smallest |⟨k, u⟩| / ‖k‖ that ROME may divide by. Below it, the update would be a million times
larger than the residual."""


def rome(
    k_star: Tensor, k_prompt: Tensor, residual: Tensor, factor: Tensor
) -> tuple[Tensor, Tensor]:
    """Return ROME's rank-one update, equation 2 of https://arxiv.org/abs/2202.05262.

        u = C⁻¹ k_star / ‖C⁻¹ k_star‖,      ΔW = (v_star − W k_prompt) uᵀ / ⟨k_prompt, u⟩

    The paper has one key for both. The authors' code, which made the paper's tables, divides by the
    key of the bare prompt, so that this prompt itself is answered exactly.

    Args:
        k_star: (m,) the key averaged over contexts.
        k_prompt: (m,) the key of the bare prompt.
        residual: (d,) v_star − W k_prompt.
        factor: (m, m) the Cholesky factor of C.

    Returns:
        Factors (d, 1) and (1, m), float64.

    Raises:
        NumericsError: An input is not finite, or the two keys do not overlap under C⁻¹.
    """
    k_star, k_prompt, residual = (x.to(factor) for x in (k_star, k_prompt, residual))
    inputs = {"k_star": k_star, "the prompt's key": k_prompt, "the residual": residual}
    for name, value in inputs.items():
        if not torch.isfinite(value).all():
            raise NumericsError(
                f"{name} holds NaN or infinity. The model does not compute finite states for this "
                "fact."
            )
    u = solve_moment(factor, k_star[None])[0]
    u = u / u.norm()
    overlap = k_prompt @ u
    if not overlap.abs() > MIN_OVERLAP * k_prompt.norm():  # so also for zeros, where u is NaN
        raise NumericsError(
            "the prompt's key and its average over contexts hardly overlap (⟨k, u⟩ is "
            f"{overlap:.3g} for a key of norm {k_prompt.norm():z.3g}), so the update would be very "
            "large. Use other contexts or another layer."
        )
    return (residual / overlap)[:, None], u[None]


def least_change(
    keys: Tensor, residuals: Tensor, factor: Tensor, ridge: float
) -> tuple[Tensor, Tensor]:
    """Return the update at the top of this file.

    The system is solved in the smaller of the two spaces, facts or neurons.

    Args:
        keys: (n, m).
        residuals: (n, d).
        factor: (m, m) the Cholesky factor of A.
        ridge: ρ, at least 0.

    Returns:
        Factors (d, n) and (n, m), float64. The left one is Rᵀ. The right one maps a key to its
        fact.

    Raises:
        InputError: Shapes do not fit, or ρ is negative.
        NumericsError: An input is not finite, or ρ is 0 and the keys are not independent (two facts
            with one key, or more facts than neurons). Then no update gives each key its own output.
    """
    n, m = keys.shape
    if residuals.shape[:1] != (n,) or factor.shape != (m, m):
        raise InputError(
            f"keys {tuple(keys.shape)}, residuals {tuple(residuals.shape)} and factor "
            f"{tuple(factor.shape)} do not fit; expected (n, d_ff), (n, d_model) and (d_ff, d_ff)"
        )
    if not 0 <= ridge < float("inf"):
        raise InputError(f"ridge is {ridge!r}: it must be a finite number of at least 0")
    keys, residuals = keys.to(factor), residuals.to(factor)
    for name, rows in (("key", keys), ("residual", residuals)):
        if not torch.isfinite(rows).all():
            bad = (~torch.isfinite(rows).all(1)).nonzero()[:, 0].tolist()
            raise NumericsError(
                f"the {name} of fact {bad[0]} holds NaN or infinity. The model does not compute "
                "finite states for this fact."
            )
    if ridge and n > m:
        system = ridge * (factor @ factor.T) + keys.T @ keys
        lower = positive(system, "the keys' system")
        primal: Tensor = torch.cholesky_solve(keys.T, lower)  # (m, n)
        return residuals.T, primal.T
    solved = solve_moment(factor, keys)  # A⁻¹ kᵢ, (n, m)
    gram = solved @ keys.T
    if not ridge:
        _check_independent(gram)
    gram = (gram + gram.T) / 2 + ridge * torch.eye(n, dtype=gram.dtype, device=gram.device)
    right: Tensor = torch.cholesky_solve(solved, positive(gram, "the keys' Gram matrix"))
    return residuals.T, right


def memit(keys: Tensor, residuals: Tensor, factor: Tensor, weight: float) -> tuple[Tensor, Tensor]:
    """Return MEMIT's update of one layer, equation 14 of https://arxiv.org/abs/2210.07229.

        ΔW = Rᵀ K (λC + KᵀK)⁻¹

    Args:
        keys: (n, m).
        residuals: (n, d).
        factor: (m, m) the Cholesky factor of C, or of C + Σ stored k kᵀ / λ (`with_stored`).
        weight: λ, the number of tokens of ordinary text that weigh as much as one fact.

    Returns:
        Factors as `least_change`, which also raises the other errors.

    Raises:
        InputError: λ is not above 0.
    """
    if weight <= 0:
        raise InputError(
            f"MEMIT's moment_weight is {weight!r}: it must be above 0. For an exact solution use "
            "EMMET with ridge=0.",
            argument="moment_weight",
        )
    return least_change(keys, residuals, factor, weight)


def emmet(
    keys: Tensor, residuals: Tensor, factor: Tensor, weight: float = 1.0, ridge: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Return EMMET's update of one layer, equation 15 of https://arxiv.org/abs/2403.14236.

        ΔW = Rᵀ (K (wC)⁻¹ Kᵀ + ridge · I)⁻¹ K (wC)⁻¹

    With ridge=0 each key gets its output exactly, and the weight w cancels. With a ridge this is
    MEMIT at λ = weight · ridge. The arguments are those of `memit`, and errors are as
    `least_change`.
    """
    return least_change(keys, residuals, factor, weight * ridge)


def alphaedit(
    keys: Tensor, residuals: Tensor, basis: Tensor, l2: float, stored: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return AlphaEdit's update of one layer, equation 14 of https://arxiv.org/abs/2410.02355.

        ΔW = Rᵀ K P (P (KᵀK + Σ stored k kᵀ) + l2 · I)⁻¹,      P = basis basisᵀ

    It is solved in the q coordinates of the null space, where the system is symmetric.

    Args:
        keys: (n, m).
        residuals: (n, d).
        basis: (m, q) an orthonormal basis of the null space (`null_space`).
        l2: The ridge, above 0.
        stored: (m, m) Σ k kᵀ over the keys of earlier edits. None: no such keys.

    Returns:
        Factors as `least_change`, which also raises the other errors.

    Raises:
        InputError: The basis is empty, or l2 is not above 0.
    """
    if basis.shape[1] == 0 or l2 <= 0:
        raise InputError(
            f"the null space has {basis.shape[1]} dimensions and l2 is {l2!r}: AlphaEdit needs at "
            "least one dimension and an l2 above 0. Raise the threshold, or lower the energy."
        )
    basis = basis.double()
    preserved = l2 * torch.eye(basis.shape[1], dtype=basis.dtype, device=basis.device)
    if stored is not None:
        preserved = preserved + basis.T @ stored.to(basis) @ basis
    left, right = least_change(keys.to(basis) @ basis, residuals, cholesky(preserved), 1.0)
    return left, right @ basis.T


def with_stored(matrix: Tensor, stored: Tensor, weight: float) -> Tensor:
    """Return C + Σ stored k kᵀ / λ, (m, m) float64: stored keys count as λ⁻¹ tokens of text each.

    MEMIT solved with it keeps what earlier edits wrote. Its system is then
    λC + Σ stored k kᵀ + KᵀK, as in the authors' sequential variant.
    """
    return matrix.double() + stored.to(matrix.device).double() / weight


def share(residuals: Tensor, layers_left: int, spread: str) -> Tensor:
    """Return the part of the residuals that a layer takes if `layers_left` layers are left.

    "even": 1/n (MEMIT, https://arxiv.org/abs/2210.07229, equation 20). "sqrt": 1/√n (PMET,
    https://arxiv.org/abs/2308.08742, equation 12).
    """
    return residuals / float(layers_left**0.5 if spread == "sqrt" else layers_left)


def anchored(v_star: Tensor, norm: float) -> Tensor:
    """Return v_star (n, d) with each row rescaled to one norm (norm-anchor scaling, NAS).

    Otherwise norms grow from round to round, because each round starts from those of the last.
    """
    norms: Tensor = v_star.norm(dim=-1, keepdim=True)
    return v_star * (norm / norms)


def closest(keys: Tensor, factor: Tensor, groups: Tensor) -> tuple[Tensor, Tensor]:
    """Return for each key the most similar key of another group.

    What a method writes for one key arrives at another in proportion to their cosine, unless both
    outputs are asked for exactly.

    Args:
        keys: (n, m).
        factor: (m, m) the Cholesky factor of A.
        groups: (n,) int64, the group of each key.

    Returns:
        Its index (n,) int64, and the cosine of the two under A⁻¹ (n,) float64. The cosine is −1 if
        there is no other group.
    """
    white = whitened(keys, factor)
    white = white / white.norm(dim=1, keepdim=True).clamp(min=torch.finfo(white.dtype).tiny)
    groups = groups.to(white.device)
    blocks = zip(torch.split(white, _BLOCK), torch.split(groups, _BLOCK), strict=True)
    best = [
        (rows @ white.T).masked_fill(block[:, None] == groups, -1.0).max(dim=1)
        for rows, block in blocks
    ]
    return torch.cat([b.indices for b in best]), torch.cat([b.values for b in best])


_BLOCK = 1024
"""Number of keys that are compared with all others at a time."""


def explained(keys: Tensor, others: Tensor, factor: Tensor) -> Tensor:
    """Return the share of each key that lies in the span of other keys, in the metric of C⁻¹.

    It is least squares in the whitened space. A key with share 1 is a combination of the others, so
    what is written for one of them arrives at it too.

    Args:
        keys: (n, m).
        others: (k, m).
        factor: (m, m) the Cholesky factor of C.

    Returns:
        (n,) float64, from 0 to 1.
    """
    ours, theirs = whitened(keys, factor).T, whitened(others, factor).T
    basis, sizes, _ = torch.linalg.svd(theirs, full_matrices=False)
    inside = basis[:, sizes > 1e-9 * theirs.norm()].T @ ours
    whole = ours.square().sum(0).clamp(min=torch.finfo(ours.dtype).tiny)
    shares: Tensor = inside.square().sum(0) / whole
    return shares.clamp(0, 1)


def disturbance(left: Tensor, right: Tensor, weight: Tensor, matrix: Tensor) -> float:
    """Return how much an update changes a layer's output on ordinary text.

    It is the relative root mean square √(tr(Δ C Δᵀ) / tr(W C Wᵀ)).

    Args:
        left: (d, r).
        right: (r, m).
        weight: (d, m) W before the update. The bias does not count.
        matrix: (m, m) C.
    """
    left, right, weight, matrix = (
        x.to(matrix.device, torch.float32) for x in (left, right, weight, matrix)
    )
    change = ((right @ matrix @ right.T) * (left.T @ left)).sum()
    whole = ((weight @ matrix) * weight).sum()
    return float((change.clamp(min=0) / whole.clamp(min=torch.finfo(whole.dtype).tiny)).sqrt())


def compact(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Return the same update with at most d columns.

    With d columns or fewer it is returned as it is. Otherwise it becomes factors (d, d) and (d, m).
    """
    d = left.shape[0]
    if left.shape[1] <= d:
        return left, right
    return torch.eye(d, dtype=left.dtype, device=left.device), left @ right


def _check_independent(gram: Tensor) -> None:
    """Check that no two keys are too close for each to have its own output.

    Args:
        gram: (n, n) K A⁻¹ Kᵀ.

    Raises:
        NumericsError: They are too close. The message names the two closest facts.
    """
    scale = gram.diagonal().clamp(min=0).sqrt()
    cosine = gram / (scale[:, None] * scale).clamp(min=torch.finfo(gram.dtype).tiny)
    if torch.linalg.eigvalsh(cosine)[0] > MIN_INDEPENDENCE:
        return
    eye = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    a, b = divmod(int((cosine.abs() - 2 * eye).argmax()), len(gram))
    raise NumericsError(
        f"{len(gram)} keys are not independent (facts {min(a, b)} and {max(a, b)} are the closest, "
        f"with a cosine of {float(cosine[a, b]):z.6f} under C⁻¹), so no update gives each key its "
        "own output. Either give a ridge above 0, or leave out one of these facts."
    )
