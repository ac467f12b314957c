"""How numbers and foreign text are written for people, on the page and in a terminal."""

from __future__ import annotations

import math
import re
import unicodedata

MINUS = "\u2212"
#: A narrow space at which no line breaks, between a number and its unit.
NARROW = "\u202f"
#: The name of pairs that have no source.
NO_SOURCE = "(no source)"
_SUPERSCRIPTS = str.maketrans("-0123456789", "\u207b\u2070\u00b9\u00b2\u00b3\u2074\u2075\u2076\u2077\u2078\u2079")
#: Passwords (and before a web address any user) and queries, where signatures and tokens are.
_PASSWORDS = re.compile(r"(https?://)[^\s/@\"']+@|([a-z][a-z0-9+.-]*://)[^\s/:@\"']*:[^\s/@\"']+@", re.IGNORECASE)
_QUERIES = re.compile(r"([a-z][a-z0-9+.-]*://[^\s?\"']*\?)(?:(?!::)[^\s\"'`])+", re.IGNORECASE)
#: Direction overrides and isolates, which could reorder the text around a caption.
_BIDI_CONTROLS = re.compile("[\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")


def count(value: float) -> str:
    """A whole number with thousands separators."""
    return f"{round(value):,}".replace("-", MINUS)


def number(value: float | None, digits: int = 3) -> str:
    """A number to `digits` significant digits, powers of ten written out; an en dash for a missing one."""
    if value is None or not math.isfinite(value):
        return "\u2013"
    if value == 0:
        return "0"
    exponent = math.floor(math.log10(abs(value)))
    if -3 <= exponent < 5:
        text = f"{value:,.{max(0, digits - 1 - exponent)}f}"
    else:
        mantissa, _, power = f"{value:.{digits - 1}e}".partition("e")
        text = f"{mantissa}\u00d7{power_of_ten(int(power))}"
    return text.replace("-", MINUS)


def power_of_ten(exponent: int) -> str:
    """`10` with a superscript exponent."""
    return "10" + str(exponent).translate(_SUPERSCRIPTS)


def percent(share: float | None, digits: int = 1) -> str:
    """A share as a percentage; a small one is not rounded to nothing; an en dash for a missing one."""
    if share is None or not math.isfinite(share):
        return "\u2013"
    if 0 < abs(share) < 0.5 * 10 ** (-digits - 2):
        return f"<{NARROW}{10**-digits:g}{NARROW}%"
    return f"{100 * share:.{digits}f}{NARROW}%".replace("-", MINUS)


def plus_minus(value: float, spread: float | None) -> str:
    """A value with its spread, both to the digits that the spread allows."""
    if spread is None or not math.isfinite(spread) or spread <= 0:
        return number(value)
    largest = math.floor(math.log10(max(abs(value), spread)))
    exponent = largest if largest < -3 or largest > 5 else 0
    value, spread = value / 10.0**exponent, spread / 10.0**exponent
    places = max(0, 1 - math.floor(math.log10(spread)))
    text = f"{value:,.{places}f}\u00a0\u00b1\u00a0{spread:,.{places}f}".replace("-", MINUS)
    return f"({text})\u00d7{power_of_ten(exponent)}" if exponent else text


def duration(seconds: float) -> str:
    """Seconds as they were measured: `400 ms`, `42.2 s`, `1 min 22 s`, `2 h 00 min`."""
    if seconds < 0.95:
        return f"{1000 * seconds:.0f} ms"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def rough_duration(seconds: float) -> str:
    """Seconds as far as they matter to somebody who waits: `42 s`, `7 min`, `3 h 05 min`, `6 d 4 h`."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes:02d} min"
    return f"{hours // 24} d {hours % 24} h"


def size(value: float) -> str:
    """Bytes in decimal units."""
    for unit in ("bytes", "kB", "MB", "GB", "TB"):
        if abs(value) < 1000 or unit == "TB":
            break
        value /= 1000
    return f"{value:.0f} {unit}" if unit == "bytes" else f"{value:.1f} {unit}"


def plain(text: str, limit: int = 400) -> str:
    """Foreign text made harmless to look at: one line, no control or direction-changing characters, not too long.

    It is still to be escaped for the page or terminal it goes to.
    """
    text = _BIDI_CONTROLS.sub("", text)
    text = "".join(" " if unicodedata.category(char) in ("Cc", "Cs", "Zl", "Zp") else char for char in text)
    text = " ".join(text.split())
    return text if len(text) <= limit else text[: limit - 1].rstrip() + "\u2026"


def without_secrets(text: str) -> str:
    """Text without what in the addresses in it gives access: for what is shown to others."""
    return _QUERIES.sub(r"\1...", _PASSWORDS.sub(r"\1\2", text))


def plural(amount: float, noun: str) -> str:
    """A count with its noun: `1 pair`, `2 pairs`."""
    return f"{count(amount)} {noun}" if amount == 1 else f"{count(amount)} {noun}s"
