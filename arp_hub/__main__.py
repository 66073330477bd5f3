"""``python -m arp_hub`` is ``arp-hub``."""

from arp_hub_cli.app import app

app(prog_name="python -m arp_hub")
