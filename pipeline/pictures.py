"""Images from shards: which formats are opened, and small pictures for the page and for a terminal."""

from __future__ import annotations

import base64
import io
import warnings

from PIL import Image
from rich.color import Color
from rich.style import Style
from rich.text import Text

#: Pillow's decoders that are allowed: some of the others start programs or take very long.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
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


def open_image(data: bytes, max_pixels: int, side: int) -> Image.Image | None:
    """The image in RGB, at most `side` pixels long; None where it cannot be decoded or has too many pixels."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image: Image.Image = Image.open(io.BytesIO(data), formats=FORMATS)
            if image.width * image.height > max_pixels:
                return None
            image.draft("RGB", (side, side))
            image.thumbnail((side, side))
            if image.mode.startswith("I"):  # 16-bit greyscale: `convert` would clip it to white
                image = image.convert("I").point(lambda value: value / 256).convert("L")
            if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            return image.convert("RGB")
    except Exception:
        # Decoders raise nearly anything on broken files, and a broken picture is no reason to have no page.
        return None


def data_uri(image: Image.Image) -> str:
    """The image as a WebP data URI."""
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=74, method=4)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()
