"""Fixtures of the tests of runs: tiny runs that write to disk fast."""

from __future__ import annotations

import pytest
from tiny_run import config

from arp_hub.errors import ArpHubError
from arp_hub.training import run


@pytest.fixture(scope="module")
def fast_writes():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ARP_HUB_PICTURES", "0")
        patch.setattr("os.fsync", lambda handle: None)  # saves the time that a disk takes
        yield


@pytest.fixture(scope="module")
def stopped(tmp_path_factory, fast_writes):
    """A run that stops in its compress phase, because a weight becomes NaN at the first step."""
    folder = tmp_path_factory.mktemp("stopped")
    with pytest.raises(ArpHubError, match="last good checkpoint is '.*compress-00000000'"):
        run(config(folder, dense_lr=1e-3, lr=3e38))
    return folder
