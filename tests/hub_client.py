"""The official client and timm against the loopback Hub, in new processes with their own ``HF_HOME``."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from helpers import search_path

ROOT = Path(__file__).parents[1]

QUICK = """
import time
time.sleep = lambda seconds: None
"""
"""Code that runs before a job: the client does not wait between attempts. Their number is unchanged."""


@dataclass(frozen=True)
class Done:
    """Output and exit code of a job."""

    code: int
    out: str
    err: str

    @property
    def last_line(self) -> str:
        return self.err.strip().splitlines()[-1]


def environment(home: Path, endpoint: str, token: str | None) -> dict[str, str]:
    """The environment of a fresh client: its own home, the loopback Hub, no settings of the machine."""
    plain = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    ours = {"HF_HOME": str(home), "HF_ENDPOINT": endpoint, "HF_HUB_DISABLE_XET": "1", "OMP_NUM_THREADS": "1"}
    return {**plain, **ours, "PYTHONPATH": search_path(ROOT), **({"HF_TOKEN": token} if token else {})}


class Client:
    """Runs code in a forked process in which everything is imported."""

    def __init__(self, home: Path, endpoint: str) -> None:
        self.files = (home / "out", home / "err")
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("hub_zygote.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment(home, endpoint, None),
            text=True,
        )

    def close(self) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait(60)

    def run(
        self,
        code: str,
        *,
        token: str | None,
        interrupt: Callable[[], None] | None = None,
        by: int = signal.SIGINT,
        **names: Any,
    ) -> Done:
        """Run code with the given names; send the signal ``by`` once ``interrupt`` returns."""
        assert self.process.stdin and self.process.stdout
        out, err = self.files
        plain = {key: str(value) if isinstance(value, Path) else value for key, value in names.items()}
        job = {"code": code, "names": plain, "env": {"HF_TOKEN": token or ""}, "out": str(out), "err": str(err)}
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        pid = int(self.process.stdout.readline())
        if interrupt:
            interrupt()
            os.kill(pid, by)
        ended = int(self.process.stdout.readline())
        return Done(ended, out.read_text(), err.read_text())

    def recipe(self, name: str, *words: object, token: str | None = None, before: str = "", **options: Any) -> Done:
        """Run a recipe as a user would."""
        code = f"{before}\nimport runpy, sys\nsys.argv = [path, *words]\nrunpy.run_path(path, run_name='__main__')"
        path = ROOT / "recipes" / name
        return self.run(code, token=token, path=path, words=[str(word) for word in words], **options)

    def arp_hub(self, *words: object, token: str | None, before: str = QUICK, **options: Any) -> Done:
        """Run the command ``arp-hub``."""
        code = f"{before}\nimport sys\nfrom arp_hub_cli.app import app\nsys.argv = ['arp-hub', *words]\napp()"
        return self.run(code, token=token, words=[str(word) for word in words], **options)
