"""The engine on open_clip's model families: its forms agree with each other in float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from pipeline.errors import InputError
from pipeline.influence import Batches, Scorer, Settings, prepare
from pipeline.influence.parameters import chosen_names
from pipeline.models.clip import build_model, split_state
from pipeline.types import Checkpoint, PairBatch
from tests.influence.test_diff_in import assert_close
from tests.influence.towers import cast

FAMILIES = {
    "tiny-vit": "clip",
    "tiny-resnet": "clip",
    "tiny-convnext": "clip",
    "tiny-fastvit": "clip",
    "tiny-siglip": "siglip",
}


def make_model(name, dtype=torch.float64):
    model = build_model(name, loss=FAMILIES[name])
    params, buffers = split_state(model)
    checkpoint = cast(Checkpoint(10, 1e-3, 0, params, {}), dtype)
    kept = {n: value.to(dtype) if value.is_floating_point() else value for n, value in buffers.items()}
    return model.to(dtype), replace(checkpoint, buffers=kept)


def pairs_of(model, count, first):
    generator = torch.Generator().manual_seed(first)
    images = torch.randint(0, 256, (count, 3, *model.image_spec.size), generator=generator, dtype=torch.uint8)
    captions = [" ".join(["big", "green", "old", "house", "photo", "tree"][: 1 + n % 6]) + str(n) for n in range(count)]
    numbers = torch.arange(first, first + count)
    return PairBatch(images, model.tokenize(captions), numbers, numbers)


@pytest.mark.parametrize("name", FAMILIES)
def test_exact_and_central_agree(name):
    model, checkpoint = make_model(name)
    settings = Settings(family=FAMILIES[name], parameters="all")
    batches = Batches(*(pairs_of(model, count, first) for count, first in ((4, 0), (6, 100), (4, 200))))
    found = []
    for method in ("exact", "central"):
        chosen = replace(settings, method=method)
        plan = prepare(model, checkpoint, batches, chosen, dataset_size=50, num_checkpoints=1)
        scorer = Scorer(model, [(checkpoint, plan)], batches.reference, chosen)
        found.append(scorer.score(pairs_of(model, 3, 300)).terms)
    assert_close(found[1], found[0], 1e-4)


@pytest.mark.parametrize(
    ("name", "choice", "within", "outside"),
    [
        ("tiny-vit", "projections", {"visual.proj", "text_projection", "logit_scale"}, "visual.conv1.weight"),
        ("tiny-vit", "last-1-blocks", {"visual.ln_post.weight", "ln_final.bias"}, "transformer.resblocks.0.ln_1.bias"),
        ("tiny-resnet", "projections", {"text_projection", "visual.attnpool.c_proj.weight"}, "visual.conv1.weight"),
        ("tiny-convnext", "last-1-blocks", {"logit_scale"}, "visual.trunk.stem.0.weight"),
        ("tiny-siglip", "projections", {"logit_scale", "logit_bias"}, "text.positional_embedding"),
    ],
)
def test_subsets_of_parameters(name, choice, within, outside):
    names = list(build_model(name, loss=FAMILIES[name]).state_dict())
    chosen = chosen_names(names, choice)
    assert within <= set(chosen)
    assert outside in names
    assert outside not in chosen
    assert set(chosen) < set(names)


def test_subset_equals_all_where_the_rest_does_not_count():
    model, checkpoint = make_model("tiny-vit")
    batches = Batches(*(pairs_of(model, count, first) for count, first in ((4, 0), (6, 100), (4, 200))))
    pairs = pairs_of(model, 3, 300)
    terms = {}
    for choice in ("all", "projections", "last-1-blocks"):
        settings = Settings(estimator="tracin", parameters=choice)
        plan = prepare(model, checkpoint, batches, settings, dataset_size=50, num_checkpoints=1)
        assert set(plan.vectors["v"]) <= set(chosen_names(checkpoint.params, choice))
        if choice == "all":
            small = chosen_names(checkpoint.params, "projections")
            plan.vectors["v"] = {name: plan.vectors["v"][name] for name in small if name in plan.vectors["v"]}
        terms[choice] = Scorer(model, [(checkpoint, plan)], batches.reference, settings).score(pairs).terms
    assert_close(terms["projections"], terms["all"], 1e-12)
    assert not torch.allclose(terms["last-1-blocks"], terms["all"])


def test_an_unknown_subset_is_refused():
    with pytest.raises(InputError, match="last-K-blocks"):
        chosen_names(["visual.proj"], "first-2-blocks")
    with pytest.raises(InputError, match="projections"):
        chosen_names(["tower.weight", "logit_scale"], "projections")
    with pytest.raises(InputError, match="numbered blocks for last-2-blocks, found none"):
        chosen_names(["tower.weight", "text_projection", "logit_scale"], "last-2-blocks")


@pytest.mark.parametrize("estimator", ["diff-in", "tracin", "grand"])
def test_with_projections_the_towers_run_once_and_carry_no_tangents(estimator):
    model, checkpoint = make_model("tiny-vit")
    batches = Batches(*(pairs_of(model, count, first) for count, first in ((4, 0), (6, 100), (4, 200))))
    settings = Settings(estimator=estimator, parameters="projections", projections=20)
    plan = prepare(model, checkpoint, batches, settings, dataset_size=50, num_checkpoints=1)
    scorer = Scorer(model, [(checkpoint, plan)], batches.reference, settings)
    seen = []

    def look(module, inputs, output):
        # vmap over directions and forward differentiation both wrap what depends on a direction
        seen.append((output.ndim, torch.autograd.forward_ad.unpack_dual(output).tangent is None))

    model.visual.transformer.register_forward_hook(look)
    found = scorer.score(pairs_of(model, 3, 300)).terms
    assert len(seen) == 1
    assert bool(found.isfinite().all())


def test_with_projections_one_pass_gives_what_separate_ones_give():
    model, checkpoint = make_model("tiny-vit")
    batches = Batches(*(pairs_of(model, count, first) for count, first in ((4, 0), (6, 100), (4, 200))))
    settings = Settings(parameters="projections")
    plan = prepare(model, checkpoint, batches, settings, dataset_size=50, num_checkpoints=1)
    pairs, found = pairs_of(model, 3, 300), []
    for choice in ("projections", "all"):  # the same plan: only the way of the passes differs
        way = replace(settings, parameters=choice)
        found.append(Scorer(model, [(checkpoint, plan)], batches.reference, way).score(pairs).terms)
    assert_close(found[0], found[1], 1e-10)
