"""``mmprm launch gke`` with a stand-in for kubectl; the manifest."""

import json
import re

import pytest
import yaml

from mmprm_jax import cli
from mmprm_jax.cli.command import parse
from mmprm_jax.launch import gke
from mmprm_jax.launch.job import CLONE, make_job
from mmprm_jax.records import UserError

OPTIONS = ["--name=pod", "--image=REGISTRY/mmprm", "--accelerator=tpu-v5-lite-podslice", "--topology=4x8"]
COMMAND = ["train_prm", "--config=configs/digits.py", "--workdir=gs://BUCKET/run"]
HOSTILE = ["--config.a=it's", '--config.b="two  words"', "--config.c=no: [yaml}\n- x", "--config.d=# y",
           "--config.e", "", "--config.f", "yes", "--config.g", "1"]  # fmt: skip


def launch(*more, command=COMMAND):
    cli.run(["launch", "gke", *OPTIONS, "--poll=0.01", *more, "--", *command])


def jobset(*conditions, restarts=0):
    conditions = [{"type": kind, "status": "True"} for kind in conditions]
    return json.dumps({"status": {"conditions": conditions, "restarts": restarts}})


def pods(**phases):
    items = [{"metadata": {"name": name}, "status": {"phase": phase}} for name, phase in phases.items()]
    return json.dumps({"items": items})


def shown(text):
    """The manifest in a dry run's text."""
    return yaml.safe_load(re.search(r"<<'MANIFEST'\n(.*)^MANIFEST$", text, re.DOTALL | re.MULTILINE)[1])


def test_the_dry_run(dry_run):
    text = dry_run("gke", *OPTIONS, "--spot", "--service-account=KSA", "--namespace=N", "--", *COMMAND)
    assert (
        text
        == """\
kubectl --namespace=N apply --filename=- <<'MANIFEST'
apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: pod
  annotations:
    alpha.jobset.sigs.k8s.io/exclusive-topology: cloud.google.com/gke-nodepool
spec:
  network:
    enableDNSHostnames: true
    subdomain: pod
  failurePolicy:
    maxRestarts: 10
  replicatedJobs:
  - name: slice
    replicas: 1
    template:
      spec:
        completionMode: Indexed
        parallelism: 8
        completions: 8
        backoffLimit: 0
        template:
          spec:
            restartPolicy: Never
            nodeSelector:
              cloud.google.com/gke-tpu-accelerator: tpu-v5-lite-podslice
              cloud.google.com/gke-tpu-topology: 4x8
              cloud.google.com/gke-spot: 'true'
            containers:
            - name: mmprm
              image: REGISTRY/mmprm
              command:
              - mmprm
              args:
              - train_prm
              - --config=configs/digits.py
              - --workdir=gs://BUCKET/run
              - --distributed
              env: []
              resources:
                requests:
                  google.com/tpu: 4
                limits:
                  google.com/tpu: 4
            tolerations:
            - key: cloud.google.com/gke-spot
              operator: Equal
              value: 'true'
              effect: NoSchedule
            serviceAccountName: KSA
MANIFEST
# every 15 s, until it is Completed or Failed; a log for each pod in logs/pod
kubectl --namespace=N get jobsets.jobset.x-k8s.io/pod --output=json
kubectl --namespace=N get pods --selector=jobset.sigs.k8s.io/jobset-name=pod --output=json
kubectl --namespace=N logs POD --container=mmprm --follow
# at the end
kubectl --namespace=N delete jobsets.jobset.x-k8s.io/pod
"""
    )


def test_hostile_arguments_reach_the_container_as_they_were(scenario, dry_run):
    command = [*COMMAND, *HOSTILE]
    manifest = shown(dry_run("gke", *OPTIONS, "--env=A=it's: [a}", "--", *command))
    assert scenario.calls() == []
    container = manifest["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]["containers"][0]
    assert container["args"] == [*command, "--distributed"]
    assert container["env"] == [{"name": "A", "value": "it's: [a}"}]
    scenario.put("jobsets", jobset("Completed"))
    scenario.put("pods", pods())
    launch("--env=A=it's: [a}", command=command)
    assert yaml.safe_load((scenario.folder / "manifest.yaml").read_text()) == manifest


@pytest.mark.parametrize("text", ["$(HOME)", "$$(HOME)", "$HOME", "a$", "$(a)$(b)$$"])
def test_kubernetes_expands_nothing(text):
    """Its rule (docs: "Define Dependent Environment Variables"): $(NAME) is replaced, $$ is a dollar."""

    def expand(argument):
        return re.sub(r"\$\$|\$\((\w+)\)", lambda m: "$" if m[0] == "$$" else f"<{m[1]}>", argument)

    assert expand(gke._literal(text)) == text


def test_until_it_is_completed(scenario, tmp_path):
    scenario.put("jobsets", jobset(), "unreachable", jobset(restarts=1), jobset("Completed", restarts=1))
    scenario.put("pods", pods(a="Running", b="Pending"), "unreachable", pods(c="Running"), pods(c="Succeeded"))
    launch()
    assert {path.name: path.read_text() for path in tmp_path.glob("logs/pod/*")} == {
        "a.log": "log of a\n",
        "c.log": "log of c\n",
    }
    assert scenario.calls("kubectl")[-1] == ["delete", "jobsets.jobset.x-k8s.io/pod"]


def test_a_failing_pod_is_named_and_the_jobset_deleted(scenario):
    scenario.put("jobsets", jobset(), jobset("Failed", restarts=10))
    scenario.put("pods", pods(a="Running", b="Running"), pods(a="Failed", b="Succeeded"))
    with pytest.raises(UserError, match="pod failed after 10 restarts; see logs/pod/a.log$"):
        launch()
    assert scenario.calls("kubectl")[-1][0] == "delete"


def test_it_is_kept_if_so_wanted(scenario):
    scenario.put("jobsets", jobset("Completed"))
    scenario.put("pods", pods())
    launch("--keep")
    assert "delete" not in [call[0] for call in scenario.calls("kubectl")]


def test_a_cluster_that_does_not_take_it_or_does_not_answer(scenario):
    scenario.put("jobsets", "unreachable")
    scenario.put("pods", pods())
    with pytest.raises(UserError, match=r"Unable to connect to the server \(5 times\)"):
        launch()
    scenario.put("refused")
    with pytest.raises(UserError, match="no matches for kind JobSet"):
        launch()


@pytest.mark.parametrize(
    ("topology", "chips", "count"),
    [("2x4", 8, 1), ("4x4", 4, 4), ("16x16", 4, 64), ("2x2x4", 4, 4), ("1x1", 1, 1), ("4x8", 3, None), ("4", 4, None),
     ("0x4", 4, None), ("4x8x", 4, None), ("4x8", 0, None)],
)  # fmt: skip
def test_hosts(topology, chips, count):
    if count:
        assert gke.hosts(topology, chips) == count
    else:
        with pytest.raises(UserError, match=f"--topology={topology}"):
            gke.hosts(topology, chips)


def test_a_workdir_that_only_one_host_would_see():
    with pytest.raises(UserError, match="gs://BUCKET"):
        launch(command=["sft", "--config=configs/digits.py", "--workdir=/data/run"])


def test_the_template_is_a_manifest_with_every_placeholder_filled():
    _, parsed = parse(["launch", "gke", *OPTIONS, "--", *COMMAND])
    job = make_job(parsed, COMMAND, "configs/digits.py", "gs://BUCKET/run")
    text = yaml.safe_dump(gke.manifest(parsed, job))
    template = (CLONE / "launch" / "jobset.yaml").read_text()
    capitals = set(re.findall(r": ([A-Z]+)\b", template))
    assert capitals == {"NAME", "RESTARTS", "HOSTS", "ACCELERATOR", "TOPOLOGY", "IMAGE", "CHIPS"}
    assert not any(re.search(rf": {word}\b", text) for word in capitals)
