"""Benchmarks. Each folder is named after the package of ``arp_hub`` that it measures.

`accuracy`, `peers`, `effort` and `fuzz` measure the whole library, and `rows` holds what they share. Benchmark NAME
writes ``results/NAME.json``. ``models/`` holds the models of the accuracy table. Run a benchmark from the root of the
clone:

    python -m benchmarks.planning.latency list
"""
