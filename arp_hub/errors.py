"""The exception that arp_hub raises for every error that a user can correct."""

from ._utils.secrets import printable


class ArpHubError(ValueError):
    """Bad input. The message names the faulty value and says how to correct it.

    Names in a message may come from a stranger's file, so control characters are escaped and long messages shortened.
    """

    def __init__(self, message: object = "") -> None:
        text = printable(str(message))
        if len(text) > 1_900:  # the start names the fault, the end the way out
            text = f"{text[:1_500]} … {text[-400:]}"
        super().__init__(text)
