"""Convert the example model, serve it with vLLM, request completions, and measure the perplexity.

`make demo` runs this in the project's environment. The exit status is 1 if a step fails.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.common.server import HEALTH_SECONDS, Server, serve

ROOT = Path(__file__).resolve().parent.parent
EXAMPLE = ROOT / "examples" / "model"
HELD_OUT = ROOT / "examples" / "text" / "heldout.txt"
CALIBRATION = ROOT / "examples" / "text" / "calibration.txt"
RECIPE = ["--recipe", "fast", "--calibration", str(CALIBRATION)]
RECIPE += ["--num-calibration-samples", "64", "--max-seq-length", "256"]
"""Options for bwla-convert if the command line gives none."""

PROMPT = "The old man looked at the sea and"


class DemoError(Exception):
    """Raised if a step fails or gives a wrong result."""


def say(step: str) -> None:
    """Print the heading of a step."""
    print(f"\n== {step}", flush=True)


def convert(model: Path, out: Path, extra: list[str]) -> dict[str, float]:
    """Run bwla-convert and return its report."""
    command = [
        str(Path(sys.executable).with_name("bwla-convert")),
        str(model),
        str(out),
        "--overwrite",
        *extra,
    ]
    print("$", " ".join(command), flush=True)
    if subprocess.run(command, check=False).returncode:
        raise DemoError("bwla-convert failed, see above")
    report: dict[str, float] = json.loads((out / "bwla_report.json").read_text())
    return report


def talk(server: Server) -> None:
    """Request a completion, a streamed one and one with logprobs from the openai client; they must agree."""
    from openai import OpenAI

    client = OpenAI(base_url=server.url, api_key="none")

    def ask(**more: object) -> object:
        return client.completions.create(
            model=server.model, prompt=PROMPT, max_tokens=48, temperature=0, **more
        )

    text = ask().choices[0].text  # type: ignore[attr-defined]
    print(f"completion: {PROMPT}{text}")
    print(f"streamed:   {PROMPT}", end="")
    pieces = []
    for event in ask(stream=True):  # type: ignore[attr-defined]
        pieces.append(event.choices[0].text)
        print(pieces[-1], end="", flush=True)
    print()
    logprobs = ask(logprobs=1).choices[0].logprobs  # type: ignore[attr-defined]
    shown = [
        f"{token!r} {value:.2f}"
        for token, value in zip(logprobs.tokens, logprobs.token_logprobs, strict=True)
    ]
    print("logprobs:  ", ", ".join(shown[:8]), "...")
    if not text.strip():
        raise DemoError("the completion is empty")
    if "".join(pieces) != text or "".join(logprobs.tokens) != text:
        raise DemoError(
            "expected the same text from all three requests at temperature 0, found different ones"
        )
    if not all(value <= 0 for value in logprobs.token_logprobs):
        raise DemoError(f"expected finite log probabilities of at most 0, found {logprobs.token_logprobs}")


def main() -> int:
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=EXAMPLE, help="model to convert (examples/model)")
    parser.add_argument(
        "--out",
        type=Path,
        default=ROOT / ".demo" / "books-bwla",
        help="folder for the checkpoint (.demo/books-bwla)",
    )
    parser.add_argument("--text", type=Path, default=HELD_OUT, help="held-out text for the perplexity")
    parser.add_argument(
        "--windows", type=int, default=48, help="number of 512-token windows to evaluate (48)"
    )
    parser.add_argument("--compiled", action="store_true", help="serve with torch.compile (slower to start)")
    parser.add_argument(
        "--start-seconds",
        type=float,
        default=HEALTH_SECONDS,
        help=f"seconds that the server may take to start ({HEALTH_SECONDS})",
    )
    arguments, convert_arguments = parser.parse_known_args()
    started = time.monotonic()
    out = arguments.out.resolve()
    out.parent.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    try:
        say("convert")
        report = convert(arguments.model, out, convert_arguments or RECIPE)
        say("serve")
        flags = ["--quantization", "bwla", "--max-model-len", "512"]
        flags += [] if arguments.compiled else ["--enforce-eager"]
        print("$ vllm serve", out, *flags, flush=True)
        log = out.parent / "server.log"
        with serve(out, log, flags, health_seconds=arguments.start_seconds) as server:
            print(f"healthy at {server.url} after {time.monotonic() - started:.0f} s")
            say("talk")
            talk(server)
        say("measure")
        from bwla_converter.evaluation.perplexity import compare

        result = compare(arguments.model, out, arguments.text, window=512, limit=arguments.windows)
        print(f"held-out text: {result}")
    except Exception as error:
        print(f"demo: FAILED: {error}", file=sys.stderr)
        return 1
    print(
        f"bits per quantized weight, everything counted: {report['bits_per_weight']:.3f}; "
        f"bytes {report['bytes_before']:,} -> {report['bytes_after']:,}"
    )
    print(
        f"demo: ok - {result}, {report['bits_per_weight']:.3f} bits per weight, "
        f"{time.monotonic() - started:.0f} seconds"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
