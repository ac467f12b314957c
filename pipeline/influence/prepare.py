"""From a checkpoint to what every pair is evaluated along there: each estimator's formula, once per checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from torch import nn

from pipeline.errors import InputError
from pipeline.influence.local import LocalView
from pipeline.influence.parameters import chosen_names
from pipeline.influence.plan import Probe, ProbePlan
from pipeline.influence.self_influence import diff_in_self, gradient_norm, tracin_self
from pipeline.influence.settings import Batches, Settings
from pipeline.influence.trees import dot, norm, plus, restricted, to_device, without_zeros
from pipeline.influence.unrolled import Replay, unrolled_exactly, unrolled_from_checkpoints
from pipeline.literals import WHOLE_RUN
from pipeline.types import Checkpoint, Tree

#: Checkpoints around one from which `z0` guesses a gradient there: half of them before it, half after.
_NEIGHBOURS = 4


def prepare(
    model: nn.Module,
    checkpoint: Checkpoint,
    batches: Batches,
    settings: Settings,
    *,
    dataset_size: int,
    num_checkpoints: int,
    num_runs: int = 1,
) -> ProbePlan:
    """Compute what pairs are evaluated along at one checkpoint.

    Args:
        model: `model(images, tokens)` gives `Features`; run at the checkpoint's tensors, on its own device.
        checkpoint: one of the `num_checkpoints` of its run.
        batches: R, B and V.
        settings: the estimator and how it is computed.
        dataset_size: `N` of Eq. 9, the pairs that the run was trained on.
        num_checkpoints: `m` of Eq. 9, checkpoints per run.
        num_runs: runs whose terms are averaged.

    The plan's vectors are on the CPU. Raises `InputError` for what the model or checkpoint cannot give, and for
    estimators that need the whole run.
    """
    if settings.estimator in WHOLE_RUN:
        raise InputError(f"{settings.estimator} needs all checkpoints of a run at once (prepare_run)")
    share = 1 / (num_checkpoints * num_runs)
    if settings.estimator in _PLAIN:
        return _PLAIN[settings.estimator](share)
    plan = _at(LocalView(model, checkpoint, batches, settings), share, dataset_size, num_runs)
    return replace(plan, vectors={name: to_device(tree, "cpu") for name, tree in plan.vectors.items()})


def _at(here: LocalView, share: float, dataset_size: int, num_runs: int) -> ProbePlan:
    """The plan at a checkpoint, its vectors on any device."""
    estimator, step, rate = here.settings.estimator, here.checkpoint.step, here.checkpoint.lr
    if estimator in ("diff-in", "diff-in-self"):
        # a_t of Eq. 9 and 12
        factor = -step * rate**2 / dataset_size * share
        return diff_in(here, factor) if estimator == "diff-in" else diff_in_self(here, factor)
    if estimator == "tracin-self":
        return tracin_self(here, rate / num_runs)
    if estimator == "grand":
        return gradient_norm(here, share)
    if estimator not in ("tracin", "moso"):
        raise InputError(f"{estimator}: expected an estimator that `prepare` has directions for")
    loss = here.gradient_loss if estimator == "moso" else here.target_loss
    return along_gradient(here, here.preconditioned(loss.gradient(here.state)), rate / num_runs)


def prepare_run(
    model: nn.Module,
    checkpoints: Sequence[Checkpoint],
    batches: Batches,
    settings: Settings,
    *,
    dataset_size: int,
    num_runs: int = 1,
    replay: Replay | None = None,
) -> list[ProbePlan]:
    """Plans of all checkpoints of one run, in order of their steps; for every estimator, whole-run ones included.

    Args:
        model: as for `prepare`.
        checkpoints: the run's, by ascending step.
        batches: R, B and V.
        settings: the estimator and how it is computed.
        dataset_size: `N` of Eq. 9.
        num_runs: runs whose terms are averaged.
        replay: the run's record, for `unrolled` with `replay: exact`.

    The plans' vectors are on the CPU. Raises `InputError` where a record or a second checkpoint is needed and missing.
    """
    if settings.estimator == "z0":
        return zeroth_order(model, checkpoints, batches, settings, 1 / num_runs)
    if settings.estimator == "unrolled":
        if settings.replay == "checkpoints":
            return unrolled_from_checkpoints(model, checkpoints, batches, settings, num_runs)
        if replay is None:
            raise InputError(
                "score.replay: exact needs the record of a run trained here, found none; use score.replay: checkpoints"
            )
        return unrolled_exactly(model, checkpoints, batches, settings, replay, num_runs)
    return [
        prepare(
            model,
            checkpoint,
            batches,
            settings,
            dataset_size=dataset_size,
            num_checkpoints=len(checkpoints),
            num_runs=num_runs,
        )
        for checkpoint in checkpoints
    ]


def zeroth_order(
    model: nn.Module, checkpoints: Sequence[Checkpoint], batches: Batches, settings: Settings, weight: float
) -> list[ProbePlan]:
    """Z0-Inf (arXiv 2510.11832): `<g_V, G_z>` with gradients guessed from losses, mean over the checkpoints.

    At a checkpoint `t` a gradient is taken as the sum over neighbouring checkpoints `a` of
    `(l(a) - l(t)) (theta_a - theta_t) / |theta_a - theta_t|^2`, divided by `_NEIGHBOURS`, as in the authors' code
    (`z_self_inf_finite_diff`; their train-test form divides by the squared distances once more and is not followed).
    The product is linear in the losses of the pair, so each checkpoint needs one forward pass.

    Args:
        model: as for `prepare`; its device holds a checkpoint and the ways to its neighbours at a time.
        checkpoints: the run's, by ascending step, two at least.
        batches: of which V counts.
        settings: as for `prepare`.
        weight: of the run's score, the mean over its checkpoints: 1 over the runs that are averaged.

    Raises `InputError` where there is one checkpoint only.
    """
    if len(checkpoints) < 2:
        raise InputError("z0 takes differences between checkpoints: expected at least two per run, found one")
    views = (LocalView(model, checkpoint, batches, settings) for checkpoint in checkpoints)
    losses = [float(view.target_loss.value(view.state)) for view in views]
    names, device = chosen_names(checkpoints[0].params, settings.parameters), next(model.parameters()).device

    def params(index: int) -> Tree:
        return to_device(restricted(checkpoints[index].params, names), device)

    count = len(checkpoints)
    weights = [0.0] * count
    share = weight / count
    for here in range(count):
        start = params(here)
        ways: dict[int, Tree] = {}
        for there in range(max(0, here - _NEIGHBOURS // 2), min(count, here + _NEIGHBOURS // 2 + 1)):
            way = plus(params(there), start, -1.0)
            if norm(way):
                ways[there] = way
        gradient: Tree = {}
        for there, way in ways.items():
            gradient = plus(gradient, way, (losses[there] - losses[here]) / norm(way) ** 2 / _NEIGHBOURS)
        for there, way in ways.items():
            slope = share * float(dot(gradient, way)) / norm(way) ** 2 / _NEIGHBOURS
            weights[there] += slope
            weights[here] -= slope
    return [ProbePlan([Probe(weight)]) for weight in weights]


def along_gradient(here: LocalView, vector: Tree, weight: float) -> ProbePlan:
    """`weight * <v, G_z>`: one tangent pass, or with `method: forward` the difference of two losses.

    Args:
        here: the checkpoint.
        vector: `v`; for TracIn `P g_V`, per unit of loss and parameter.
        weight: of the term in the run's score: for TracIn the learning rate over the runs that are averaged.
    """
    vectors = {"v": without_zeros(vector)}
    if here.settings.method != "forward":
        return ProbePlan([Probe(weight, along=("v",))], vectors)
    step = here.step_for(vector, order=1)
    probes = [Probe(sign * weight / (2 * step), at=(("v", sign * step),)) for sign in (1, -1)]
    return ProbePlan(probes, vectors, facts={"step": step})


def diff_in(here: LocalView, factor: float) -> ProbePlan:
    """Eq. 9: `factor * <g_V, H_B G_z + H_z G_B>`, with AdamW `<P g_V, H_B P G_z + H_z P G_B>`.

    The bracket is the derivative along `u = P g_V` of `<P G_B, G_z>`.

    Args:
        here: the checkpoint.
        factor: `a_t`, of two steps' learning rates: `-t eta_t^2 / (N m)`, over the runs that are averaged.
    """
    u = here.preconditioned(here.target_loss.gradient(here.state))
    method = here.settings.method
    if method == "auto":
        # With few parameters in motion the passes at `theta` itself cost hardly more than the bare forward pass.
        method = "exact" if here.settings.parameters == "projections" else "central"
    if method == "exact":
        push = here.preconditioned(here.gradient_loss.gradient(here.state))
        bent = here.preconditioned(here.gradient_loss.hessian_product(here.state, u))
        vectors = {"u": without_zeros(u), "push": without_zeros(push), "bent": without_zeros(bent)}
        return ProbePlan([Probe(factor, along=("bent",)), Probe(factor, along=("u", "push"))], vectors)
    step = here.step_for(u, order=1 if method == "central" else 2)
    vectors = {"u": without_zeros(u)}
    probes: list[Probe] = []
    facts = {"step": step}
    for name, sign in (("push_ahead", 1), ("push_behind", -1)):
        push = here.preconditioned(here.gradient_loss.gradient(here.moved(u, sign * step)))
        vectors[name] = without_zeros(push)
        weight = sign * factor / (2 * step)
        at = (("u", sign * step),)
        if method == "central":
            probes.append(Probe(weight, along=(name,), at=at))
            continue
        inner = facts[f"step_{name}"] = here.step_for(push, order=2)
        probes += [Probe(s * weight / (2 * inner), at=(*at, (name, s * inner))) for s in (1, -1)]
    return ProbePlan(probes, vectors, facts=facts)


_PLAIN: dict[str, Callable[[float], ProbePlan]] = {
    "clip-score": lambda share: ProbePlan([Probe(share, of="similarity")]),
    "neg-clip-loss": lambda share: ProbePlan([Probe(share, of="neg-clip-loss")]),
    "el2n": lambda share: ProbePlan([Probe(share, of="el2n")]),
    "random": lambda share: ProbePlan([Probe(share, of="random")]),
}
