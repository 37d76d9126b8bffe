"""Shared by all tests: the repository root on sys.path, one thread, no network, no GPU unless asked
for."""
import os
import signal
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import pytest  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from torch.overrides import TorchFunctionMode  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_leaves  # noqa: E402

torch.set_num_threads(1)


class HostReads(TorchFunctionMode):
    """`with HostReads() as reads:` collects in reads.found the names of the calls that need a
    tensor's values in Python. With the tensor on a GPU each would make the host wait for all that
    was launched before; which device it is matters to no test."""
    NAMES = {"item", "tolist", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__",
             "nonzero", "equal",
             "masked_select", "unique"}

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_function__(self, call, types, args=(), kwargs=None):
        by_mask = call.__name__ in ("__getitem__", "__setitem__") and any(
            isinstance(index, torch.Tensor) and index.dtype == torch.bool
            for index in (args[1] if isinstance(args[1], tuple) else (args[1],)))
        if by_mask or call.__name__ in self.NAMES:
            self.found.append(call.__name__)
        return call(*args, **(kwargs or {}))


class Recorded(TorchDispatchMode):
    """What a CUDA graph does, on a CPU: `with Recorded() as graph:` notes every kernel and its
    arguments, graph.replay() runs them again on the very same memory. A number of the host's stays
    what it was; a value that the host wants to see is an error, as it is on a GPU while
    recording."""

    def __init__(self):
        super().__init__()
        self.kernels = []

    def __torch_dispatch__(self, kernel, types, args=(), kwargs=None):
        if kernel.overloadpacket in (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero,
                                     torch.ops.aten._unique2):
            raise RuntimeError(f"operation not permitted when stream is capturing: {kernel}")
        out = kernel(*args, **(kwargs or {}))
        self.kernels.append((kernel, args, kwargs or {}, tree_leaves(out)))
        return out

    def replay(self) -> None:
        for kernel, args, kwargs, made in self.kernels:
            for old, new in zip(made, tree_leaves(kernel(*args, **kwargs)), strict=True):
                if old.data_ptr() != new.data_ptr():  # neither a view nor written in place
                    old.copy_(new)


@pytest.fixture(autouse=True)
def no_process_group_is_left_behind():
    """parallel.shard starts one where there is none."""
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.fixture(autouse=True)
def sigterm_ends_the_tests():
    """train.main() takes SIGTERM and Ctrl-C for itself."""
    yield
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
