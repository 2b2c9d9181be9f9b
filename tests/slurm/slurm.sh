#!/usr/bin/env bash
# A real SLURM on one machine for tests: munged, slurmctld and two slurmd, without systemd. Run it as root.
#   apt-get install --no-install-recommends slurmctld slurmd slurm-client slurm-wlm-basic-plugins munge
#   slurm.sh start FOLDER      then: export SLURM_CONF=FOLDER/slurm.conf
#   slurm.sh stop FOLDER
# All state lies in FOLDER, and all daemons listen on loopback. Each node has two cores and two fake GPUs: devices
# whose names end in a number, which is what CUDA_VISIBLE_DEVICES is made from.
set -euo pipefail
[ $# -eq 2 ] || { sed -n 2,6p "$0" >&2; exit 2; }
command=$1 folder=$(realpath -m "$2") host=$(hostname -s)
export SLURM_CONF=$folder/slurm.conf
socket=$folder/munge/socket

# Three that are free now: SLURM takes none of its own accord, and another of these may be running.
free_ports() {
  python3 -c '
import socket
sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(3)]
print(*(s.getsockname()[1] for s in sockets))'
}

write_configuration() {
  read -r port port1 port2 <<< "$(free_ports)"
  cat > "$SLURM_CONF" <<CONF
ClusterName=test
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$port
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$socket
CredType=cred/munge
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool/%n
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd-%n.pid
SlurmctldLogFile=$folder/log/slurmctld.log
SlurmdLogFile=$folder/log/slurmd-%n.log
# Neither cgroups nor an accounting data base.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
# Jobs start at once, and what is cancelled is killed 10 s after its SIGTERM.
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,batch_sched_delay=0
KillWait=10
ReturnToService=2
SlurmdTimeout=10
# Nodes have what is written here, whatever the machine has.
SlurmdParameters=config_overrides
GresTypes=gpu
NodeName=n1 NodeHostname=$host NodeAddr=127.0.0.1 Port=$port1 CPUs=2 RealMemory=8000 Gres=gpu:2
NodeName=n2 NodeHostname=$host NodeAddr=127.0.0.1 Port=$port2 CPUs=2 RealMemory=8000 Gres=gpu:2
# Jobs go to the node with the least to do, so that two run on two.
PartitionName=debug Nodes=ALL Default=YES LLN=YES MaxTime=INFINITE State=UP
CONF
  ln -sfn /dev/null "$folder/gpu0"
  ln -sfn /dev/null "$folder/gpu1"
  echo "NodeName=n[1-2] Name=gpu File=$folder/gpu[0-1]" > "$folder/gres.conf"
}

start() {
  mkdir -p "$folder"/{state,log,munge,spool/n1,spool/n2}
  write_configuration
  # A munged of our own beside any that the machine has. --force: the folder may lie in a temporary one.
  mungekey --create --force --keyfile "$folder/munge/key"
  munged --force --socket "$socket" --key-file "$folder/munge/key" --pid-file "$folder/munged.pid" \
    --seed-file "$folder/munge/seed" --log-file "$folder/log/munged.log" 2>> "$folder/log/munged.log"
  slurmctld -c
  slurmd -N n1
  slurmd -N n2
  SECONDS=0
  while [ "$SECONDS" -lt 30 ]; do  # without a slurmctld, sinfo itself would try for minutes
    [ "$(timeout 5 sinfo --noheader --Node --states=idle 2> /dev/null | wc -l)" = 2 ] && return
    sleep 0.25
  done
  echo "slurm.sh: no two idle nodes after 30 s" >&2
  timeout 5 sinfo --long --Node >&2 || true
  tail -n 20 "$folder"/log/*.log >&2
  exit 1
}

stop() {
  timeout 5 scancel --quiet --user root --signal KILL 2> /dev/null || true
  timeout 5 scancel --quiet --user root 2> /dev/null || true
  for _ in $(seq 60); do
    [ -z "$(timeout 5 squeue --noheader 2> /dev/null)" ] && break
    sleep 0.25
  done
  local pids=()
  for name in slurmd-n1 slurmd-n2 slurmctld munged; do
    [ -s "$folder/$name.pid" ] && pids+=("$(cat "$folder/$name.pid")")
  done
  for pid in "${pids[@]}"; do kill "$pid" 2> /dev/null || true; done
  for _ in $(seq 60); do
    kill -0 "${pids[@]}" 2> /dev/null || return 0  # fails once all are gone
    sleep 0.25
  done
  echo "slurm.sh: one of the processes ${pids[*]} is there still, 15 s after SIGTERM" >&2
  exit 1
}

case $command in
start) start ;;
stop) stop ;;
*) sed -n 2,6p "$0" >&2; exit 2 ;;
esac
