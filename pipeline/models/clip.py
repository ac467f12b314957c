"""Builds the proxy: an open_clip model that takes uint8 images and tokens and returns unit features.

Parameter names are open_clip's own, so that its checkpoints and ours are interchangeable.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from copy import deepcopy
from dataclasses import asdict
from importlib import resources
from math import log
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

# Before open_clip, which imports torchvision:
from pipeline.models import compat  # noqa: F401  isort: skip
import open_clip
from open_clip.transformer import text_global_pool
from timm.layers import DropPath  # type: ignore[attr-defined]

from pipeline.data.decode import ImageSpec
from pipeline.errors import InputError
from pipeline.literals import Family
from pipeline.types import Features, Tree, longest_caption

Tokenize = Callable[[list[str]], Tensor]

#: Words whose tokens are remembered: far more than are frequent.
MOST_WORDS = 1 << 18

#: Keys of a `preprocess_cfg` that decide a model's pixels beside their number.
_PIXELS = ("mean", "std", "interpolation", "resize_mode")


class PairModel(nn.Module):
    """A two-tower model of image-text pairs; the concrete classes add open_clip's towers.

    Attributes:
        image_spec: how an image becomes the model's uint8 input.
        tokenize: captions to int64 tokens `[n, context_length]`.
        context_length: tokens per caption.
        cuts_captions: whether `encode_text` leaves out what comes after the batch's longest caption.
    """

    image_spec: ImageSpec
    tokenize: Tokenize
    context_length: int
    cuts_captions: bool = False
    visual: Any
    logit_scale: nn.Parameter
    logit_bias: nn.Parameter | None
    encode_image: Callable[[Tensor], Tensor]
    encode_text: Callable[..., Tensor]
    pixel_mean: Tensor
    pixel_std: Tensor

    def attach_input(self, spec: ImageSpec, tokenize: Tokenize) -> None:
        """Set what turns a pair into this model's input."""
        self.image_spec = spec
        self.tokenize = tokenize
        self.register_buffer("pixel_mean", torch.tensor(spec.mean).view(3, 1, 1), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(spec.std).view(3, 1, 1), persistent=False)
        self.cuts_captions = self._text_is_causal

    def forward(self, images: Tensor, tokens: Tensor) -> Features:
        """Features of uint8 images `[n, 3, h, w]` and int64 tokens `[n, context_length]`.

        Pixels are scaled to [0, 1] and normalised here, on the model's device and in its dtype; so are the features.
        """
        dtype = self.logit_scale.dtype
        pixels = (images.to(dtype) / 255 - self.pixel_mean.to(dtype)) / self.pixel_std.to(dtype)
        scale = self.logit_scale.exp().reshape(())
        bias = torch.zeros_like(scale) if self.logit_bias is None else self.logit_bias.reshape(())
        image = nn.functional.normalize(self.encode_image(pixels).to(dtype), dim=-1)
        text = nn.functional.normalize(self.encode_text(tokens).to(dtype), dim=-1)
        return Features(image, text, scale, bias)

    @property
    def _text_is_causal(self) -> bool:
        """Whether the text's feature, taken at its end, depends on no later token."""
        return False

    @property
    def trains_as_it_evaluates(self) -> bool:
        """Whether `train()` mode computes what `eval()` mode does: no dropout and no batch statistics."""
        return not any(_differs_in_training(module) for module in self.modules())


class _PairCLIP(PairModel, open_clip.CLIP):  # type: ignore[misc]
    transformer: Any
    token_embedding: Any
    positional_embedding: Any
    ln_final: Any
    attn_mask: Any
    text_projection: Any

    @property
    def _text_is_causal(self) -> bool:
        return self.attn_mask is not None and self.text_pool_type in ("argmax", "eos")

    def encode_text(self, text: Tensor, normalize: bool = False) -> Tensor:
        """open_clip's text features, of tokens of any length, without the padding after the batch's longest caption.

        Under causal attention no token sees what comes after it, and the feature is taken at the end-of-text token,
        so the result is the same (to rounding) at the cost of the longest caption instead of the whole context.
        """
        if not self._text_is_causal:
            whole: Tensor = super().encode_text(text, normalize)
            return whole
        if self.cuts_captions:
            text = text[:, : longest_caption(text)]
        length = text.shape[1]
        dtype = self.transformer.get_cast_dtype()
        x = self.token_embedding(text).to(dtype) + self.positional_embedding[:length].to(dtype)
        x = self.ln_final(self.transformer(x, attn_mask=self.attn_mask[:length, :length]))
        x = text_global_pool(x, text, self.text_pool_type, eos_token_id=getattr(self, "text_eos_id", None))
        if self.text_projection is not None:
            linear = isinstance(self.text_projection, nn.Linear)
            x = self.text_projection(x) if linear else x @ self.text_projection
        return nn.functional.normalize(x, dim=-1) if normalize else x


class _PairCustomTextCLIP(PairModel, open_clip.CustomTextCLIP):  # type: ignore[misc]
    pass


def build_model(name_or_json: str, pretrained: str | None = None, loss: Family = "clip", seed: int = 0) -> PairModel:
    """Build a proxy in float32 on the CPU, in `eval` mode.

    Args:
        name_or_json: an open_clip model name, a `.json` file with a model config (open_clip's form, alone or as
            `{"model_cfg": ..., "preprocess_cfg": ...}`), or one of the small configs in `pipeline/models/configs`.
        pretrained: a local weights file (`.pt`, `.safetensors`); None initialises at random.
        loss: with `siglip` a model without a logit bias gets one, and starts from SigLIP's scale and bias.
        seed: decides the random initialisation; the global random state is left as it was.

    Raises `InputError` for an unknown name, a broken config, or weights and tokenizers that are not there.
    """
    name, model_cfg, preprocess = _read_config(name_or_json)
    tokenize = _tokenizer(name, model_cfg["text_cfg"])
    if loss == "siglip":
        model_cfg.setdefault("init_logit_bias", -10)
        model_cfg.setdefault("init_logit_scale", log(10))
    custom_text = model_cfg.pop("custom_text", False) or "hf_model_name" in model_cfg["text_cfg"]
    model_class = _PairCustomTextCLIP if custom_text else _PairCLIP
    for tower, key in (("vision_cfg", "timm_model_pretrained"), ("text_cfg", "hf_model_pretrained")):
        if key.replace("pretrained", "name") in model_cfg[tower]:
            model_cfg[tower][key] = False
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # that of the CPU alone
        try:
            model: PairModel = model_class(**model_cfg)
        except (RuntimeError, TypeError, ValueError, AssertionError, OSError) as error:
            raise InputError(f"{name}: expected a model config that open_clip can build: {_one_line(error)}") from None
    if pretrained is not None:
        _load_pretrained(model, pretrained)
    preprocess = {"size": model.visual.image_size, **preprocess}
    model.attach_input(_image_spec(preprocess), tokenize)
    return model.eval()


def other_preprocessing(name: str) -> dict[str, Any]:
    """The preprocessing that all published weights of a named model expect, where `build_model` gives it another one.

    Mean, std, interpolation and resize mode as open_clip lists them, for a `preprocess_cfg`; else empty.
    A model that open_clip's trainer started at random has open_clip's own preprocessing, whatever its name.
    """
    if name not in open_clip.list_models():
        return {}
    plain = asdict(_image_spec({"size": 1}))
    published = [open_clip.get_pretrained_cfg(name, tag) for tag in open_clip.list_pretrained_tags_by_model(name)]
    wanted = [{key: cfg[key] for key in _PIXELS if cfg.get(key) is not None} for cfg in published]
    if not wanted or any(all(plain[key] == value for key, value in cfg.items()) for cfg in wanted):
        return {}
    return wanted[0]


def split_state(model: nn.Module) -> tuple[Tree, Tree]:
    """The trainable parameters, and the rest of the model's state (buffers, frozen tensors): references, by name.

    Raises `InputError` for a model with one tensor under two names.
    """
    params = {name: value.detach() for name, value in model.named_parameters() if value.requires_grad}
    buffers = {name: value.detach() for name, value in model.state_dict().items() if name not in params}
    first: dict[int, str] = {}
    named = *model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)
    for name, value in named:
        if (name in params or name in buffers) and first.setdefault(id(value), name) != name:
            raise InputError(
                f"expected a tensor of its own for each name of the model, {first[id(value)]} and {name} are one: "
                "models with tied parameters can be neither trained nor scored"
            )
    return params, buffers


def shipped_configs() -> list[str]:
    """Names of the small configs shipped with the package."""
    return sorted(Path(entry.name).stem for entry in _config_folder().iterdir() if entry.name.endswith(".json"))


def _config_folder() -> Any:
    return resources.files("pipeline.models") / "configs"


def _read_config(name_or_json: str) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """Name, a private copy of the model config, and the preprocessing keys it sets."""
    if name_or_json.endswith(".json"):
        try:
            tree = json.loads(Path(name_or_json).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise InputError(f"{name_or_json}: expected a JSON model config: {_one_line(error)}") from None
    elif name_or_json in shipped_configs():
        tree = json.loads((_config_folder() / f"{name_or_json}.json").read_text(encoding="utf-8"))
    elif name_or_json in open_clip.list_models():
        tree = open_clip.get_model_config(name_or_json)
    else:
        raise InputError(
            f"{name_or_json}: expected an open_clip model name, a .json file or one of {', '.join(shipped_configs())}"
        )
    preprocess: dict[str, Any] = {}
    if isinstance(tree, dict) and "model_cfg" in tree:
        preprocess, tree = dict(tree.get("preprocess_cfg", {})), tree["model_cfg"]
    if not isinstance(tree, dict) or not {"embed_dim", "vision_cfg", "text_cfg"} <= tree.keys():
        raise InputError(f"{name_or_json}: expected a model config with embed_dim, vision_cfg and text_cfg")
    if "multimodal_cfg" in tree:
        raise InputError(f"{name_or_json}: expected a two-tower model, found CoCa, which has a captioning loss too")
    return name_or_json, deepcopy(tree), preprocess


def _image_spec(preprocess: dict[str, Any]) -> ImageSpec:
    merged = {
        "mean": open_clip.OPENAI_DATASET_MEAN,
        "std": open_clip.OPENAI_DATASET_STD,
        "interpolation": "bicubic",
        "resize_mode": "shortest",
    } | preprocess
    size = merged["size"]
    height, width = (size, size) if isinstance(size, int) else size
    return ImageSpec(
        size=(height, width),
        mean=tuple(merged["mean"]),
        std=tuple(merged["std"]),
        interpolation=merged["interpolation"],
        resize_mode=merged["resize_mode"],
    )


class _Tokenizer(open_clip.SimpleTokenizer):  # type: ignore[misc]
    """open_clip's, which remembers the tokens of every word it has seen; this one forgets them when they are many."""

    cache: dict[str, str]

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._special = dict(self.cache)

    def encode(self, text: str) -> list[int]:
        if len(self.cache) > MOST_WORDS:
            self.cache = dict(self._special)
        tokens: list[int] = super().encode(text)
        return tokens


def _tokenizer(name: str, text_cfg: dict[str, Any]) -> Tokenize:
    length = text_cfg.get("context_length", 77)
    kwargs = dict(text_cfg.get("tokenizer_kwargs") or {})
    hf_name = text_cfg.get("hf_tokenizer_name") or text_cfg.get("hf_model_name")
    if hf_name is None:
        tokenize: Tokenize = _Tokenizer(context_length=length, **kwargs)
        return tokenize
    from open_clip.tokenizer import HFTokenizer

    try:
        hf: Tokenize = HFTokenizer(
            hf_name, context_length=length, tokenizer_mode=text_cfg.get("tokenizer_mode"), **kwargs
        )
    except (ImportError, OSError, ValueError) as error:
        raise InputError(
            f"{name}: expected its tokenizer {hf_name} on this machine (the package transformers and the tokenizer's "
            f"files, downloaded before): {_one_line(error)}"
        ) from None
    return hf


def _load_pretrained(model: nn.Module, path: str) -> None:
    if not Path(path).is_file():
        raise InputError(f"{path}: expected a local weights file (open_clip .pt or .safetensors), found nothing there")
    try:
        open_clip.load_checkpoint(model, path, strict=True, weights_only=True)
    except Exception as error:  # unpickling and loading raise many types; all of them mean the file does not fit
        raise InputError(f"{path}: expected weights of this model: {_one_line(error)}") from None


def _differs_in_training(module: nn.Module) -> bool:
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        return True
    if isinstance(module, nn.modules.dropout._DropoutNd):
        return bool(module.p > 0)
    if isinstance(module, DropPath):
        return bool(module.drop_prob)
    if isinstance(module, nn.MultiheadAttention):
        return bool(module.dropout > 0)
    return type(module).__name__ == "PatchDropout" and bool(module.prob)


def _one_line(error: Exception, limit: int = 300) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else text[:limit] + " ..."
