"""Help and version come at once."""

import resource
import subprocess
import sys
from importlib.metadata import version

import pytest

from arp_hub import schemes, timing
from arp_hub.effort import EFFORTS
from arp_hub_cli import options


def cpu_seconds(code: str) -> tuple[float, str]:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, done.stdout


COMMANDS = [["--help"], ["--version"], *([name, "--help"] for name in ("plan", "compress", "bench", "push", "doctor"))]


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_help_and_version_import_nothing_heavy(words):
    code = (
        f"import sys; sys.argv = ['arp-hub', *{words}]\n"
        "from arp_hub_cli.app import app\n"
        "try:\n    app()\nexcept SystemExit as end:\n    assert not end.code\n"
        "print({'torch', 'timm', 'numpy', 'huggingface_hub', 'arp_hub'} & set(sys.modules))"
    )
    seconds, out = cpu_seconds(code)
    assert out.endswith("set()\n")
    assert seconds < 1
    assert version("arp-hub") in out or "Usage" in out


def test_choices_named_in_help_are_those_there_are():
    assert options.SCHEMES == tuple(schemes.SCHEMES)
    assert options.DTYPES == tuple(timing.DTYPES)
    assert options.EFFORTS == tuple(EFFORTS)
