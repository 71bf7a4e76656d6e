"""What can go wrong with weights. Every message is one line: the cause, the value, the remedy."""

from __future__ import annotations


class WeightsError(ValueError):
    """A folder of weights that cannot be read, written or trusted; names the file and the tensor."""


class HubError(WeightsError):
    """A model that cannot be found, fetched or removed."""


class NotFoundError(HubError):
    """No such model here; the message says which command would fetch it, or which names are near."""


class PullError(HubError):
    """A download that was refused or did not end well; nothing incomplete is left looking complete."""
