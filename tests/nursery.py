"""One process that has imported everything once, and forks a child for each job; children can be killed at chosen places.

python nursery.py FILE-OR-MODULE...

imports the given, calls their `warm()` where they have one, says "ready", and takes a job a line:

{"call": "FILE-OR-MODULE:FUNCTION", "with": [...], "die_at": [...], "folder": FOLDER, "environment": {...}}

The function is called in a child, in that folder; what it returns is answered as {"value": ...}, and then how the child ended as
{"status": ...}, a signal as its negative number.

A child with `die_at` kills itself with SIGKILL at the last of those regular expressions, each looked for from where the one before was
found, in the events "update" (an optimizer has moved weights), "tensors PATH" (before a file of tensors is written), "mkdir PATH", "open
PATH", "rename PATH", "rmtree PATH" (before it is done). With "torn" as the last of them the file of the event is there then, and empty.
"""

import gc
import importlib
import json
import os
import re
import signal
import sys
from importlib.util import module_from_spec, spec_from_file_location

import numpy
import safetensors.torch
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

EVENTS = {"os.mkdir": "mkdir", "open": "open", "os.rename": "rename", "shutil.rmtree": "rmtree"}
"""What Python's audit tells of files, and what it is called here."""
STUCK = 300
"""Seconds after which a child that hangs is ended."""


def imported(name):
    """A module, by name or by the path of its file."""
    if not name.endswith(".py"):
        return importlib.import_module(name)
    if name not in sys.modules:
        spec = spec_from_file_location(name, name)
        sys.modules[name] = module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


def die_at(places):
    """Kills this process at the last of these places."""
    left = [place for place in places if place != "torn"]

    def seen(kind, path=""):
        if not left or not re.search(left[0], f"{kind} {path}"):
            return
        if len(left) == 1 and places[-1] == "torn":
            os.mknod(path)
        if len(left) == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        del left[0]

    def audited(event, args):
        if event in EVENTS and isinstance(args[0], str | os.PathLike):
            seen(EVENTS[event], os.fspath(args[0]))

    save = safetensors.torch.save_file

    def saved(tensors, path, *args, **kwargs):
        seen("tensors", path)
        save(tensors, path, *args, **kwargs)

    safetensors.torch.save_file = saved
    register_optimizer_step_post_hook(lambda *_: seen("update"))
    sys.addaudithook(audited)


def child(job, answers):
    """Does a job; what it says goes to stderr."""
    signal.alarm(STUCK)
    os.dup2(2, 1)
    os.environ.update(job.get("environment", {}))
    os.chdir(job.get("folder", "."))
    torch.set_num_threads(torch.get_num_threads())  # torch makes its pool anew after a fork, which two threads must not find half done
    # forked children would draw alike where they were not given a seed
    torch.manual_seed(os.getpid())
    numpy.random.seed(os.getpid())
    die_at(job.get("die_at", ()))
    where, _, name = job["call"].rpartition(":")
    value = getattr(imported(where), name)(*job["with"])
    sys.stdout.flush()
    os.write(answers, (json.dumps({"value": value}) + "\n").encode())


def main(*names):
    for name in names:
        getattr(imported(name), "warm", lambda: None)()
    gc.freeze()  # a collection in a child would touch, and so copy, every object there is
    answers = os.dup(1)
    os.write(answers, b'"ready"\n')
    for line in sys.stdin:
        pid = os.fork()
        if not pid:
            status = 1
            try:
                child(json.loads(line), answers)
                status = 0
            finally:
                sys.stderr.flush()
                if status:
                    sys.excepthook(*sys.exc_info())
                os._exit(status)
        _, status = os.waitpid(pid, 0)
        os.write(answers, (json.dumps({"status": os.waitstatus_to_exitcode(status)}) + "\n").encode())


if __name__ == "__main__":
    main(*sys.argv[1:])
