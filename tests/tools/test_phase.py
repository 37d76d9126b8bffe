"""tools.phase: what a long script relies on when it is interrupted."""
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def start(out, name, seconds, code):
    return subprocess.Popen([sys.executable, "-m", "tools.phase", out, name, str(seconds),
                             sys.executable, "-uc", code], cwd=ROOT, stdout=subprocess.PIPE,
                            text=True)


def run(*args):
    process = start(*args)
    return process.communicate()[0], process.returncode


def tries(out):
    return [json.loads(line) for line in (out / "phases.jsonl").read_text().split("\n")[:-1]]


def test_a_phase_that_is_done_is_skipped_and_one_that_failed_is_tried_again(tmp_path):
    code = (f"import pathlib; p = pathlib.Path({str(tmp_path / 'n')!r}); "
            "n = len(p.read_text()) if p.exists() else 0; p.write_text('x' * (n + 1)); "
            "print('step 1 |'); print('hidden'); raise SystemExit(3 * (n == 0))")
    assert [run(tmp_path, "a", 60, code)[1] for _ in range(3)] == [3, 0, 0]
    assert [t["status"] for t in tries(tmp_path)] == [3, 0] and (tmp_path / "n").read_text() == "xx"
    assert tries(tmp_path)[0]["host_gib"] > 0 and "hidden" in (tmp_path / "logs/a.log").read_text()


def test_at_its_limit_a_phase_is_asked_to_stop_and_may_save(tmp_path):
    code = ("import signal, time\n"
            "signal.signal(signal.SIGTERM, lambda *_: (print('saved x'), exit(143)))\n"
            "time.sleep(60)")
    shown, status = run(tmp_path, "slow", 1.5, code)
    assert status == 124 and tries(tmp_path)[0]["status"] == 124 and "[slow] saved x" in shown


def test_a_signal_reaches_the_command_and_nothing_is_left_behind(tmp_path):
    process = start(tmp_path, "b", 60, "print('step 1 | pid'); import time; time.sleep(60)")
    deadline = time.time() + 20
    while not (tmp_path / "logs/b.log").exists() or not (tmp_path / "logs/b.log").read_text():
        assert time.time() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=10)
    assert tries(tmp_path)[0]["status"] == -signal.SIGTERM
