"""The version of the installed distribution."""

from importlib import metadata


def server_version() -> str:
    """The version of `buddy-serve`, or "unknown" when run from a source tree that was never installed."""
    try:
        return metadata.version("buddy-serve")
    except metadata.PackageNotFoundError:
        return "unknown"
