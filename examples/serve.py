"""Serve an exported image classifier over HTTP, with nothing but the standard library.

    python examples/serve.py out/exported --port 8000
    curl --data-binary @photo.jpg "localhost:8000/?task=clipart"

The answer is JSON: for each task, or the one asked for, the label and its probability.
"""

import argparse
import json
from http.server import BaseHTTPRequestHandler, HTTPServer
from io import BytesIO
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

from PIL import Image, UnidentifiedImageError

import epmq_deploy as epmq


def make_server(exported: Path, port: int = 0) -> HTTPServer:
    """Open the exported model and return a server that answers with it.

    Args:
        exported: the folder that ``epmq export`` wrote.
        port: to listen on, of this machine alone; 0 for any that is free.
    """
    model = epmq.load(exported)

    class Handler(BaseHTTPRequestHandler):
        """Answers ``POST`` requests whose body is an image file."""

        def do_POST(self) -> None:
            """Classify the image."""
            tasks = parse_qs(urlsplit(self.path).query).get("task")
            try:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                predictions = model(Image.open(BytesIO(body)), tasks)
            except (epmq.MismatchError, UnidentifiedImageError) as error:
                self._send(400, {"error": str(error)})
                return
            self._send(
                200,
                {
                    task: {"label": prediction.label, "score": round(prediction.score, 4)}
                    for task, prediction in predictions.items()
                },
            )

        def _send(self, status: int, content: object) -> None:
            body = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    return HTTPServer(("127.0.0.1", port), Handler)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("exported", type=Path)
    parser.add_argument("--port", type=int, default=8000)
    arguments = parser.parse_args()
    server = make_server(arguments.exported, arguments.port)
    print(f"listening on http://127.0.0.1:{server.server_port}")
    server.serve_forever()
