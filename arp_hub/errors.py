"""The one exception that arp_hub raises for anything a user can put right."""


class ArpHubError(ValueError):
    """Bad input. The message names the thing, its value, and the way out."""
