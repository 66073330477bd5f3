"""The one exception that arp_hub raises for anything a user can put right."""

from ._utils.secrets import printable


class ArpHubError(ValueError):
    """Bad input. The message names the thing, its value, and the way out.

    Names in a message may come from a stranger's file, so control characters are escaped and very long names cut.
    """

    def __init__(self, message: object = "") -> None:
        text = printable(str(message))
        if len(text) > 1_900:  # the start names the thing, the end the way out
            text = f"{text[:1_500]} … {text[-400:]}"
        super().__init__(text)
