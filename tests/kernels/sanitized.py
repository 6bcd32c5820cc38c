"""Every kernel on random arguments with address and undefined-behaviour sanitizers; for a process of its own.

    python -m tests.kernels.sanitized COUNT FOLDER [OLD NEW]

With OLD and NEW, a change to the kernels' text: to see that the sanitizers see.

Numbers that torch allocates are watched too: the sanitizer takes over the allocator of the whole process.
"""

import sys

import torch
from nnturbo.kernels import loader

from tests.kernels import checks
from tests.kernels.host import SANITIZERS, HostKernels


def main(count, folder, old="", new=""):
    """Run them; the process dies at the first fault."""
    text = loader.source
    if old:
        loader.source = lambda *of: text(*of).replace(old, new)
    kernels = loader.launch = HostKernels(folder, SANITIZERS, threads=(4, 2))
    for name in checks.CHECKS:
        before = kernels.launches
        checks.run(name, round(count * checks.SHARE.get(name, 1)), torch.device("cpu"), seed=1)
        sys.stdout.write(f"{name}: {kernels.launches - before} launches\n")


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:])
