"""The vLLM plugin: loads and serves BWLA checkpoints through vLLM's stock model classes."""


def register() -> None:
    """Entry point."""
