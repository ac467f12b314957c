"""A proxy that cannot be built is an error of the key that is wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipeline.config import parse_config
from pipeline.errors import ConfigError
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
