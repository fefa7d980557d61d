"""Which vLLM releases the plugin is for, and whether the installed one has everything that it uses."""

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.version import Version
from paths import ROOT

from bwla_vllm.compat.releases import (
    NEWEST,
    OLDEST,
    TESTED_TRITONS,
    experts_problem,
    outside_tested_range,
    untested_triton,
)

LINEAR = "vllm/model_executor/layers/linear.py"
PARAMETER = "vllm/model_executor/parameter.py"
BASE = "vllm/model_executor/layers/quantization/base_config.py"


@pytest.fixture(scope="module")
def hooks() -> Any:
    """scripts/check_vllm_hooks.py as a module."""
    from scripts import check_vllm_hooks

    return check_vllm_hooks


@pytest.mark.parametrize("release", ["0.26.0", "0.27.1", "0.32.0+cpu", "0.33.2", "0.33.0rc1"])
def test_tested_releases_are_served_without_a_word(release: str) -> None:
    assert outside_tested_range(release) is None


@pytest.mark.parametrize("release", ["0.25.1", "0.34.0", "1.0.0", "dev"])
def test_other_releases_are_named(release: str) -> None:
    said = outside_tested_range(release)
    assert said is not None
    assert said.startswith(f"vLLM {release} is outside the releases")
    assert "0.26 to 0.33" in said


def test_the_extra_installs_tested_releases() -> None:
    import tomllib

    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    (cuda,) = (Requirement(text) for text in extras["cuda"])
    wanted = Requirement(f"vllm>={OLDEST},<0.{Version(NEWEST).minor + 1}")
    assert cuda.specifier == wanted.specifier
    for text in extras["cpu"]:
        (pin,) = Requirement(text).specifier
        assert outside_tested_range(pin.version) is None


def test_the_log_has_one_line_for_an_untested_release(
    qwen3: Any, monkeypatch: pytest.MonkeyPatch, plugin_log: pytest.LogCaptureFixture
) -> None:
    import json

    import vllm

    from bwla_vllm.config import BWLAConfig

    monkeypatch.setattr(vllm, "__version__", "0.99.0")
    config = json.loads((qwen3.folder / "config.json").read_text())["quantization_config"]
    BWLAConfig.from_config(config).maybe_update_config(str(qwen3.folder))
    assert [r.getMessage() for r in plugin_log.records if "0.99.0" in r.getMessage()] == [
        outside_tested_range("0.99.0")
    ]


@pytest.mark.parametrize("release", [*TESTED_TRITONS, "3.7.0", "3.9.0+git4", "3.6.0.post1"])
def test_tritons_between_the_checked_ones_are_used_without_a_word(release: str) -> None:
    assert untested_triton(release) is None


@pytest.mark.parametrize("release", ["3.5.1", "3.9.1", "4.0.0", "built here"])
def test_other_tritons_are_named(release: str) -> None:
    said = untested_triton(release)
    assert said is not None
    assert said.startswith(f"Triton {release} is outside the releases")
    assert "3.6.0 to 3.9.0" in said


@pytest.mark.usefixtures("vllm_config", "on_rank")
def test_the_log_has_one_line_for_an_untested_triton(
    monkeypatch: pytest.MonkeyPatch, plugin_log: pytest.LogCaptureFixture
) -> None:
    """Where layers run on it: however many they are; and none where another backend was chosen."""
    import triton
    from bwla_kernels.format.schema import BWLAFormat, activation_args
    from bwla_kernels.ops import backends
    from vllm.model_executor.layers.linear import ReplicatedLinear

    from bwla_vllm import fusion, linear
    from bwla_vllm.config import BWLAConfig

    monkeypatch.setattr(triton, "__version__", "2.99.0")
    monkeypatch.setattr(fusion, "install", lambda config: None)
    config = BWLAConfig(
        BWLAFormat(input_activations=activation_args(6), rank=2, rotation={"c_proj": (1, 8, 8)})
    )

    def lines_of_layers(backend: str) -> list[str]:
        (chosen,) = (one for one in backends() if one.name == backend)
        monkeypatch.setattr(linear, "select_backend", lambda *_: (chosen, "as the test wants"))
        for i in range(2):
            ReplicatedLinear(64, 48, bias=False, quant_config=config, prefix=f"layers.{i}.c_proj")
        return [r.getMessage() for r in plugin_log.records if "2.99.0" in r.getMessage()]

    assert lines_of_layers("torch") == []
    assert lines_of_layers("triton") == [untested_triton("2.99.0")]


def installed_vllm() -> Path:
    spec = importlib.util.find_spec("vllm")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parents[1]


def test_the_installed_release_has_every_hook(hooks: ModuleType) -> None:
    assert hooks.problems(hooks.Library(hooks.folder_reader(installed_vllm()))) == []


@pytest.mark.parametrize(
    ("file", "old", "new", "said"),
    [
        (LINEAR, "class ReplicatedLinear(", "class Renamed(", "ReplicatedLinear: does not exist"),
        ("vllm/model_executor/utils.py", "def set_weight_attrs(", "def set_attrs(", "set_weight_attrs: does not exist"),
        (PARAMETER, "packed_factor: ", "factor: ", "PackedvLLMParameter takes no packed_factor"),
        (LINEAR, "num_heads=", "heads=", "has no call of load_qkv_weight"),
        (
            BASE,
            "    @abstractmethod\n    def get_name(",
            "    @abstractmethod\n    def invented(self): ...\n    @abstractmethod\n    def get_name(",
            "BWLAConfig(QuantizationConfig): does not define invented, which is abstract",
        ),
        (
            BASE,
            "self, layer: torch.nn.Module, prefix: str",
            "self, layer: torch.nn.Module, prefix: str, role: str",
            "BWLAConfig(QuantizationConfig).get_quant_method: callers may pass role",
        ),
    ],
)  # fmt: skip
def test_a_changed_release_is_found_out(file: str, old: str, new: str, said: str, hooks: ModuleType) -> None:
    """The installed release with one place changed."""
    read = hooks.folder_reader(installed_vllm())

    def changed(path: str) -> str | None:
        text = read(path)
        if path != file:
            return text
        assert old in text
        return text.replace(old, new)

    found = hooks.problems(hooks.Library(changed))
    assert any(said in problem for problem in found), found


@pytest.mark.parametrize("release", ["0.32.0", "0.33.1+cpu", "1.0", "dev"])
def test_newer_releases_load_one_bit_experts(release: str) -> None:
    assert experts_problem(release) is None


def test_older_releases_are_refused_for_one_bit_experts() -> None:
    assert experts_problem("0.31.2") == (
        "one-bit experts need vLLM 0.32 or newer, found 0.31.2: install it, or convert the model again with "
        "--ignore experts"
    )


def test_the_newest_release_is_that_of_the_highest_number() -> None:
    from scripts.try_vllm_versions import release_of

    urls = {"0.9.2": "", "0.32.0": "", "0.27.1": ""}
    assert release_of("newest", urls) == "0.32.0"
    assert release_of("0.27.0", urls) == "0.27.0"


def test_each_release_is_tried_with_the_torch_that_it_requires() -> None:
    from scripts.setup_env import SetupError
    from scripts.try_vllm_versions import required_torch

    metadata = "Requires-Dist: torchvision\nRequires-Dist: torch==2.14.0+cpu; platform_machine == 'x86_64'\n"
    assert required_torch({"*.dist-info/METADATA": metadata}.get) == "2.14.0"
    with pytest.raises(SetupError, match="requires one version of torch"):
        required_torch({"*.dist-info/METADATA": "Requires-Dist: torch>=2\n"}.get)
