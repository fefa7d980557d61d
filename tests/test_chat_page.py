"""The chat page: what its command serves and passes on, and what a browser shows; the server follows a script."""

import json
import re
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.parse import urlencode
from urllib.request import Request, urlopen

import pytest

from examples.clients.chat_page import PAGE, checkpoint_facts, make_server

BROWSER = next(filter(None, map(shutil.which, ("chromium", "google-chrome", "chromium-browser"))), None)
needs_browser = pytest.mark.skipif(BROWSER is None, reason="needs chromium or google-chrome")


def event(text: str, reason: str | None = None) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": reason}]}


HELLO = [event(""), event("Good"), event(" morning"), event("", "stop")]
USAGE = {"choices": [], "usage": {"prompt_tokens": 9, "completion_tokens": 3}}


class Script(BaseHTTPRequestHandler):
    """Answers like a server with OpenAI's API: `root` names the checkpoint's folder, `lines` are the streamed reply."""

    root: str | None = None
    lines: tuple[str, ...] = ()
    error: str | None = None
    asked: dict[str, Any]

    def do_GET(self) -> None:
        self.reply(200, "application/json", json.dumps({"data": [{"id": "my-model", "root": self.root}]}))

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        type(self).asked = {"path": self.path, **json.loads(body)}
        if self.error is not None:
            self.reply(400, "application/json", json.dumps({"error": {"message": self.error}}))
        else:
            self.reply(200, "text/event-stream; charset=utf-8", "".join(self.lines))

    def reply(self, status: int, content_type: str, text: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *arguments: object) -> None:
        pass


@contextmanager
def running(server: ThreadingHTTPServer) -> Iterator[str]:
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def streamed(*events: dict[str, Any], done: bool = True) -> tuple[str, ...]:
    return (*(f"data: {json.dumps(each)}\n\n" for each in events), *(["data: [DONE]\n\n"] if done else []))


@pytest.fixture
def script() -> type[Script]:
    """A script of this test's own."""
    return type("TestScript", (Script,), {})


@pytest.fixture
def page_url(script: type[Script]) -> Iterator[str]:
    """Address of the chat page, whose requests the script answers."""
    with (
        running(ThreadingHTTPServer(("127.0.0.1", 0), script)) as server,
        running(make_server(f"{server}/v1/", "127.0.0.1", 0)) as url,
    ):
        yield url


@pytest.fixture
def page_without_server() -> Iterator[str]:
    with running(make_server("http://127.0.0.1:9/v1", "127.0.0.1", 0)) as url:
        yield url


def get(url: str) -> Any:
    with urlopen(url) as reply:
        return json.load(reply)


def post(url: str, body: dict[str, Any]) -> str:
    with urlopen(Request(f"{url}/v1/chat/completions", json.dumps(body).encode())) as reply:
        return str(reply.read().decode())


def test_the_facts_of_a_checkpoint(tmp_path: Path) -> None:
    assert checkpoint_facts(tmp_path / "missing") == {}
    for shard in (1, 2):
        (tmp_path / f"model-{shard}.safetensors").write_bytes(bytes(1000))
    assert checkpoint_facts(tmp_path) == {"bytes": 2000}, "of a model that is not converted"
    (tmp_path / "bwla_report.json").write_text('{"bits_per_weight": 1.16}')
    assert checkpoint_facts(tmp_path) == {"bytes": 2000, "bits_per_weight": 1.16}
    for damaged in ("", "[]", "{}", '{"bits_per_weight": null}'):
        (tmp_path / "bwla_report.json").write_text(damaged)
        assert checkpoint_facts(tmp_path) == {"bytes": 2000}


def test_a_converted_checkpoint_has_both_facts(example_bwla: Path) -> None:
    facts = checkpoint_facts(example_bwla)
    report = json.loads((example_bwla / "bwla_report.json").read_text())
    assert facts["bits_per_weight"] == report["bits_per_weight"]
    # The files have headers, and the report counts tensors.
    assert report["bytes_after"] < facts["bytes"] < 1.1 * report["bytes_after"]


def test_the_facts_are_those_of_the_folder_that_the_server_names(
    page_url: str, script: type[Script], tmp_path: Path
) -> None:
    assert get(f"{page_url}/checkpoint.json") == {}, "the server does not say"
    script.root = "someone/model"
    assert get(f"{page_url}/checkpoint.json") == {}, "not on this machine"
    script.root = str(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(bytes(10))
    assert get(f"{page_url}/checkpoint.json") == {"bytes": 10}


def test_requests_are_passed_on_and_replies_come_back_unchanged(page_url: str, script: type[Script]) -> None:
    assert get(f"{page_url}/v1/models")["data"][0]["id"] == "my-model"
    script.lines = streamed(*HELLO, USAGE)
    assert post(page_url, {"stream": True}) == "".join(script.lines)
    assert script.asked == {"path": "/v1/chat/completions", "stream": True}
    script.error = "no chat template"
    with pytest.raises(HTTPError, match="400") as refused:
        post(page_url, {})
    assert json.load(refused.value)["error"]["message"] == "no chat template"


def test_only_what_the_page_needs_is_passed_on(page_url: str) -> None:
    for path in ("/v1/completions", "/metrics", "/chat_page.py", "/../README.md"):
        with pytest.raises(HTTPError, match="404"):
            get(page_url + path)


def test_without_a_server_the_page_is_there_and_says_so(page_without_server: str) -> None:
    for path in ("/", "/chat.html?ask=x"):
        with urlopen(page_without_server + path) as reply:
            assert reply.read() == PAGE.read_bytes()
    assert get(f"{page_without_server}/checkpoint.json") == {}
    with pytest.raises(HTTPError, match="502") as refused:
        get(f"{page_without_server}/v1/models")
    assert "no server at http://127.0.0.1:9/v1" in json.load(refused.value)["error"]["message"]


def test_the_page_loads_nothing_from_elsewhere() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert not re.search(r"\bsrc=|@import|url\(", page)
    assert re.findall(r'href="([^"]*)"', page) == ["data:,"]


@pytest.fixture
def browse(tmp_path: Path) -> Callable[..., str]:
    """Open a page with parameters and return its text when nothing happens any more."""

    def open_page(address: str, **parameters: str) -> str:
        command = [
            str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}",
            "--virtual-time-budget=3000", "--dump-dom", f"{address}?{urlencode(parameters)}",
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
        body = done.stdout.partition("<body")[2].partition(">")[2].partition("<script>")[0]
        return " ".join(re.sub(r"<[^>]+>", " ", body).split())

    return open_page


@needs_browser
@pytest.mark.parametrize(
    ("seen", "says"),
    [
        ("{pieces: 20, tokens: 21}", "21 tokens, 10.0 tokens/s, first token after 0.50 s"),
        ("{pieces: 21}", "21 pieces, 10.0 pieces/s, first token after 0.50 s"),
        ("{pieces: 1, tokens: 1, last: 500}", "1 token, first token after 0.50 s"),
        ("{pieces: 1, tokens: 21, last: 500}", "21 tokens, first token after 0.50 s"),
    ],
    ids=["tokens", "pieces", "one", "all at once"],
)
def test_the_decoding_speed_is_that_from_the_first_token_to_the_last(
    seen: str, says: str, tmp_path: Path, browse: Callable[..., str]
) -> None:
    function = re.search(r"^function figures\(.*?^}$", PAGE.read_text(encoding="utf-8"), re.M | re.S)
    assert function
    times = "{sent: 0, first: 500, last: 2500}"
    page = tmp_path / "figures.html"
    page.write_text(
        f"<body><p></p><script>{function[0]}\ndocument.querySelector('p').textContent = "
        f"figures(Object.assign({times}, {seen}))</script></body>"
    )
    assert browse(page.as_uri()) == says


@needs_browser
def test_an_answer_is_shown_with_its_tokens_and_the_models_size(
    page_url: str, script: type[Script], tmp_path: Path, browse: Callable[..., str]
) -> None:
    (tmp_path / "model.safetensors").write_bytes(bytes(1_500_000))
    (tmp_path / "bwla_report.json").write_text('{"bits_per_weight": 1.163}')
    script.root, script.lines = str(tmp_path), streamed(*HELLO, USAGE)
    shown = browse(page_url, ask="How are you?", max_tokens="7")
    assert shown.startswith(
        "my-model 1.50 MB, 1.16 bits per quantized weight How are you? Good morning 3 tokens, "
    )
    assert "first token after" in shown
    assert script.asked["stream_options"] == {"include_usage": True}
    assert script.asked["max_tokens"] == 7
    assert script.asked["messages"] == [{"role": "user", "content": "How are you?"}]


@needs_browser
def test_a_server_that_counts_no_tokens(
    page_url: str, script: type[Script], browse: Callable[..., str]
) -> None:
    script.lines = streamed(*HELLO[:3], event("", "length"))
    shown = browse(page_url, ask="Hi")
    assert shown.startswith("my-model Hi Good morning 2 pieces, "), "nothing about an unknown size"
    assert "cut off at the limit of tokens" in shown
    assert "token/s" not in shown
    assert "tokens/s" not in shown


@needs_browser
@pytest.mark.parametrize(
    ("lines", "says"),
    [
        (streamed(*HELLO[:2], {"error": {"message": "the engine died"}}), "Good 1 piece, .* the engine died"),
        (streamed(*HELLO[:2], done=False), "Good 1 piece, .* broke off"),
        (streamed(event("", "stop")), "The answer is empty"),
        (("<html>\n", "data: {not JSON\n\n"), "JSON"),
    ],
    ids=["error", "broken off", "empty", "not JSON"],
)
def test_what_goes_wrong_in_an_answer_is_shown(
    page_url: str, script: type[Script], lines: tuple[str, ...], says: str, browse: Callable[..., str]
) -> None:
    script.lines = lines
    assert re.search(says, browse(page_url, ask="Hi"))


@needs_browser
def test_a_refused_request_is_shown(page_url: str, script: type[Script], browse: Callable[..., str]) -> None:
    script.error = "no chat template"
    assert "no chat template" in browse(page_url, ask="Hi")


@needs_browser
def test_a_server_that_is_not_up_or_refuses_the_page(
    page_without_server: str, page_url: str, browse: Callable[..., str]
) -> None:
    shown = browse(page_without_server, ask="Hi")
    assert "no server at http://127.0.0.1:9/v1" in shown
    assert "Trying again every 5 seconds" in shown
    assert "--allowed-origins" not in shown, "its requests are passed on"
    refused = browse(page_without_server, url=f"{page_url}/v1", ask="Hi")
    assert f"""--allowed-origins '["{page_without_server}"]'""" in refused
