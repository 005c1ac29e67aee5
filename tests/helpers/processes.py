"""Python commands in processes forked from one that has imported what training needs.

Starting an interpreter and importing torch and transformers takes longer than what such a test
does.
"""

import multiprocessing
import os
import runpy
import sys

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["dspark.training.run", "torch.distributed.tensor"])


def start(environment, arguments, log):
    """Start `python ARGUMENTS`, a script or `-m` and a module, on one thread.

    Args:
        environment: what is added to this process's.
        arguments: the words behind `python`.
        log: the file for its output and errors.
    """
    words = [str(word) for word in arguments]
    process = _context.Process(target=_run, args=(dict(environment), words, str(log)))
    process.start()
    return process


def _run(environment, words, log):
    os.environ.update(environment)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    import torch

    torch.set_num_threads(1)
    if words[0] == "-m":
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = words
        runpy.run_path(words[0], run_name="__main__")
