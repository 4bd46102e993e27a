#!/usr/bin/env bash
# Trains on all GPUs of this machine; on several machines, start it on each of them, with NNODES and HEAD set.
#
#     examples/cluster/torchrun.sh classification fit --config RECIPE --output SHARED/FOLDER
#     NNODES=2 HEAD=first-machine:29500 examples/cluster/torchrun.sh classification fit …
#
# If a process dies, all are started again, RESTARTS times at most, and go on from the last checkpoint in --output.
# PROCESSES is how many there are on each machine; by default as many as it has GPUs.
set -euo pipefail
case " $* " in
*" --output"[\ =]*) ;;
*) echo "Give --output FOLDER, which a restart goes on from; several machines must share it." >&2 && exit 2 ;;
esac
# Otherwise a restart finds the addresses of the processes that are gone (pytorch/pytorch#135712, #167288).
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
exec "${PYTHON:-.venv/bin/python}" -m torch.distributed.run --nnodes "${NNODES:-1}" --nproc-per-node "${PROCESSES:-gpu}" \
    --max-restarts "${RESTARTS:-3}" --rdzv-backend c10d --rdzv-endpoint "${HEAD:-localhost:0}" --rdzv-id "${JOB:-fovea}" \
    -m "pipelines.$1" "${@:2}"
