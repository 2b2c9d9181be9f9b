#!/usr/bin/env bash
# Run a Dask worker, and start it again when it lost its scheduler.
#
# A worker that loses its scheduler (a switch restarts, a cable is pulled) exits for good, whatever Dask's options.
# This script starts it again, whatever the exit code, until
#   - the script is stopped (SIGTERM or Ctrl-C): the worker finishes what it is computing, and leaves; or
#   - no scheduler has answered for PATIENCE seconds (default 3600): exit code 1.
#
#   worker.sh tls://HOST:8786 [more options of 'dask worker', such as --nthreads 1 --interface ib0]
#
# As a batch job; SLURM then signals only the script, a minute before the end:
#   sbatch --time 08:00:00 --signal B:TERM@60 --wrap 'exec /PATH/TO/worker.sh tls://HOST:8786 --nthreads 1'
# As a systemd unit:
#   ExecStart=/PATH/TO/worker.sh tls://HOST:8786 --nthreads 1
#   KillMode=mixed
#
# Workers must see the stores at the paths that the driver uses. PYTHON names the interpreter that has lsim
# (default: python). Credentials and other settings come from Dask's configuration: files named by DASK_CONFIG, or
#   DASK_DISTRIBUTED__COMM__TLS__CA_FILE  …__TLS__WORKER__CERT  …__TLS__WORKER__KEY
set -u
[ $# -ge 1 ] || { sed -n '/^#   worker.sh/s/^# *//p' "$0" >&2; exit 2; }
patience=${PATIENCE:-3600}
answered=$SECONDS
stopped=
trap 'stopped=yes' TERM INT

# The failure timeouts of clusters started by lsim.
timeouts=$(dirname "$0")/../clusters/dask
if [ -z "${DASK_CONFIG:-}" ]; then
  [ -d "$timeouts" ] || { echo "worker.sh: no $timeouts, set DASK_CONFIG to where it is" >&2; exit 2; }
  export DASK_CONFIG=$timeouts
fi

while [ -z "$stopped" ]; do
  # Dask acts on the first signal and dies of a second one, and a batch system signals all processes of a job: signals
  # after the first must be ignored. Slow imports are preloaded, since a worker that has joined must not be silent.
  (trap '' TERM INT; exec "${PYTHON:-python}" -m distributed.cli.dask_worker \
    --no-dashboard --dashboard-address 127.0.0.1:0 --preload pipeline.workers.cluster --death-timeout 60 "$@") &
  worker=$!
  while kill -0 "$worker" 2> /dev/null; do
    if [ -n "$stopped" ]; then
      # Repeat the signal: a worker that is about to start misses the first.
      kill -TERM "$worker" 2> /dev/null
      sleep 1
    else
      wait "$worker"
      status=$?
    fi
  done
  [ -z "$stopped" ] || exit 0
  # A worker that lost its scheduler ends with exit code 0.
  [ "$status" -ne 0 ] || answered=$SECONDS
  if [ $((SECONDS - answered)) -ge "$patience" ]; then
    echo "worker.sh: no scheduler has answered for $patience s: $1" >&2
    exit 1
  fi
  echo "worker.sh: the worker ended with exit code $status; starting it again" >&2
  sleep 1
done
