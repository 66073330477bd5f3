"""Helpers that know nothing of models: the process's environment, secrets, files, torch."""
