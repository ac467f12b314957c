"""A proxy that cannot be built is an error of the key that is wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipeline.config import parse_config
from pipeline.errors import ConfigError
from pipeline.stages import computing
from pipeline.stages.computing import check_proxy


@pytest.mark.parametrize(
    ("proxy", "line"),
    [
        ({"model": "digits"}, r"^proxy\.model: digits: expected an open_clip model name"),
        ({"model": "digits", "pretrained": "%s"}, r"^proxy\.model: digits: expected an open_clip model name"),
        ({"model": "digits-vit", "pretrained": "none.pt"}, r"^proxy\.pretrained: none\.pt: expected a local weights"),
        ({"model": "digits-vit", "pretrained": "%s"}, r"^proxy\.pretrained: .*expected weights of this model"),
    ],
)
def test_the_key_that_is_wrong_is_named(tmp_path: Path, proxy: dict[str, Any], line: str) -> None:
    (tmp_path / "weights.pt").write_bytes(b"no weights")
    proxy = {key: value.replace("%s", str(tmp_path / "weights.pt")) for key, value in proxy.items()}
    with pytest.raises(ConfigError, match=line):
        check_proxy(parse_config({"data": {"shards": "a.tar"}, "proxy": proxy}))


def test_weights_that_expect_other_images_are_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(computing, "build_model", lambda *_, **__: None)
    found = {}
    for model in ("ViT-B-16-SigLIP", "ViT-B-32", "tiny-vit"):
        for weights in ({"checkpoints": ["a.pt"]}, {"pretrained": "a.pt"}, {}):
            proxy = {"model": model, **weights}
            found[model, *weights] = check_proxy(parse_config({"data": {"shards": "a.tar"}, "proxy": proxy}))
    assert [key for key, note in found.items() if note] == [
        ("ViT-B-16-SigLIP", "checkpoints"),
        ("ViT-B-16-SigLIP", "pretrained"),
    ]
    assert "mean (0.5, 0.5, 0.5), std (0.5, 0.5, 0.5)" in found["ViT-B-16-SigLIP", "checkpoints"]
    assert "resize_mode squash" in found["ViT-B-16-SigLIP", "checkpoints"]
