"""Plans of the estimators that are quadratic in the pair's gradient: self-influences and gradient norms.

No fixed direction gives them. `projected`: random directions stand for the pair's gradient, leading eigenpairs for the
Hessian. `exact`: a gradient per pair, for small models or few parameters.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.errors import InputError
from pipeline.influence.lanczos import leading_eigenpairs
from pipeline.influence.local import LocalView
from pipeline.influence.plan import Drawn, Probe, ProbePlan
from pipeline.influence.trees import flattened, tree_map, unflattened, without_zeros
from pipeline.types import Tree

#: Parameters up to which `H_B` is formed as a matrix (float32: 1 GB).
_DENSE_LIMIT = 16_384

#: Name of the vector `S^1/2` that random signs are given to.
_ROOT = "root"


def gradient_norm(here: LocalView, share: float) -> ProbePlan:
    """GraNd: `|G_z|`."""
    if here.settings.self_form == "exact":
        return ProbePlan([Probe(1.0, of="gradient-square")], {"scale": _ones(here)}, root_weight=share)
    probes, drawn = _random_squares(here, 1.0)
    return ProbePlan(probes, {_ROOT: _ones(here)}, drawn, root_weight=share)


def tracin_self(here: LocalView, weight: float) -> ProbePlan:
    """`weight * <G_z, P G_z>`."""
    scale = here.preconditioned(_ones(here))
    if here.settings.self_form == "exact":
        return ProbePlan([Probe(weight, of="gradient-square")], {"scale": scale})
    probes, drawn = _random_squares(here, weight)
    return ProbePlan(probes, {_ROOT: tree_map(torch.sqrt, scale)}, drawn)


def diff_in_self(here: LocalView, factor: float) -> ProbePlan:
    """Eq. 12: `factor * <G_z, P H_B P G_z + P H_z P G_B>`.

    Projected: `sum_i lambda_i <P^1/2 u_i, G_z>^2` with eigenpairs of `P^1/2 H_B P^1/2`, plus half the derivative of
    `<G_z, P G_z>` along `P G_B`, as a central difference of squared random projections.
    """
    scale = here.preconditioned(_ones(here))
    push = here.preconditioned(here.gradient_loss.gradient(here.state))
    params = here.params
    if here.settings.self_form == "exact":
        vectors = {"scale": scale, "push": push, "hessian": {"matrix": _dense_hessian(here)}}
        return ProbePlan([Probe(factor, of="self-bracket")], vectors)
    operator, root = here.scaled_hessian()
    generator = torch.Generator().manual_seed(here.settings.seed)
    start = torch.randn(root.shape, generator=generator, dtype=torch.float64).to(root)
    values, rows = leading_eigenpairs(operator, start, here.settings.eigenpairs)
    root = root.cpu()  # where the eigenvectors are
    vectors = {"push": without_zeros(push), _ROOT: unflattened(root, params)}
    probes: list[Probe] = []
    drawn: dict[str, Drawn] = {}
    for index, value in enumerate(values.tolist()):
        vectors[f"u{index}"] = unflattened(root * rows[index], params)
        probes.append(Probe(factor * value, along=(f"u{index}",), power=2))
    step = here.step_for(push, order=1)
    for sign in (1, -1):
        # The same directions at both points: the difference then holds no noise of the draw.
        more, drawn = _random_squares(here, sign * factor / (4 * step), at=(("push", sign * step),))
        probes += more
    return ProbePlan(probes, vectors, drawn, facts={"step": step, "lambda_max": float(values.max())})


def _random_squares(
    here: LocalView, weight: float, at: tuple[tuple[str, float], ...] = ()
) -> tuple[list[Probe], dict[str, Drawn]]:
    """`weight * <G_z, S G_z>` as the mean of squared derivatives along `S^1/2 r`, the entries of `r` random signs.

    The mean of `r r^T` is the identity, and among such `r` signs have the smallest variance (Hutchinson's estimate).
    """
    settings = here.settings
    drawn = {f"r{index}": Drawn(_ROOT, settings.seed, index) for index in range(settings.projections)}
    return [Probe(weight / len(drawn), along=(name,), at=at, power=2) for name in drawn], drawn


def _dense_hessian(here: LocalView) -> Tensor:
    """`H_B` as a matrix `[p, p]` over the parameters in the order of their names, one product per column."""
    params = dict(sorted(here.params.items()))
    count = sum(value.numel() for value in params.values())
    if count > _DENSE_LIMIT:
        raise InputError(
            f"score.self_form: exact forms the Hessian of {count} parameters, more than {_DENSE_LIMIT}; use "
            "projected or fewer score.parameters"
        )
    first = next(iter(params.values()))
    columns = []
    for index in range(count):
        unit = torch.zeros(count, dtype=first.dtype, device=first.device)
        unit[index] = 1
        columns.append(flattened(here.gradient_loss.hessian_product(here.state, unflattened(unit, params)), params))
    return torch.stack(columns, 1)


def _ones(here: LocalView) -> Tree:
    return tree_map(torch.ones_like, here.params)
