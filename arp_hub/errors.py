"""The one exception that arp_hub raises for anything a user can put right."""

from ._utils.secrets import printable

_HEAD, _TAIL = 1_500, 400
"""Characters kept of a longer message: the start names the thing, the end the way out."""


class ArpHubError(ValueError):
    """Bad input. The message names the thing, its value, and the way out.

    Names in a message may come from a stranger's file, so control characters are escaped and very long names cut.
    """

    def __init__(self, message: object = "") -> None:
        text = printable(str(message))
        if len(text) > _HEAD + _TAIL:
            text = f"{text[:_HEAD]} … {text[-_TAIL:]}"
        super().__init__(text)
