"""The command ``arp-hub``, outside `arp_hub`, because that imports torch, which help does not need."""
