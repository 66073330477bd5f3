"""Benchmarks, in the order of the package: a folder measures the part of ``arp_hub`` whose name it has.

At the top are `accuracy`, `peers`, `effort` and `fuzz`, which measure the whole, and `rows`, which all share. The
benchmark NAME writes ``results/NAME.json``; ``models/`` keeps the models of the accuracy table. Run a benchmark from
the root of the clone:

    python -m benchmarks.planning.latency list
"""
