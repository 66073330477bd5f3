"""The commands of ``arp-hub``, one module each. A module imports heavy packages when its command runs."""
