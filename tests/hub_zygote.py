"""A process that has imported everything and forks for each job: a fresh client in milliseconds.

Reads lists of jobs as JSON lines from stdin: ``code``, ``names`` it sees, ``env``, and files for ``out`` and ``err``.
The jobs of a list run side by side. Answers with their process ids at once, and with their exit codes at the end.
"""

import gc
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
gc.freeze()  # children need not walk through what is imported here


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
        pids = []
        for job in json.loads(line):
            pids.append(os.fork())
            if pids[-1] == 0:
                code = work(job)
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        print(json.dumps(pids), flush=True)
        print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]), flush=True)
