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

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def sigterm_ends_the_tests():
    """train.main() takes SIGTERM for itself."""
    yield
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
