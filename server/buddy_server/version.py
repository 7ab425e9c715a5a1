"""The version of the installed distribution."""

from importlib import metadata


def server_version() -> str:
    """The version of `buddy-serve`, or "unknown" if run from a source tree that is not installed."""
    try:
        return metadata.version("buddy-serve")
    except metadata.PackageNotFoundError:
        return "unknown"
