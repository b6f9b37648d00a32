"""The hub of models, tried once: nobody waits for retries where there is no network."""

from __future__ import annotations

import contextlib
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator

__all__ = ["HUB_SECONDS", "hub_tried_once"]

HUB_SECONDS = 5.0


def _hub_trouble(seconds: float) -> str | None:
    """Try the hub once -> why it cannot be reached, or None. Looking up its name has no time limit of its own."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    found: list[str | None] = [f"the hub did not answer within {seconds:g} seconds"]

    def knock() -> None:
        request = urllib.request.Request(constants.ENDPOINT, method="HEAD")
        try:
            with urllib.request.urlopen(request, timeout=seconds):
                found[0] = None
        except urllib.error.HTTPError:
            found[0] = None  # somebody is there
        except (OSError, ValueError) as error:
            found[0] = f"the hub cannot be reached: {getattr(error, 'reason', error)}"

    knocking = threading.Thread(target=knock, daemon=True)
    knocking.start()
    knocking.join(seconds)
    return found[0]


@contextlib.contextmanager
def hub_tried_once(seconds: float = HUB_SECONDS) -> Iterator[str | None]:
    """Give why the hub cannot be reached, or None; while it cannot, only this machine's cache is read.

    Args:
        seconds: how long the hub may take to answer.
    """
    from huggingface_hub import constants

    trouble, before = _hub_trouble(seconds), constants.HF_HUB_OFFLINE
    try:
        constants.HF_HUB_OFFLINE = before or trouble is not None
        yield trouble
    finally:
        constants.HF_HUB_OFFLINE = before
