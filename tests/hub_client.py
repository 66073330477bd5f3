"""The official client and timm against the loopback Hub, in new processes with their own ``HF_HOME``."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping
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


def on_two(environment: Mapping[str, str] | None = None) -> list[str]:
    """Code that gives each of two processes the environment of ``torchrun``, and more of it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    place |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"} | dict(environment or {})
    return [f"import os\nos.environ.update({place | {'RANK': rank, 'LOCAL_RANK': rank}})" for rank in "01"]


class Client:
    """Runs code in a forked process in which everything is imported."""

    def __init__(self, home: Path, endpoint: str) -> None:
        self.home = home
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

    def run(self, code: str, *, token: str | None, **options: Any) -> Done:
        """Run code with the given names; once ``interrupt`` returns, the process gets the signal ``by``."""
        (done,) = self.side_by_side([code], token=token, **options)
        return done

    def side_by_side(
        self,
        codes: list[str],
        *,
        token: str | None,
        interrupt: Callable[[], None] | None = None,
        by: int = signal.SIGINT,
        **names: Any,
    ) -> list[Done]:
        """Run several pieces of code at the same time, each in its own process; only the first is interrupted."""
        assert self.process.stdin and self.process.stdout
        plain = {key: str(value) if isinstance(value, Path) else value for key, value in names.items()}
        env = {"HF_TOKEN": token or "", "ARP_HUB_PICTURES": os.environ["ARP_HUB_PICTURES"]}
        files = [(self.home / f"out{number}", self.home / f"err{number}") for number in range(len(codes))]
        jobs = [
            {"code": code, "names": plain, "env": env, "out": str(out), "err": str(err)}
            for code, (out, err) in zip(codes, files, strict=True)
        ]
        self.process.stdin.write(json.dumps(jobs) + "\n")
        self.process.stdin.flush()
        pids = json.loads(self.process.stdout.readline())
        if interrupt:
            interrupt()
            os.kill(pids[0], by)
        ended = json.loads(self.process.stdout.readline())
        return [Done(code, out.read_text(), err.read_text()) for code, (out, err) in zip(ended, files, strict=True)]

    def program(self, path: Path, *words: object) -> Done:
        """Run a Python file with words on its command line."""
        code = "import runpy, sys\nsys.argv = [path, *words]\nrunpy.run_path(path, run_name='__main__')"
        return self.run(code, token=None, path=path, words=[str(word) for word in words])

    def recipe(self, name: str, *words: object, token: str | None = None, before: str = "", **options: Any) -> Done:
        """Run a recipe as a user would."""
        (done,) = self._recipe(name, *words, token=token, befores=[before], **options)
        return done

    def recipe_on_two(
        self,
        name: str,
        *words: object,
        token: str | None = None,
        environment: Mapping[str, str] | None = None,
        before: str = "",
    ) -> list[Done]:
        """Run a recipe on two processes, with the environment that ``torchrun`` gives them, and more of it."""
        return self._recipe(name, *words, token=token, befores=[f"{ranks}\n{before}" for ranks in on_two(environment)])

    def arp_hub_on_two(self, *words: object, environment: Mapping[str, str] | None = None) -> list[Done]:
        """Run the command ``arp-hub`` on two processes."""
        code = "import sys\nfrom arp_hub_cli.app import app\nsys.argv = ['arp-hub', *words]\napp()"
        codes = [f"{ranks}\n{code}" for ranks in on_two(environment)]
        return self.side_by_side(codes, token=None, words=[str(word) for word in words])

    def _recipe(self, name: str, *words: object, token: str | None, befores: list[str], **options: Any) -> list[Done]:
        code = "import runpy, sys\nsys.argv = [path, *words]\nrunpy.run_path(path, run_name='__main__')"
        path, given = ROOT / "recipes" / name, [str(word) for word in words]
        codes = [f"{before}\n{code}" for before in befores]
        return self.side_by_side(codes, token=token, path=path, words=given, **options)

    def arp_hub(self, *words: object, token: str | None, before: str = QUICK, **options: Any) -> Done:
        """Run the command ``arp-hub``."""
        code = f"{before}\nimport sys\nfrom arp_hub_cli.app import app\nsys.argv = ['arp-hub', *words]\napp()"
        return self.run(code, token=token, words=[str(word) for word in words], **options)
