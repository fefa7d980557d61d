"""Serve the chat page for a BWLA server, or any other with OpenAI's API.

    vllm serve ./my-model-bwla --quantization bwla
    python examples/clients/chat_page.py            then open http://localhost:8080

Requires nothing but Python. The page's requests are passed on to the server, so the browser reaches both at one address
and the server needs no --allowed-origins. If the folder that the server reads its checkpoint from is on this machine,
the page shows the checkpoint's size.
"""

import argparse
import json
from contextlib import suppress
from http.client import HTTPException
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

PAGE = Path(__file__).with_name("chat.html")
REPORT = "bwla_report.json"
REPLY_SECONDS = 600
"""Longest wait for a piece of a reply; the first one comes after the whole prompt was computed."""


def checkpoint_facts(folder: Path) -> dict[str, float]:
    """Return the bytes of a checkpoint's weights and the bits of each quantized weight, as far as they are known."""
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    facts: dict[str, float] = {"bytes": size} if size else {}
    with suppress(OSError, ValueError, KeyError, TypeError):  # not converted by bwla-convert
        facts["bits_per_weight"] = float(json.loads((folder / REPORT).read_bytes())["bits_per_weight"])
    return facts


def served_folder(server: str) -> Path | None:
    """Return the folder that the server's first model was loaded from; None if the server does not say."""
    try:
        with urlopen(f"{server}/models", timeout=10) as reply:
            return Path(json.load(reply)["data"][0]["root"])
    except (OSError, HTTPException, ValueError, LookupError, TypeError):
        return None


class ChatPage(BaseHTTPRequestHandler):
    """Answers with the page and the checkpoint's facts, and passes on what the page asks the server.

    Attributes:
        server_url: base URL of the server's API, ends with /v1.
    """

    server_url = ""
    disable_nagle_algorithm = True  # a token is sent as soon as it is here

    def do_GET(self) -> None:
        """Send the page, the checkpoint's facts, or the server's list of models."""
        path = self.path.partition("?")[0]
        if path in ("/", "/chat.html"):
            self.send(200, "text/html; charset=utf-8", PAGE.read_bytes())
        elif path == "/checkpoint.json":
            folder = served_folder(self.server_url)
            self.send_as_json(200, {} if folder is None else checkpoint_facts(folder))
        elif path == "/v1/models":
            self.pass_on("/models", None)
        else:
            self.send_as_json(404, {"error": {"message": f"{path} does not exist"}})

    def do_POST(self) -> None:
        """Pass a chat request on."""
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.path == "/v1/chat/completions":
            self.pass_on("/chat/completions", body)
        else:
            self.send_as_json(404, {"error": {"message": f"{self.path} does not exist"}})

    def pass_on(self, path: str, body: bytes | None) -> None:
        """Send the server's reply piece by piece. One that breaks off ends here too, without its `data: [DONE]`."""
        request = Request(self.server_url + path, body, {"Content-Type": "application/json"})
        try:
            reply = urlopen(request, timeout=REPLY_SECONDS)
        except HTTPError as error:
            self.send(error.code, error.headers.get_content_type(), error.read())
            return
        except (OSError, HTTPException) as error:
            message = f"no server at {self.server_url}: {getattr(error, 'reason', error)}"
            self.send_as_json(502, {"error": {"message": message}})
            return
        with reply:  # closed as soon as the page is, so that the server stops too
            try:
                self.start(reply.status, reply.headers.get_content_type())
                while piece := reply.read1():
                    self.wfile.write(piece)
            except (OSError, HTTPException):
                self.close_connection = True

    def send_as_json(self, status: int, data: object) -> None:
        """Send plain data."""
        self.send(status, "application/json", json.dumps(data).encode())

    def send(self, status: int, content_type: str, body: bytes) -> None:
        """Send a whole reply."""
        self.start(status, content_type)
        self.wfile.write(body)

    def start(self, status: int, content_type: str) -> None:
        """Send status and headers; the reply ends with the connection."""
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Cache-Control", "no-store")
        self.end_headers()


def make_server(url: str, host: str, port: int) -> ThreadingHTTPServer:
    """Return a server of the page, bound to `host` and `port`, that passes requests on to `url`."""
    handler = type("BoundChatPage", (ChatPage,), {"server_url": url.rstrip("/")})
    return ThreadingHTTPServer((host, port), handler)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--url", default="http://localhost:8000/v1", help="the server's API (%(default)s)")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at (%(default)s)")
    parser.add_argument("--port", type=int, default=8080, help="port to listen at (%(default)s)")
    arguments = parser.parse_args()
    with make_server(arguments.url, arguments.host, arguments.port) as server:
        print(f"chat page for {arguments.url}: http://localhost:{server.server_port}", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print()


if __name__ == "__main__":
    main()
