"""The proxy models: open_clip's numbers, our input, and derivatives of every family."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.func import functional_call, grad, jvp
from torch.nn.attention import SDPBackend, sdpa_kernel

from pipeline.errors import InputError
from pipeline.models import clip
from pipeline.models.clip import PairModel, build_model, shipped_configs, split_state
from pipeline.types import Tree

# After pipeline.models.compat, which lets torchvision import:
import open_clip  # isort: skip

CAPTIONS = ["a cat", "two dogs on a beach", "x", "blue, small and round"]


def pairs(model: PairModel, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (len(CAPTIONS), 3, *model.image_spec.size), dtype=torch.uint8, generator=generator)
    return images, model.tokenize(CAPTIONS)


def random_tree(tree: Tree, seed: int) -> Tree:
    """Gaussian vectors with the scale of each tensor of `tree`."""
    generator = torch.Generator().manual_seed(seed)
    scale = {k: v.square().mean().sqrt().clamp(min=1e-3) for k, v in tree.items()}
    return {k: torch.randn(v.shape, dtype=v.dtype, generator=generator) * scale[k] for k, v in tree.items()}


def test_every_shipped_config_builds() -> None:
    names = shipped_configs()
    assert {"tiny-convnext", "tiny-fastvit", "tiny-resnet", "tiny-siglip", "tiny-vit"} <= set(names)
    for name in names:
        model = build_model(name)
        assert len(model(*pairs(model)).image) == len(CAPTIONS)


@pytest.mark.parametrize("name", ["tiny-vit", "tiny-siglip"])
def test_features_equal_open_clip_on_its_own_normalised_input(name: str, tmp_path: Path) -> None:
    model = build_model(name, seed=3)
    images, tokens = pairs(model)
    features = model(images, tokens)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (model.image_spec.mean, model.image_spec.std))
    pixels = (images.float() / 255 - mean) / std
    assert isinstance(model, open_clip.CLIP | open_clip.CustomTextCLIP)
    torch.testing.assert_close(features.image, model.encode_image(pixels, normalize=True))
    torch.testing.assert_close(features.text, model.encode_text(tokens, normalize=True))
    logits = features.scale * features.image @ features.text.T + features.bias
    torch.testing.assert_close(logits, model.get_logits(pixels, tokens)[0])


def test_a_registry_model_is_open_clips_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    config = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 16, "patch_size": 8, "layers": 1, "width": 32, "head_width": 16},
        "text_cfg": {"context_length": 8, "vocab_size": 49408, "width": 16, "heads": 1, "layers": 1},
    }
    (tmp_path / "registered-vit.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path / "registered-vit.json")
    torch.manual_seed(5)
    theirs = open_clip.create_model("registered-vit").state_dict()
    ours = build_model("registered-vit", seed=5).state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_the_seed_decides_the_initialisation_and_nothing_else_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "manual_seed_all", pytest.fail)
    before = torch.random.get_rng_state()
    first, again, other = (split_state(build_model("tiny-vit", seed=s))[0] for s in (1, 1, 2))
    assert torch.equal(before, torch.random.get_rng_state())
    assert all(torch.equal(first[k], again[k]) for k in first)
    assert not torch.equal(first["visual.proj"], other["visual.proj"])


def test_siglip_has_a_bias_and_its_own_scale_and_preprocessing() -> None:
    clip, siglip = build_model("tiny-vit", loss="clip"), build_model("tiny-vit", loss="siglip")
    assert clip.logit_bias is None
    assert siglip.logit_bias is not None
    assert siglip.logit_bias.item() == -10
    assert siglip.logit_scale.exp().item() == pytest.approx(10)
    assert siglip(*pairs(siglip)).bias.item() == -10
    assert clip(*pairs(clip)).bias.item() == 0
    spec = build_model("tiny-siglip").image_spec
    assert (spec.mean, spec.resize_mode) == ((0.5, 0.5, 0.5), "squash")


@pytest.mark.parametrize("name", ["tiny-convnext", "tiny-fastvit", "tiny-resnet", "tiny-siglip", "tiny-vit"])
def test_forward_mode_and_hessian_products_of_every_family(name: str) -> None:
    """Against reverse mode: <v, g> from jvp, and <u, H v> = <v, H u> with H v by forward over reverse; float64."""
    model = build_model(name, loss="siglip" if name == "tiny-siglip" else "clip").double()
    images, tokens = pairs(model)
    params, buffers = split_state(model)

    def loss(tree: Tree) -> Tensor:
        features = functional_call(model, {**tree, **buffers}, (images, tokens))
        logits = features.scale * features.image @ features.text.T + features.bias
        return torch.nn.functional.cross_entropy(logits, torch.arange(len(CAPTIONS)))

    def dot(a: Tree, b: Tree) -> float:
        return sum(float((a[k] * b[k]).sum()) for k in a)

    u, v = random_tree(params, 1), random_tree(params, 2)
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            gradient = grad(loss)(params)
            _, along_v = jvp(loss, (params,), (v,))
            _, hessian_v = jvp(grad(loss), (params,), (v,))
            _, hessian_u = jvp(grad(loss), (params,), (u,))
            step = 1e-5
            up = grad(loss)({k: params[k] + step * v[k] for k in params})
            down = grad(loss)({k: params[k] - step * v[k] for k in params})
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)
    assert float(along_v) == pytest.approx(dot(gradient, v), rel=1e-9)
    assert dot(u, hessian_v) == pytest.approx(dot(v, hessian_u), rel=1e-7)
    assert dot(u, hessian_v) == pytest.approx((dot(u, up) - dot(u, down)) / (2 * step), rel=1e-3)


@pytest.mark.parametrize(
    ("name", "same"),
    [
        ("tiny-vit", True),
        ("tiny-siglip", True),
        ("tiny-convnext", True),
        ("tiny-resnet", False),
        ("tiny-fastvit", False),
    ],
)
def test_it_knows_whether_training_mode_computes_the_same(name: str, same: bool) -> None:
    model = build_model(name)
    assert model.trains_as_it_evaluates is same
    images, tokens = pairs(model)
    evaluated = model(images, tokens).image
    trained = model.train()(images, tokens).image
    assert torch.equal(evaluated, trained) is same


def test_dropout_of_patches_is_noticed(tmp_path: Path) -> None:
    config = {
        "embed_dim": 16,
        "vision_cfg": {
            "image_size": 16,
            "patch_size": 8,
            "layers": 1,
            "width": 32,
            "head_width": 16,
            "patch_dropout": 0.5,
        },
        "text_cfg": {"context_length": 8, "vocab_size": 49408, "width": 16, "heads": 1, "layers": 1},
    }
    (tmp_path / "m.json").write_text(json.dumps(config))
    assert not build_model(str(tmp_path / "m.json")).trains_as_it_evaluates


def test_tied_parameters_are_refused() -> None:
    model = build_model("tiny-vit")
    model.visual.ln_post.weight = model.visual.ln_pre.weight
    with pytest.raises(InputError, match=r"visual\.ln_pre\.weight and visual\.ln_post\.weight are one"):
        split_state(model)
    shared = build_model("tiny-resnet")
    shared.visual.again = shared.visual.bn1.requires_grad_(False)
    with pytest.raises(InputError, match=r"visual\.bn1\.weight and visual\.again\.weight are one"):
        split_state(shared)


def test_a_model_survives_pickling() -> None:
    model = build_model("tiny-vit")
    copy = pickle.loads(pickle.dumps(model))
    assert torch.equal(model(*pairs(model)).text, copy(*pairs(copy)).text)


def test_pretrained_weights_come_from_a_file(tmp_path: Path) -> None:
    source = build_model("tiny-vit", seed=9)
    torch.save({"state_dict": {f"module.{k}": v for k, v in source.state_dict().items()}}, tmp_path / "w.pt")
    loaded = build_model("tiny-vit", pretrained=str(tmp_path / "w.pt"), seed=1)
    assert all(torch.equal(a, b) for a, b in zip(source.parameters(), loaded.parameters(), strict=True))
    with pytest.raises(InputError, match="nothing there"):
        build_model("tiny-vit", pretrained=str(tmp_path / "absent.pt"))
    with pytest.raises(InputError, match="expected weights of this model"):
        build_model("tiny-resnet", pretrained=str(tmp_path / "w.pt"))
    (tmp_path / "junk.pt").write_bytes(b"junk")
    with pytest.raises(InputError, match="junk"):
        build_model("tiny-vit", pretrained=str(tmp_path / "junk.pt"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "JSON model config"),
        ('{"embed_dim": 4}', "vision_cfg"),
        ('{"embed_dim": 4, "vision_cfg": {"layers": "x"}, "text_cfg": {}}', "open_clip can build"),
        ('{"embed_dim": 4, "vision_cfg": {"unheard": 1}, "text_cfg": {}}', "unheard"),
        ('{"embed_dim": 4, "vision_cfg": {}, "text_cfg": {}, "multimodal_cfg": {}}', "CoCa"),
    ],
)
def test_a_broken_config_is_one_line(content: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "model.json"
    path.write_text(content)
    with pytest.raises(InputError, match=message) as caught:
        build_model(str(path))
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


def test_unknown_names_and_absent_tokenizers_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="tiny-vit"):
        build_model("ViT-Z-99")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(InputError, match="tokenizer"):
        build_model("ViT-B-16-SigLIP")


def test_a_tokenizer_remembers_a_bounded_number_of_words(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenize = build_model("tiny-vit").tokenize
    words = [f"wo{'ab' * number}" for number in range(1, 40)]
    expected = tokenize(words)
    assert len(tokenize.cache) > 30  # type: ignore[attr-defined]
    monkeypatch.setattr(clip, "MOST_WORDS", 10)
    assert torch.equal(tokenize(words), expected)
    assert len(tokenize.cache) < 15  # type: ignore[attr-defined]


def test_frozen_tensors_are_not_parameters() -> None:
    model = build_model("tiny-vit")
    model.visual.conv1.weight.requires_grad_(False)
    params, buffers = split_state(model)
    assert "visual.conv1.weight" in buffers
    assert params.keys() | buffers.keys() == model.state_dict().keys()


def test_images_need_not_be_square(tmp_path: Path) -> None:
    config = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": [16, 32], "patch_size": 8, "layers": 1, "width": 32, "head_width": 16},
        "text_cfg": {"context_length": 8, "vocab_size": 49408, "width": 16, "heads": 1, "layers": 1},
    }
    (tmp_path / "wide.json").write_text(json.dumps(config))
    model = build_model(str(tmp_path / "wide.json"))
    assert model.image_spec.size == (16, 32)
    assert model(*pairs(model)).image.shape == (4, 16)


def test_padding_after_the_longest_caption_is_not_computed_and_not_missed() -> None:
    model = build_model("tiny-vit", seed=1).double()
    tokens = model.tokenize(["a cat", "a much longer caption about a dog by the sea"])
    widths: list[int] = []
    model.transformer.register_forward_hook(lambda module, args, output: widths.append(output.shape[1]))
    short, both = model.encode_text(tokens[:1]), model.encode_text(tokens)
    whole = open_clip.CLIP.encode_text(model, tokens)
    assert widths == [4, int((tokens[1] != 0).sum()), model.context_length]
    torch.testing.assert_close(both, whole, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(short, whole[:1], rtol=1e-12, atol=1e-12)
