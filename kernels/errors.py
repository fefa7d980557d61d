"""Exceptions. Each message is one sentence: where, what was expected, what was found, what to do."""


class BWLAError(ValueError):
    """Base class of the errors that BWLA raises; the message is meant for the user."""


class FormatError(BWLAError):
    """A stored layer, a config or a checkpoint folder does not follow the BWLA format."""


class SourceError(BWLAError):
    """A source checkpoint cannot be converted."""


class BackendError(BWLAError):
    """No backend, or not the requested one, can run a layer."""
