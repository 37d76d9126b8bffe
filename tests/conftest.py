"""Shared by all tests: the repository root on sys.path, one thread, no network, no GPU unless asked for."""
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
from torch.overrides import TorchFunctionMode  # noqa: E402

torch.set_num_threads(1)


class HostReads(TorchFunctionMode):
    """`with HostReads() as reads:` collects in reads.found the names of the calls that need a tensor's values in Python. With
    the tensor on a GPU each would make the host wait for all that was launched before; which device it is matters to no test."""
    NAMES = {"item", "tolist", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__", "nonzero", "equal",
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


@pytest.fixture(autouse=True)
def sigterm_ends_the_tests():
    """train.main() takes SIGTERM for itself."""
    yield
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
