"""Helpers for the environment, secrets, files and torch, independent of models."""
