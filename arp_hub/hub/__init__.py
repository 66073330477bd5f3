"""Saved folders, their cards, and the Hub."""
