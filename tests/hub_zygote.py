"""A process that has imported everything and forks for each job: a fresh client in milliseconds.

Reads jobs as JSON lines from stdin: ``code``, its ``names``, ``env``, and files for ``out`` and ``err``. Answers with
the child's process id at once, and with its exit code at its end.
"""

import json
import os
import signal
import sys
import traceback

import accelerate  # noqa: F401 - imported once, before the forks
import datasets  # noqa: F401 - imported once, before the forks
import huggingface_hub  # noqa: F401 - imported once, before the forks
import matplotlib.pyplot  # noqa: F401 - imported once, before the forks
import sklearn.datasets  # noqa: F401 - imported once, before the forks
import timm  # noqa: F401 - imported once, before the forks
import torch

import arp_hub  # noqa: F401 - imported once, before the forks
import arp_hub.hub.push  # noqa: F401 - imported once, before the forks
import arp_hub.training  # noqa: F401 - imported once, before the forks
import arp_hub_cli.app  # noqa: F401 - imported once, before the forks

torch.set_num_threads(1)


def work(job: dict) -> int:
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(job[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), number)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # shells make background jobs ignore it
    os.environ.update(job["env"])
    sys.argv = ["arp-hub"]
    try:
        exec(compile(job["code"], "<test>", "exec"), {"__name__": "__main__", **job["names"]})
        return 0
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1


if __name__ == "__main__":
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            code = work(json.loads(line))
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        print(pid, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
