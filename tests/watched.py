"""Run a script, and report the threads of the process group that are left at its end.

None may be left: a thread that frees a tensor after Python has ended aborts the process (SIGABRT).

    python watched.py SCRIPT [OPTION ...]
"""

import atexit
import os
import sys
from pathlib import Path

NONE_LEFT = "threads of Gloo left: []"


def report() -> None:
    names = [task.read_text().strip() for task in Path("/proc/self/task").glob("*/comm")]
    left = NONE_LEFT.replace("[]", str([name for name in names if "gloo" in name]))
    os.write(2, f"{left}\n".encode())


if __name__ == "__main__":
    atexit.register(report)
    sys.argv = sys.argv[1:]
    __file__ = sys.argv[0]
    sys.path[0] = str(Path(__file__).parent)
    exec(compile(Path(__file__).read_text(), __file__, "exec"))  # at module level, as with `python SCRIPT`
