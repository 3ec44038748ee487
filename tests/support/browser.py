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
addEventListener("load", () => {
  const box = (e) => { const r = e.getBoundingClientRect();
    return {left: r.left, top: r.top, right: r.right, bottom: r.bottom}; };
  const pictures = [...document.querySelectorAll("svg")].map((svg) => ({
    id: svg.id, box: box(svg), title: svg.querySelector("title").textContent,
    texts: [...svg.querySelectorAll("text")].map((e) => ({text: e.textContent, ...box(e)})),
    shapes: [...svg.querySelectorAll("rect, circle")].map((e) =>
      ({kind: e.getAttribute("class").split(" ")[0], ...box(e)})),
  }));
  const found = {pictures, scrolls: document.body.scrollWidth,
    background: getComputedStyle(document.body).backgroundColor};
  const result = document.createElement("pre");
  result.id = "measured";
  result.textContent = JSON.stringify(found);
  document.body.append(result);
});
</script>
"""


def look_at(page: str, folder: Path, width: int = 1000, *flags: str) -> tuple[Any, list[str]]:
    """What a browser makes of a page: boxes of all plots, and what it wrote to its console.

    The page gets its width by a style of its own, as windows have a least width. Skips the test
    where there is no browser.
    """
    program = browser()
    file = folder / "page.html"
    file.write_text(
        page.replace("</body>", f"<style>html {{ width: {width}px }}</style>{_MEASURE}</body>")
    )
    command = [
        *(program, *FLAGS, "--disable-gpu", "--enable-logging=stderr"),
        *(f"--user-data-dir={folder / 'profile'}", "--window-size=1200,1200"),
        *(*flags, "--dump-dom", file.as_uri()),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    _, _, after = done.stdout.partition('<pre id="measured">')
    console = [line for line in done.stderr.splitlines() if ":CONSOLE" in line]
    return json.loads(unescape(after.partition("</pre>")[0])), console
