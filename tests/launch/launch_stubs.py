"""Stand-ins for gcloud, kubectl, Slurm's programs and mmprm: they log their arguments and do what a scenario says."""

import json
import os
import pathlib
import sys
import textwrap

HEAD = """
import json, os, pathlib, subprocess, sys, time
here, argv = pathlib.Path(os.environ["SCENARIO"]), sys.argv[1:]
name = pathlib.Path(sys.argv[0]).name

def note(*words):
    with (here / "calls.jsonl").open("a") as log:
        log.write(json.dumps([name, *words]) + "\\n")

def pop(path):
    '''The next line of a file, the last one again and again; "" if there is no file.'''
    lines = (here / path).read_text().splitlines() if (here / path).exists() else []
    lines = lines or [""]
    if len(lines) > 1:
        (here / path).write_text("\\n".join(lines[1:]))
    return lines[0]

note(*argv)
"""

# states: one line per look; "" is no such resource. breaks: what becomes of the slice while a command is under way.
GCLOUD = """
verb = argv[3] if argv[2] == "queued-resources" else argv[3]
option = dict(word[2:].split("=", 1) for word in argv if word.startswith("--") and "=" in word)
if verb == "describe":
    state = pop("states")
    if not state:
        sys.exit("ERROR: (gcloud.compute.tpus.queued-resources.describe) NOT_FOUND: Resource was not found")
    if state == "unreachable":
        sys.exit("ERROR: network is unreachable")
    print(state)
elif verb == "create":
    if (here / "refused").exists():
        sys.exit("ERROR: (gcloud) PERMISSION_DENIED: no quota")
    (here / "states").write_text("WAITING_FOR_RESOURCES\\nPROVISIONING\\nACTIVE")
elif verb == "delete":
    if pop("undeletable") == "1":
        sys.exit("ERROR: (gcloud) UNAVAILABLE")
    (here / "states").write_text("\\n")
else:
    code, running = 0, []
    for worker in "01":
        home = here / f"home{worker}"
        home.mkdir(exist_ok=True)
        if verb == "scp":
            (home / argv[5].split(":")[1]).write_bytes(pathlib.Path(argv[4]).read_bytes())
            continue
        log = pathlib.Path(option["output-directory"]) / f"{worker}.log"
        if " run " in option["command"] and worker == "1" and (here / "breaks").exists():
            if state := pop("breaks"):
                (here / "states").write_text(state)
            (here / "breaks").unlink()
            log.write_text("half a line")
            code = 255
            continue
        env = os.environ | {"HOME": str(home), "WORKER": worker}
        with log.open("w") as out:
            run = subprocess.run(["bash", "-c", option["command"]], cwd=home, env=env, stdout=out, stderr=out)
        code = code or run.returncode
    sys.exit(code)
"""

# status.N: the exit status of the process N; a negative one is a signal.
MMPRM = """
index = next((os.environ[key] for key in ("WORKER", "JAX_PROCESS_ID", "SLURM_PROCID") if key in os.environ), "0")
print("mmprm", *argv, flush=True)
(here / f"environment.{index}").write_text(json.dumps(dict(os.environ)))
time.sleep(float(pop("seconds") or 0))
status = int(pop(f"status.{index}") or 0)
if status < 0:
    os.kill(os.getpid(), -status)
if status:
    print("mmprm: it went wrong", file=sys.stderr)
sys.exit(status)
"""

KUBECTL = """
words = [word for word in argv if not word.startswith("--")]
if words[0] == "apply":
    (here / "manifest.yaml").write_text(sys.stdin.read())
    if (here / "refused").exists():
        sys.exit("error: no matches for kind JobSet")
    print("jobset.jobset.x-k8s.io/mmprm created")
elif words[0] == "get":
    answer = pop("pods" if words[1] == "pods" else "jobsets")
    if answer == "unreachable":
        sys.exit("Unable to connect to the server")
    print(answer)
elif words[0] == "logs":
    print("log of", words[1])
"""

SBATCH = """
script = next(i for i, word in enumerate(argv) if not word.startswith("--"))
with (here / "out").open("w") as out:
    env = os.environ | {"SLURM_JOB_ID": "7"}
    run = subprocess.Popen(["bash", *argv[script:]], env=env, stdout=out, stderr=out)
(here / "script.pid").write_text(str(run.pid))
if (here / "background").exists():
    print("Submitted batch job 7")
else:
    sys.exit(run.wait() and 0)
"""

SRUN = """
(here / "srun.pid").write_text(str(os.getpid()))
option = dict(word[2:].split("=", 1) for word in argv if word.startswith("--") and "=" in word)
program = next(i for i, word in enumerate(argv) if not word.startswith("--"))
code = 0
for task in "01":
    path = option["output"].replace("%j", os.environ["SLURM_JOB_ID"]).replace("%t", task)
    with open(path, "a") as out:
        run = subprocess.run(argv[program:], env=os.environ | {"SLURM_PROCID": task}, stdout=out, stderr=out)
    code = code or run.returncode
sys.exit(code)
"""

SCANCEL = """
import signal
os.kill(int((here / "srun.pid").read_text()), signal.SIGTERM)
"""

PROGRAMS = dict(
    gcloud=GCLOUD, kubectl=KUBECTL, mmprm=MMPRM, sbatch=SBATCH, srun=SRUN, scancel=SCANCEL, scontrol="", python3=""
)


class Scenario:
    """A folder with the stand-ins in ``bin`` and what they are to do; ``environment`` leads to them."""

    def __init__(self, folder: pathlib.Path):
        self.folder = folder
        (folder / "bin").mkdir()
        for name, body in PROGRAMS.items():
            path = folder / "bin" / name
            path.write_text(f"#!{sys.executable} -IS\n{HEAD}{textwrap.dedent(body)}")
            path.chmod(0o755)
        path = f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}"
        self.environment = {"PATH": path, "SCENARIO": str(folder)}

    def put(self, name, *lines):
        (self.folder / name).write_text("\n".join(lines))

    def calls(self, name=None):
        """The arguments of each call, of one program if it is named."""
        log = self.folder / "calls.jsonl"
        calls = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
        return [call[1:] if name else call for call in calls if name in (None, call[0])]
