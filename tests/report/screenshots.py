"""Pictures of a report page in headless Chromium, at three widths and in both colour schemes.

`python -m tests.report.screenshots OUT [REPORT.html]` writes `WIDTH-SCHEME.png` for a report, by default one of a
synthetic run, and exits with status 1 where the page is wider than the window or its script fails.
"""

from __future__ import annotations

import html as html_module
import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

WIDTHS = (360, 800, 1400)
SCHEMES = {"light": 1, "dark": 0}

#: Measures the page and tells the frame around it; goes into a copy of the page that has no content policy.
PROBE = """
<script>
addEventListener("load", () => {
  const root = document.documentElement;
  const wide = [...document.querySelectorAll("body *")].filter((e) => e.getBoundingClientRect().right > innerWidth + 1
    && !e.closest(".scroll") && !e.closest("svg")).map((e) => e.tagName + "." + e.className);
  const buttons = [...document.querySelectorAll("button[data-gallery]")];
  const count = () => [...document.querySelectorAll(".card")].filter((card) => !card.hidden).length;
  const height = root.scrollHeight;
  const shown = {};
  for (const button of buttons) { button.click(); shown[button.dataset.gallery] = count(); }
  const search = document.querySelector(".controls input");
  search.value = "zzzz-no-such-caption";
  search.dispatchEvent(new Event("input"));
  const facts = { width: root.scrollWidth, inner: innerWidth, height, wide, shown, none: count(),
    hacked: typeof window.hacked, nodes: document.querySelectorAll("*").length };
  parent.postMessage(JSON.stringify(facts), "*");
});
</script>
"""
#: The frame's answer to the probe: what it is told becomes its only text.
LISTENER = '<script>addEventListener("message", (e) => { document.body.textContent = `facts${e.data}`; });</script>'


def chromium() -> str | None:
    """Path of a Chromium, if there is one."""
    return next(
        (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
    )


def browse(page: Path, *options: str) -> str:
    """Open a page in a fresh headless browser; its standard output."""
    program = chromium()
    assert program is not None
    with tempfile.TemporaryDirectory() as profile:
        command = [
            program, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
            "--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars",
            "--disable-dev-shm-usage", "--virtual-time-budget=4000", f"--user-data-dir={profile}", *options,
            page.as_uri(),
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return done.stdout


def framed(page: Path, width: int, folder: Path) -> Path:
    """A page that shows `page` in a frame of exactly `width` pixels: headless windows have a least width of 500."""
    path = folder / f"frame-{width}.html"
    path.write_text(
        f'<body style="margin:0"><iframe src="{page.as_uri()}" style="border:0;width:{width}px;height:100vh">'
    )
    return path


def probe(page: Path, width: int) -> dict[str, object]:
    """What the page measures and does at a window `width`: sizes, cards per gallery, whether foreign script ran."""
    html = page.read_text(encoding="utf-8")
    html = re.sub(r"<meta http-equiv=.Content-Security-Policy.[^>]*>", "", html).replace("</body>", PROBE + "</body>")
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "copy.html"
        copy.write_text(html, encoding="utf-8")
        frame = framed(copy, width, Path(folder))
        frame.write_text(LISTENER + frame.read_text())
        text = browse(frame, "--dump-dom", "--window-size=1600,1000")
    found = re.search(r"<body[^>]*>facts({.*})", text)
    assert found is not None, "the page's script did not finish"
    facts: dict[str, object] = json.loads(html_module.unescape(found.group(1)))
    return facts


def picture(page: Path, width: int, scheme: str, out: Path, height: int) -> None:
    """Write a picture of the page at a width and in a colour scheme."""
    with tempfile.TemporaryDirectory() as folder:
        target = framed(page, width, Path(folder)) if width < 500 else page
        browse(
            target,
            f"--screenshot={out}",
            f"--window-size={max(width, 500)},{height}",
            f"--blink-settings=preferredColorScheme={SCHEMES[scheme]}",
        )


def main(arguments: list[str]) -> int:
    """Take all pictures of a page."""
    if chromium() is None:
        print("skipped: no chromium is installed")
        return 0
    out = Path(arguments[0])
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        page = Path(arguments[1]).resolve() if len(arguments) > 1 else synthetic_page(Path(folder))
        wrong = 0
        for width in WIDTHS:
            facts = probe(page, width)
            wrong += bool(facts["wide"]) or facts["hacked"] != "undefined"
            print(f"{width} px: {facts}")
            for scheme in SCHEMES:
                picture(page, width, scheme, out / f"{width}-{scheme}.png", int(str(facts["height"])))
    return 1 if wrong else 0


def synthetic_page(folder: Path) -> Path:
    """The report of a synthetic run."""
    from pipeline.report import write_report
    from tests.report.synthetic import make_run

    made = make_run(folder, size=160)
    return Path(write_report(made.run, made.config))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
