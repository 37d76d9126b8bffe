"""Run one phase of a longer script: skip it if done, stop it at its time limit, record its time and
peak memory.

    python -m tools.phase OUT NAME SECONDS command ...

OUT/phases.jsonl gets one line per attempt (phase, status, seconds, peak host memory),
OUT/logs/NAME.log the output; progress lines are also printed. At the time limit the command
receives SIGTERM (a training run saves) and GRACE seconds later SIGKILL; the status is then 124. A
phase whose last attempt has status 0 is not run again: delete OUT to start over.
"""
import json
import os
import re
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import jsonl

SHOWN = re.compile(r"^(step .*(held-out|/\d+ \|)|WARNING|error|Traceback|saved|filter:|\d[\d,]* "
                   r"(problems|examples))")
GRACE = 120  # seconds between SIGTERM and SIGKILL: time to finish a step and save


def main(out: Path, name: str, limit: float, command: list[str]) -> int:
    record, log = out / "phases.jsonl", out / "logs" / f"{name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    tries = jsonl.read(record)
    if [t["status"] for t in tries if t["phase"] == name][-1:] == [0]:
        return 0
    start = time.perf_counter()
    with open(log, "w") as kept:
        # own process group, so that signals reach all of its processes
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                                   text=True, start_new_session=True)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda n, _: os.killpg(process.pid, n))
        timers = [threading.Timer(seconds, os.killpg, (process.pid, number))
                  for seconds, number in ((limit, signal.SIGTERM), (limit + GRACE, signal.SIGKILL))]
        for timer in timers:
            timer.daemon = True
            timer.start()
        for line in process.stdout:
            kept.write(line)
            kept.flush()
            if SHOWN.match(line):
                print(f"[{name}] {line.rstrip()[:180]}", flush=True)
        status = process.wait()
    for timer in timers:
        timer.cancel()
    seconds = time.perf_counter() - start
    status = 124 if seconds >= limit else status
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    with open(record, "a") as lines:
        lines.write(json.dumps({"phase": name, "status": status, "seconds": round(seconds, 1),
                                "host_gib": round(peak, 2)}) + "\n")
    print(f"== {name}: {'done' if status == 0 else f'status {status}'} after {seconds:.0f} s, "
          f"{peak:.1f} GiB", flush=True)
    if status:
        print("\n".join(log.read_text().split("\n")[-8:]), flush=True)
    return status


if __name__ == "__main__":
    if len(sys.argv) < 5:
        sys.exit(__doc__)
    sys.exit(main(Path(sys.argv[1]), sys.argv[2], float(sys.argv[3]), sys.argv[4:]))
