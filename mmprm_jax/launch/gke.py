"""A TPU slice of a GKE cluster: ``launch/jobset.yaml`` filled in, applied, its pods' logs collected, deleted.

JobSet itself starts all pods again when one is lost (a preempted node, a killed process), up to ``--restarts`` times.
"""

from __future__ import annotations

import argparse
import json
import math
import pathlib
import re
import shlex
import subprocess
from typing import Any

import yaml

from mmprm_jax import interruption
from mmprm_jax.interruption import Interrupted
from mmprm_jax.launch import job as jobs
from mmprm_jax.launch.job import CommandFailed, Job, RetryLimit, call, last_line, print_progress
from mmprm_jax.records import UserError

_SPOT = "cloud.google.com/gke-spot"


def hosts(topology: str, chips: int) -> int:
    """The hosts of a slice. Raises UserError."""
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*){1,2}", topology):
        raise UserError(f"--topology={topology}: write it as GKE does, e.g. 4x8 or 2x2x4")
    total = math.prod(map(int, topology.split("x")))
    if chips < 1 or total % chips:
        raise UserError(f"--topology={topology} has {total} chips, which hosts of --chips={chips} cannot make up")
    return total // chips


def _literal(text: str) -> str:
    """Kubernetes expands $(NAME) in arguments and variables; $$ is a dollar."""
    return text.replace("$", "$$")


def manifest(options: argparse.Namespace, job: Job) -> dict[str, Any]:
    """The JobSet. Raises UserError."""
    count = hosts(options.topology, options.chips)
    jobset = yaml.safe_load(jobs.template("jobset.yaml").read_text())
    spec = jobset["spec"]
    jobset["metadata"]["name"] = spec["network"]["subdomain"] = job.name
    spec["failurePolicy"]["maxRestarts"] = job.restarts
    inner = spec["replicatedJobs"][0]["template"]["spec"]
    inner["parallelism"] = inner["completions"] = count
    pod = inner["template"]["spec"]
    labels = {"accelerator": options.accelerator, "topology": options.topology}
    pod["nodeSelector"] = {f"cloud.google.com/gke-tpu-{key}": value for key, value in labels.items()}
    if options.spot:
        pod["nodeSelector"][_SPOT] = "true"
        pod["tolerations"] = [{"key": _SPOT, "operator": "Equal", "value": "true", "effect": "NoSchedule"}]
    if options.service_account:
        pod["serviceAccountName"] = options.service_account
    container = pod["containers"][0]
    container["image"] = options.image
    container["args"] = [_literal(word) for word in job.words]
    container["env"] = [{"name": name, "value": _literal(value)} for name, value in job.env.items()]
    container["resources"] = {key: {"google.com/tpu": options.chips} for key in ("requests", "limits")}
    return jobset


class Cluster:
    """The kubectl commands about one JobSet."""

    def __init__(self, options: argparse.Namespace, job: Job):
        self.options, self.job = options, job
        where = {"context": options.context, "namespace": options.namespace}
        self.kubectl = ["kubectl", *(f"--{key}={value}" for key, value in where.items() if value)]
        self.retries = RetryLimit(options.poll)
        self.followed: dict[str, tuple[pathlib.Path, subprocess.Popen]] = {}

    def command(self, *words: str) -> list[str]:
        return [*self.kubectl, *words]

    def application(self) -> list[str]:
        return self.command("apply", "--filename=-")

    def state_query(self) -> list[str]:
        return self.command("get", f"jobsets.jobset.x-k8s.io/{self.job.name}", "--output=json")

    def pod_query(self) -> list[str]:
        selector = f"--selector=jobset.sigs.k8s.io/jobset-name={self.job.name}"
        return self.command("get", "pods", selector, "--output=json")

    def log_query(self, pod: str) -> list[str]:
        return self.command("logs", pod, "--container=mmprm", "--follow")

    def deletion(self) -> list[str]:
        return self.command("delete", f"jobsets.jobset.x-k8s.io/{self.job.name}")

    def read(self, argv: list[str]) -> dict[str, Any] | None:
        """What kubectl answers; None if it does not answer."""
        found = call(argv)
        if found.returncode:
            self.retries.note(f"no state of {self.job.name}: {last_line(found.stderr)}")
            return None
        return json.loads(found.stdout)

    def follow(self, pods: list[dict[str, Any]]) -> None:
        """Collects the logs of the pods that have started and are not followed yet."""
        for pod in pods:
            name = pod["metadata"]["name"]
            if name not in self.followed and pod["status"].get("phase") in ("Running", "Succeeded", "Failed"):
                path = self.job.logs / f"{name}.log"
                with path.open("w") as log:
                    process = subprocess.Popen(self.log_query(name), stdout=log, stderr=log)
                self.followed[name] = path, process

    def watch(self) -> None:
        """Until the JobSet has ended. Raises UserError if it failed, naming the logs of the pods that did."""
        shown = ""
        while True:
            jobset, pods = self.read(self.state_query()), self.read(self.pod_query())
            if jobset is not None and pods is not None:
                self.follow(pods["items"])
                status = jobset.get("status", {})
                ended = {c["type"] for c in status.get("conditions", ()) if c["status"] == "True"}
                phases = sorted(pod["status"].get("phase", "Unknown") for pod in pods["items"])
                restarts = status.get("restarts", 0)
                line = f"{self.job.name}: pods {', '.join(phases) or 'not there yet'}; restarts {restarts}"
                if line != shown:
                    print_progress(line)
                    shown = line
                if ended & {"Completed", "Failed"}:
                    break
            interruption.sleep(self.options.poll)
        while any(process.poll() is None for _, process in self.followed.values()):
            interruption.sleep(interruption.POLL)
        if "Failed" in ended:
            failed = [pod["metadata"]["name"] for pod in pods["items"] if pod["status"].get("phase") == "Failed"]
            named = ", ".join(str(self.followed[name][0]) for name in failed) or f"{self.job.logs}/*.log"
            raise CommandFailed(f"{self.job.name} failed after {restarts} restarts; see {named}")


def launch(options: argparse.Namespace, job: Job) -> None:
    """Raises UserError: the command failed (its log is named), or the cluster does not take it."""
    jobs.require_bucket(job)
    text = yaml.safe_dump(manifest(options, job), sort_keys=False, width=1000)
    cluster = Cluster(options, job)
    if job.dry_run:
        print(f"{shlex.join(cluster.application())} <<'MANIFEST'\n{text}MANIFEST")
        print(f"# every {options.poll:g} s, until it is Completed or Failed; a log for each pod in {job.logs}")
        for argv in (cluster.state_query(), cluster.pod_query(), cluster.log_query("POD")):
            print(shlex.join(argv))
        if not options.keep:
            print(f"# at the end\n{shlex.join(cluster.deletion())}")
        return
    applied = call(cluster.application(), text)
    if applied.returncode:
        raise UserError(f"{job.name} was not created: {last_line(applied.stderr)}")
    job.logs.mkdir(parents=True, exist_ok=True)
    print_progress(f"{last_line(applied.stdout)}; each pod's log is in {job.logs}")
    try:
        cluster.watch()
    except CommandFailed:
        if not options.keep:
            call(cluster.deletion())
        raise
    except Interrupted as interrupted:
        interrupted.message = jobs.detached_message(job.name, cluster.deletion())
        raise
    finally:
        for _, process in cluster.followed.values():
            process.terminate()
    if not options.keep:
        call(cluster.deletion())
