"""The command ``arp-hub``, outside of `arp_hub` because importing that imports torch, which help does without."""
