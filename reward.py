"""The grader: the only source of rewards for training, evaluation and cold start.

A response is right (reward 1) if its answer is equivalent to the gold answer (answers.py). Text and
exact fractions decide most pairs. The rest needs sympy, in a process that is killed at a time
limit: LaTeX from a policy can keep sympy busy for ever, and an alarm does not work in a thread
(trap 23). Undecided pairs (timeout, error) and unreadable answers (unparsable, no_answer) are
counted separately from wrong ones.
"""
import atexit
import contextlib
import json
import logging
import os
import resource
import select
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import answers

START_LIMIT_S = 120.0  # for a worker to import sympy on a busy machine
SLACK_S = 5.0  # wait beyond a request's time limit before its worker is considered dead
# bytes a worker may map: 10^{10^{10}} runs out of memory before it runs out of time
MEMORY_LIMIT = 2 << 30


@dataclass
class Grade:
    reward: float  # 1.0 or 0.0
    status: str  # 'correct' | 'wrong' | 'no_answer' | 'unparsable' | 'timeout' | 'error'
    answer: str | None  # content of the box, as the model wrote it


def grade(text: str, gold: str, *, timeout_s: float = 3.0) -> Grade:
    """Grade one response; see grade_many."""
    return grade_many([text], [gold], workers=1, timeout_s=timeout_s)[0]


def grade_many(texts: list[str], golds: list[str], *, workers: int = 2,
               timeout_s: float = 3.0) -> list[Grade]:
    """Grade responses against their gold answers, in order.

    Most pairs are decided here by text and fractions. The others go to `workers` processes, which
    are started on first use and kept alive. Equal pairs are graded once. timeout_s: wall-clock
    seconds per pair.
    """
    pairs = list(zip(map(answers.extract_boxed, texts), golds, strict=True))
    status = {pair: answers.settle(*pair) for pair in dict.fromkeys(pairs)}
    hard = [pair for pair, known in status.items() if known is None]

    def ask(pair):
        answer, gold = (answers.normalise(x)[0] for x in pair)  # settle has compared the units
        return _ask({"answer": answer, "gold": gold}, timeout_s)["status"]

    with ThreadPoolExecutor(workers) as threads:  # no thread starts if hard is empty
        status.update(zip(hard, threads.map(ask, hard), strict=True))
    return [Grade(float(status[pair] == "correct"), status[pair], pair[0]) for pair in pairs]


def score(rollouts: list) -> None:
    """Set the verifiable reward (1 or 0) of every rollout. An unfinished response is always wrong.
    """
    grades = grade_many([r.text for r in rollouts], [r.problem.answer for r in rollouts])
    for r, grade in zip(rollouts, grades, strict=True):
        r.reward, r.grade, r.answer = grade.reward, grade.status, grade.answer
        if not r.finished:
            r.reward, r.grade = 0.0, "truncated"


def fault_of_gold(gold: str) -> str:
    """One-line reason why `gold` cannot be read, so that only the same text would be graded
    correct; "" if it can."""
    core, why = answers.normalise(gold)[0], ""
    if not core or len(gold) > answers.MAX_CHARS:
        why = "too long" if core else "empty"
    elif not answers.is_rational(core) and not core.isalpha():
        reply = _ask({"gold": core}, 10.0)
        if reply["status"] != "correct":
            why = f"unreadable ({reply.get('why', reply['status'])})"
    shown = repr(gold if len(gold) <= 60 else gold[:60] + "...")
    return f"gold answer {shown} is {why}; correct it or drop the problem" if why else ""


# --- the worker ---


def _serve() -> None:
    """Worker loop: import sympy once and grade in a forked child. A child that exceeds its time
    limit is killed and forked again in milliseconds. Requests and replies are lines of JSON; return
    at end of input."""
    replies = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)  # keep what libraries print out of the replies
    # the parent handles Ctrl-C and preemption
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT, MEMORY_LIMIT))
    logging.disable(logging.CRITICAL)
    first = {"status": "ready"}
    try:
        # import sympy and fill its caches before the first fork
        for answer, gold in (("x+1", "1+x"), ("(0,1)", "0<x<1"), ("\\sqrt2", "\\sqrt3")):
            answers.same(answer, gold)
    except Exception as problem:
        first = {"status": f"{type(problem).__name__}: {problem}"}
    replies.write(json.dumps(first).encode() + b"\n")
    fork = 0
    for line in sys.stdin.buffer:
        if not fork:
            (to_read, to_write), (from_read, from_write) = os.pipe(), os.pipe()
            fork = os.fork()
            if not fork:
                for fd in (to_write, from_read, replies.fileno(), 0):
                    os.close(fd)
                _work(to_read, from_write)
            os.close(to_read)
            os.close(from_write)
        os.write(to_write, line)
        in_time = select.select([from_read], [], [], json.loads(line)["limit"])[0]
        reply = os.read(from_read, 65536) if in_time else b'{"status": "timeout"}\n'
        if not in_time or not reply:
            os.kill(fork, signal.SIGKILL)
            os.waitpid(fork, 0)
            os.close(to_write)
            os.close(from_read)
            fork = 0
        replies.write(reply or b'{"status": "error", "why": "the process died"}\n')


def _work(requests: int, replies: int) -> None:
    """Grade requests read from one file descriptor, write replies to another; never return."""
    for line in os.fdopen(requests):
        request = json.loads(line)
        # In case the worker died and cannot kill this process: SIGALRM has no handler, so it ends
        # the process even inside C code.
        signal.setitimer(signal.ITIMER_REAL, request["limit"] + 1)
        try:
            if "answer" in request:
                right = answers.same(request["answer"], request["gold"])
                reply = {"status": "correct" if right else "wrong"}
            else:
                answers.check_readable(request["gold"])
                reply = {"status": "correct"}
        except answers.Unparsable:
            reply = {"status": "unparsable"}
        except MemoryError:
            reply = {"status": "timeout"}
        except Exception as problem:
            why = f"{type(problem).__name__}: {problem}".split("\n")[0][:200]
            reply = {"status": "error", "why": why}
        signal.setitimer(signal.ITIMER_REAL, 0)
        os.write(replies, json.dumps(reply).encode() + b"\n")
    os._exit(0)


# --- the parent's side of the workers ---

_lock = threading.Lock()
_idle: list[subprocess.Popen] = []
_alive: set[subprocess.Popen] = set()


def _ask(request: dict, timeout_s: float) -> dict:
    """Reply of an idle worker, or of a new one if none is idle, within timeout_s + SLACK_S plus the
    time to start a worker."""
    while True:
        with _lock:
            worker = _idle.pop() if _idle else None
        first_time = worker is None
        worker = worker or _start()
        if worker is None:
            return {"status": "error", "why": "no worker started in time"}
        try:
            worker.stdin.write(json.dumps(request | {"limit": timeout_s}).encode() + b"\n")
            reply = _receive(worker, timeout_s + SLACK_S)
        except BrokenPipeError:
            reply = None
        except BaseException:  # Ctrl-C: the next request would read the reply to this one
            _kill(worker)
            raise
        if reply:
            with _lock:
                _idle.append(worker)
            return reply
        # the worker died or hung, not due to the request: retry unless it was newly started
        _kill(worker)
        if first_time:
            return {"status": "error", "why": "the worker died"}


def _receive(worker: subprocess.Popen, timeout_s: float) -> dict | None:
    """The worker's next line, written by a single write; None if the worker died or is late."""
    poll = select.poll()
    poll.register(worker.stdout, select.POLLIN)
    line = worker.stdout.readline() if poll.poll(timeout_s * 1000) else b""
    return json.loads(line) if line else None


def _start() -> subprocess.Popen | None:
    """A new worker; None if it died or was too slow to start: a busy machine must not end the
    run."""
    worker = subprocess.Popen(
        [sys.executable, os.path.abspath(__file__), "--worker"], bufsize=0, stdin=subprocess.PIPE,
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        start_new_session=True)  # torchrun sends SIGTERM to the parent's process group
    with _lock:
        _alive.add(worker)
    reply = _receive(worker, START_LIMIT_S)
    if reply and reply["status"] == "ready":
        return worker
    _kill(worker)
    if reply:
        raise ValueError(f"the grader's worker cannot work ({reply['status']}); is math-verify "
                         "installed?")
    return None


def _kill(worker: subprocess.Popen) -> None:
    worker.kill()
    worker.wait()
    worker.stdin.close()
    worker.stdout.close()
    with _lock:
        _alive.discard(worker)


def _forget() -> None:
    """In a forked child: drop the parent's workers. Open copies of their pipes would keep them
    alive after the parent ends."""
    global _lock
    _lock = threading.Lock()
    for worker in _alive:
        worker.stdin.close()
        worker.stdout.close()
        worker.returncode = 0  # else Popen waits for a process that is no child of this one
    _alive.clear()
    _idle.clear()


atexit.register(lambda: [_kill(worker) for worker in list(_alive)])
os.register_at_fork(after_in_child=_forget)

if __name__ == "__main__" and sys.argv[1:] == ["--worker"]:
    _serve()
