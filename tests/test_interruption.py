"""Signals end a command whatever it is doing, and its worker processes only with it."""

import os
import signal
import socket
import subprocess
import sys
import time

import pytest

from mmprm_jax import interruption
from mmprm_jax.interruption import Interrupted, handling

SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
LIMIT = 60  # seconds; 10 on an idle machine
GOES_ON = "; the same command goes on from here"

# What a command may be doing: polls in a loop; is in C that knows no signals; swallows every exception, as callbacks of
# the garbage collector do; saves for longer than the grace; has threads that the interpreter waits for at its end.
DOING = {
    "polls": "while True: interruption.sleep(1000)",
    "loops": "while True: interruption.check(); time.sleep(0.01)",
    "is in C": "threading.Lock().acquire() and (lock := threading.Lock()).acquire() and lock.acquire()",
    "swallows": """
while True:
    try: time.sleep(0.01)
    except BaseException: pass
""",
    "saves": """
while not interruption.requested(): time.sleep(0.01)
with interruption.saving(): time.sleep(interruption.GRACE + 2)
print("saved", flush=True)
raise interruption.Interrupted
""",
    "cannot end": """
threading.Thread(target=time.sleep, args=[1000]).start()
while True: interruption.check(); time.sleep(0.01)
""",
}  # fmt: skip
SCRIPT = """
import sys, threading, time
from mmprm_jax import interruption
interruption.GRACE, interruption.CLOSING = 2.0, 1.0
with interruption.handling(permanent=True):
    print("ready", flush=True)
    exec(sys.argv[1])
"""


def start(code, *argv, ignored=False):
    """ignored: with SIGINT ignored, as in a background job of a shell."""
    begin = "import signal; signal.signal(signal.SIGHUP, signal.SIG_DFL)\n"  # the tests themselves may run under nohup
    begin += "signal.signal(signal.SIGINT, signal.SIG_IGN)\n" if ignored else ""
    process = subprocess.Popen(
        [sys.executable, "-c", begin + code, *argv], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip
    assert process.stdout.readline() == "ready\n"
    return process


def ended(process):
    """(exit code, output, errors), in time."""
    try:
        out, err = process.communicate(timeout=LIMIT)
    finally:
        process.kill()
    return process.returncode, out, err


@pytest.mark.parametrize("doing", DOING)
def test_a_signal_ends_it(doing):
    """All signals at once, in processes side by side; SIGINT also where it was ignored, SIGHUP not there."""
    running = {(n, ignored): start(SCRIPT, DOING[doing], ignored=ignored) for n in SIGNALS for ignored in (False, True)}
    for (number, _), process in running.items():
        process.send_signal(number)
    for (number, _), process in running.items():
        code, out, err = ended(process)
        assert code == 128 + number and (out == "saved\n") == (doing == "saves")
        assert err.count("\n") == 1 and err.endswith(f"as asked{GOES_ON}\n")


def test_nohup_stays_ignored_and_its_commands_go_on():
    begin = "import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)"
    process = start(begin + SCRIPT, "time.sleep(0.5); interruption.check(); print('went on')")
    process.send_signal(signal.SIGHUP)
    assert ended(process) == (0, "went on\n", "")


def test_a_second_signal_ends_it_at_once_but_not_the_same_one_sent_twice():
    """``timeout`` sends its signal to the process and to the group."""
    code = """
while not interruption.requested(): time.sleep(0.01)
print("asked", flush=True)
with interruption.saving(): time.sleep({})
raise interruption.Interrupted("saved all")
"""
    twice, second = start(SCRIPT, code.format(2)), start(SCRIPT, code.format(1000))
    for process in (twice, second):
        process.send_signal(signal.SIGTERM)
        process.send_signal(signal.SIGTERM)
        assert process.stdout.readline() == "asked\n"
    assert ended(twice) == (143, "", f"mmprm: saved all{GOES_ON}\n")
    assert second.poll() is None
    second.send_signal(signal.SIGINT)
    assert ended(second)[0] == 130


def test_long_rounds_are_waited_for():
    """A step of a large model takes longer than the grace, and is not lost."""
    code = """
print("go", flush=True)
while not (interruption.requested() or interruption.requested()): time.sleep(3)
raise interruption.Interrupted("saved all")
"""
    process = start(SCRIPT, code)
    process.stdout.readline()
    time.sleep(7)
    process.send_signal(signal.SIGTERM)
    assert ended(process) == (143, "", f"mmprm: saved all{GOES_ON}\n")


def test_a_signal_to_a_command_that_is_done_changes_nothing():
    """Python has no handlers any more while it takes its modules down."""
    code = """
import os
class Late:
    def __del__(self, kill=os.kill, pid=os.getpid()): kill(pid, 2); kill(pid, 15)
sys.late = Late()
"""
    assert ended(start(SCRIPT, code)) == (0, "", "")


def test_handlers_are_put_back():
    before = [signal.getsignal(n) for n in SIGNALS]
    with pytest.raises(Interrupted) as caught, handling():
        with handling():  # the outer one is that of the command
            pass
        os.kill(os.getpid(), signal.SIGINT)
        interruption.check()
    assert caught.value.code == 130 and [signal.getsignal(n) for n in SIGNALS] == before
    assert signal.set_wakeup_fd(-1) == -1 and not interruption.requested()


# ------------------------------------------------------------------------------------------------- worker processes

POOL = """
import os, pathlib, signal, sys, time
sys.path.insert(0, {folder!r})
from mmprm_jax.answers.workers import Verifier
import slow_check
if __name__ == "__main__":
    with Verifier(2, check=slow_check.check) as verify:
        print(verify([(str(os.getpid()), "")]), flush=True)
        {then}
"""
CHECK = """
import os, pathlib, time
def check(pairs):
    (pathlib.Path(__file__).parent / f"worker.{os.getpid()}").touch()
    if pairs[0][0] == "hang":
        (pathlib.Path(__file__).parent / "hangs").touch()
        time.sleep(1000)
    return [True for _ in pairs]
"""


def script(folder, then):
    (folder / "slow_check.py").write_text(CHECK)
    (folder / "script.py").write_text(POOL.format(folder=str(folder), then=then))
    return subprocess.Popen(
        [sys.executable, folder / "script.py"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip


def workers(folder):
    return [int(path.suffix[1:]) for path in folder.glob("worker.*")]


def running(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_workers_outlive_signals_to_the_group_and_die_with_their_parent(tmp_path):
    """The parent is asked by the same signals, here it takes none; then it is killed."""
    then = "; ".join(
        [
            "[signal.signal(n, signal.SIG_IGN) for n in (1, 2, 15)]",
            "os.killpg(0, 1); os.killpg(0, 2); os.killpg(0, 15)",
            "pids = [int(p.suffix[1:]) for p in pathlib.Path(__file__).parent.glob('worker.*')]",
            "[os.kill(pid, n) for pid in pids for n in (1, 2, 15)]",
            "print(verify([('2', '')]), flush=True)",
            "verify([('hang', '')])",
        ]
    )
    process = script(tmp_path, then)
    assert process.stdout.readline() == "[True]\n" and process.stdout.readline() == "[True]\n"
    deadline = time.monotonic() + LIMIT
    while not (tmp_path / "hangs").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    found = workers(tmp_path)
    assert any(map(running, found))
    process.kill()
    process.wait()
    while any(map(running, found)):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_script_without_a_main_guard_is_reported(tmp_path):
    path = tmp_path / "script.py"
    path.write_text("from mmprm_jax.answers.workers import Verifier\nVerifier(1)([('1', '1')])\n")
    done = subprocess.run([sys.executable, path], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and "Unexpected" not in done.stderr and "leaked" not in done.stderr
    assert f"UserError: {path}: worker processes import it, and would run all of it again" in done.stderr
    assert 'if __name__ == "__main__"' in done.stderr


# ------------------------------------------------------------------------------------------------- several processes

PAIR = """
import os, sys, time
from mmprm_jax import interruption
with interruption.handling(permanent=True):
    import jax
    jax.config.update("jax_platforms", "cpu")
    from mmprm_jax import processes
    processes.connect()
    print("ready", flush=True)
    for step in range(1, 10**6):
        time.sleep(0.05)
        if sys.argv[1] == "together" and processes.stop_requested(step):
            print(f"ended behind {step}", flush=True)
            raise interruption.Interrupted
        if sys.argv[1] == "own":
            interruption.check(own=True)
"""


def pair(how):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    env = os.environ | {"JAX_NUM_PROCESSES": "2", "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}"}
    both = [
        subprocess.Popen(
            [sys.executable, "-c", PAIR, how], env=env | {"JAX_PROCESS_ID": str(i)}, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for i in range(2)
    ]  # fmt: skip
    for process in both:
        assert process.stdout.readline() == "ready\n"
    return both


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_one_of_several_processes_is_asked(number):
    """Where they work together both end behind the same step; else the one that was asked, whose work is its own."""
    first, second = pair("together")
    second.send_signal(number)
    (code, said, _), (other, said_too, err) = ended(second), ended(first)
    assert (code, other) == (128 + number, 143) and said == said_too and said.startswith("ended behind"), err
    first, second = pair("own")
    second.send_signal(number)
    code, _, err = ended(second)
    assert code == 128 + number and err.splitlines()[-1] == f"mmprm: stopped as asked{GOES_ON}"
    assert first.poll() is None
    first.kill()
