"""What recipes share whose layers are independent of each other and need no calibration text."""

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

from bwla_converter.calibration.activations import StoredStates
from torch import Tensor


class StatelessRecipe:
    """Base class of recipes that see one input group at a time."""

    needs_calibration: ClassVar[bool] = False
    models: ClassVar[int] = 0

    def __init__(self) -> None:
        self.calibration: dict[str, object] = {}
        self.layer_traces: dict[str, dict[str, list[float]]] = {}

    def begin_layer(self, index: int, tensors: Mapping[str, Tensor]) -> None:
        """Do nothing: groups are independent of each other."""

    def end_layer(self) -> Mapping[str, Tensor]:
        """Return no further changes."""
        return {}

    def state(self) -> Mapping[str, Tensor | StoredStates]:
        """Return an empty state: layers are independent of each other."""
        return {}

    def restore(self, state: Mapping[str, Tensor | StoredStates]) -> None:
        """Do nothing: there is no state."""

    def finish(self, folder: Path) -> Mapping[str, Tensor]:
        """Return no further changes."""
        return {}
