"""Pages run in a real headless browser, served from this machine."""

import json
import shutil
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from queue import Empty, Queue
from typing import Any

import pytest

FLAGS = (
    *("--headless", "--no-sandbox", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update"),
)
# WebGPU without a graphics card.
SOFTWARE_WEBGPU = (
    *("--enable-unsafe-webgpu", "--use-webgpu-adapter=swiftshader"),
    *("--enable-features=Vulkan", "--use-vulkan=swiftshader"),
)
_SECONDS = 120
# The page under test, driven by a module that reports what it returns.
_FRAME = """<!doctype html><script type="module">
const report = (found) => fetch("/report", {{method: "POST", body: JSON.stringify(found)}});
try {{ {script} }} catch (error) {{ await report({{error: String(error)}}); }}
</script>"""


class _Handler(SimpleHTTPRequestHandler):
    extensions_map = SimpleHTTPRequestHandler.extensions_map | {
        ".mjs": "text/javascript",
        ".wasm": "application/wasm",
    }

    def __init__(self, *arguments: Any, reports: Queue[Any], **options: Any) -> None:
        self.reports = reports
        super().__init__(*arguments, **options)

    def do_POST(self) -> None:
        self.reports.put(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        self.send_response(204)
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        pass


def browser() -> str:
    """The browser's program; skips the test where there is none."""
    program = shutil.which("chromium") or shutil.which("chromium-browser")
    if program is None:
        pytest.skip("no chromium here, so no page is run")
    return program


def run_in_page(folder: Path, script: str, profile: Path, *flags: str) -> Any:
    """What a module script, which calls ``report`` once, finds out in a page served at ``folder``.

    Args:
        folder: root of the served files; a page for the script is added to it.
        script: JavaScript; relative URLs are those of ``folder``.
        profile: an empty folder for the browser.
        flags: further ones of the browser.
    """
    program = browser()
    (folder / "run-in-page.html").write_text(_FRAME.format(script=script))
    with _served(folder) as (address, reports):
        command = [program, *FLAGS, *flags, f"--user-data-dir={profile}"]
        with subprocess.Popen(
            [*command, f"{address}/run-in-page.html", "--remote-debugging-port=0"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        ) as process:
            try:
                found = reports.get(timeout=_SECONDS)
            except Empty:
                pytest.fail(f"the page reported nothing within {_SECONDS} s")
            finally:
                process.terminate()
    if isinstance(found, dict) and "error" in found:
        pytest.fail(f"the page failed: {found['error']}")
    return found


@contextmanager
def _served(folder: Path) -> Iterator[tuple[str, Queue[Any]]]:
    reports: Queue[Any] = Queue()
    handler = partial(_Handler, directory=str(folder), reports=reports)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", reports
        finally:
            server.shutdown()
