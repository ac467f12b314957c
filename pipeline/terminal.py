"""Pictures in a terminal, two pixels per character."""

from __future__ import annotations

from PIL import Image
from rich.color import Color
from rich.style import Style
from rich.text import Text

UPPER_HALF = "\u2580"


def half_blocks(image: Image.Image, width: int) -> Text:
    """An RGB image, at most `width` characters wide, as half blocks in 24-bit colour."""
    scale = min(1.0, width / image.width)
    columns, rows = max(1, round(image.width * scale)), max(2, round(image.height * scale))
    rows += rows % 2
    small = image.resize((columns, rows)).convert("RGB")
    pixels = small.load()
    assert pixels is not None
    text = Text()
    for row in range(0, rows, 2):
        for column in range(columns):
            upper, lower = pixels[column, row], pixels[column, row + 1]
            assert isinstance(upper, tuple)
            assert isinstance(lower, tuple)
            style = Style(color=Color.from_rgb(*upper[:3]), bgcolor=Color.from_rgb(*lower[:3]))
            text.append(UPPER_HALF, style)
        if row + 2 < rows:
            text.append("\n")
    return text
