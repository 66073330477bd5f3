"""The command ``arp-hub``."""
