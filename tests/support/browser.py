"""A real headless browser that looks at a page."""

import json
import subprocess
from html import unescape
from pathlib import Path
from typing import Any

from served_page import FLAGS, browser

# Everything a test asks for, once the page is there.
_MEASURE = """
<script>
const measure = () => {
  const box = (e) => { const r = e.getBoundingClientRect();
    return {left: r.left, top: r.top, right: r.right, bottom: r.bottom}; };
  const marks = (svg, kind) =>
    [...svg.querySelectorAll(`.role-mark.mark-${kind} > path`)].map((e) => ({kind, ...box(e)}));
  const pictures = [...document.querySelectorAll(".chart")].map((chart) => {
    const svg = chart.querySelector("svg");
    return {id: chart.id, box: box(svg), title: chart.getAttribute("aria-label"),
      // Axis labels without room are in the page, but not to be seen.
      texts: [...svg.querySelectorAll("text")]
        .filter((e) => e.textContent && e.getAttribute("opacity") !== "0")
        .map((e) => ({text: e.textContent, ...box(e)})),
      shapes: [...marks(svg, "rect"), ...marks(svg, "symbol")]};
  });
  const found = {pictures, scrolls: document.body.scrollWidth,
    background: getComputedStyle(document.body).backgroundColor};
  const result = document.createElement("pre");
  result.id = "measured";
  result.textContent = JSON.stringify(found);
  document.body.append(result);
};
const wait = () => document.body.dataset.drawn ? measure() : setTimeout(wait, 50);
addEventListener("load", wait);
</script>
"""


def at_end(page: str, markup: str) -> str:
    """Return a page with more at its end; scripts in it may hold closing tags as text."""
    before, _, after = page.rpartition("</body>")
    return f"{before}{markup}</body>{after}"


def look_at(page: str, folder: Path, width: int = 1000, *flags: str) -> tuple[Any, list[str]]:
    """What a browser makes of a page: boxes of all plots, and what it wrote to its console.

    The page gets its width by a style of its own, as windows have a least width. Skips the test
    where there is no browser.
    """
    program = browser()
    file = folder / "page.html"
    file.write_text(at_end(page, f"<style>html {{ width: {width}px }}</style>{_MEASURE}"))
    command = [
        *(program, *FLAGS, "--disable-gpu", "--enable-logging=stderr"),
        *(f"--user-data-dir={folder / 'profile'}", "--window-size=1200,1200"),
        *(*flags, "--virtual-time-budget=20000", "--dump-dom", file.as_uri()),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    _, _, after = done.stdout.partition('<pre id="measured">')
    console = [line for line in done.stderr.splitlines() if ":CONSOLE" in line]
    return json.loads(unescape(after.partition("</pre>")[0])), console
