"""``mmprm launch TARGET [options] -- COMMAND …``: an mmprm command on many machines or devices.

Targets: ``tpu`` (a Cloud TPU slice as a queued resource), ``gke`` (a slice of a GKE cluster, as a JobSet), ``slurm``
(GPU nodes) and ``local`` (several processes on this machine). Each adds ``--distributed`` to the command and starts it
again after a lost machine: every command goes on where it was. ``--dry-run`` prints what would be run, runs nothing.
"""
