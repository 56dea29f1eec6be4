"""The command line, which kills itself where FIDUCIAL_TEST_KILL says.

attempts:find-1:40    after the 40th line of that file, with half of the 41st written
lines:make-1/groups:2     after the second line
checkpoint:2          while the second checkpoint is being written
"""

import os
import signal
import sys

from fiducial.app.cli.main import main
from fiducial.core.store import Lines


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def kill_at_append(where, count, torn):
    append, seen = Lines.append, [0]

    def appended(self, record):
        if where in str(self.path):
            seen[0] += 1
            if seen[0] > count:
                if torn:
                    with open(self.path, "ab") as file:
                        file.write(record.line().encode()[:57])
                die()
        append(self, record)

    Lines.append = appended


def kill_at_checkpoint(count):
    import safetensors.torch as st

    save, seen = st.save_file, [0]

    def saved(tensors, path, *args, **kwargs):
        if "optimizer" in str(path):
            seen[0] += 1
            if seen[0] == count:
                die()
        save(tensors, path, *args, **kwargs)

    st.save_file = saved


def prepare(asked):
    kind, _, rest = asked.partition(":")
    if kind in ("attempts", "lines"):
        where, _, count = rest.rpartition(":")
        kill_at_append(where, int(count), kind == "attempts")
    elif kind == "checkpoint":
        kill_at_checkpoint(int(rest))


if __name__ == "__main__":
    prepare(os.environ.get("FIDUCIAL_TEST_KILL", ""))
    sys.exit(main())
