"""Ranks without torchrun, for tests: forked from a server that has imported everything once, so
that one takes milliseconds to start instead of seconds. Like torchrun, they are ended by SIGTERM
when one of them fails."""
import multiprocessing
import multiprocessing.forkserver
import os
import socket
import sys
import tempfile
import time
from pathlib import Path

import conftest  # noqa: F401  (a forked process has no pytest to load it)

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["test_parallel", "torch._dynamo",
                              "transformers.models.auto.tokenization_auto"])


def run_ranks(world: int, function, *args, timeout: float = 120) -> list[tuple[int, str]]:
    """function(*args) in `world` processes with torchrun's environment (none for one process),
    which stays within this machine.

    Returns (exit status, all it printed) of each rank; a negative status is a signal. TimeoutError
    if they do not end.
    """
    path = os.environ.get("PYTHONPATH")
    # the server knows our sys.path only from Python 3.13 on
    os.environ["PYTHONPATH"] = str(Path(__file__).parent)
    multiprocessing.forkserver.ensure_running()
    os.environ.pop("PYTHONPATH") if path is None else os.environ.update(PYTHONPATH=path)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        logs = [Path(folder) / str(rank) for rank in range(world)]
        ranks = [FORKS.Process(target=_rank, args=(
            rank, world, port, str(logs[rank]), function, args)) for rank in range(world)]
        for rank in ranks:
            rank.start()
        deadline = time.time() + timeout
        while any(rank.is_alive() for rank in ranks) and time.time() < deadline:
            time.sleep(0.02)
            if any(rank.exitcode for rank in ranks):
                for rank in ranks:
                    rank.terminate()
                for rank in ranks:
                    rank.join(3)
                    rank.kill()
        late = [rank.kill() for rank in ranks if rank.is_alive()]
        for rank in ranks:
            rank.join()
        printed = [log.read_text() if log.exists() else "" for log in logs]
    if late:
        raise TimeoutError("\n".join(printed))
    return [(rank.exitcode, text) for rank, text in zip(ranks, printed, strict=True)]


def _rank(rank: int, world: int, port: int, log: str, function, args) -> None:
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    sys.stdout.flush()
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.stdout = open(1, "w", buffering=1, closefd=False)
    sys.stderr = open(2, "w", buffering=1, closefd=False)
    if world > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world),
                       "MASTER_ADDR": "127.0.0.1",
                       "MASTER_PORT": str(port)}
    function(*args)
