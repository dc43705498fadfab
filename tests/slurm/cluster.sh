#!/usr/bin/env bash
# A Slurm cluster of two nodes on this host, for tests. Needs root, and Debian's packages slurm-wlm
# and munge.
#
# usage: tests/slurm/cluster.sh install       installs these packages where they are missing
#        tests/slurm/cluster.sh start FOLDER  starts a cluster whose files are in FOLDER
#        tests/slurm/cluster.sh stop FOLDER   ends it
#
# Jobs are submitted with SLURM_CONF=FOLDER/slurm.conf. Partition `high` takes nodes from partition
# `low`, whose jobs get their signal and a grace of 60 s.
# Exit codes: 0 done; 1 something failed; 2 the packages are missing, or this is not root.
set -euo pipefail

action=${1:-}
folder=${2:-}
PATH=$PATH:/usr/sbin

case $action in
    install)
        command -v slurmctld >/dev/null && command -v munged >/dev/null && exit 0
        export DEBIAN_FRONTEND=noninteractive
        apt-get update -q >/dev/null || true
        # Their daemons are started here, not by the packages.
        log=$(mktemp)
        apt-get install -y --no-install-recommends slurm-wlm slurm-wlm-basic-plugins munge >"$log" 2>&1 </dev/null || {
            tail -n 20 "$log" >&2
            exit 1
        }
        rm "$log"
        exit 0
        ;;
    stop)
        for pid in "$folder"/*.pid; do
            [ ! -e "$pid" ] || kill "$(cat "$pid")" 2>/dev/null || true
        done
        exit 0
        ;;
    start) ;;
    *)
        sed -n '2,/^set/{/^set/!s/^# \{0,1\}//p}' "$0" >&2
        exit 2
        ;;
esac

[ "$(id -u)" = 0 ] || { echo "cluster.sh: Slurm's daemons need root here" >&2; exit 2; }
for program in munged slurmctld slurmd; do
    command -v $program >/dev/null || { echo "cluster.sh: there is no \`$program\`" >&2; exit 2; }
done

mkdir -p "$folder"/state
folder=$(realpath "$folder")
host=$(hostname -s)
cores=$(nproc)

# munged insists on a socket's folder that only its user may write to.
install -d -o munge -g munge -m 711 "$folder/munge"
dd if=/dev/urandom of="$folder/munge/key" bs=1024 count=1 status=none
chown munge:munge "$folder/munge/key"
chmod 400 "$folder/munge/key"
setpriv --reuid munge --regid munge --clear-groups munged --force --key-file="$folder/munge/key" \
    --socket="$folder/munge/socket" --pid-file="$folder/munge/pid" --log-file="$folder/munge/log" \
    --seed-file="$folder/munge/seed"
cp "$folder/munge/pid" "$folder/munged.pid"

# A requeued job waits until its credential has expired, by default after two minutes.
cat >"$folder/slurm.conf" <<CONF
ClusterName=ship
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=17000
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket=$folder/munge/socket,cred_expire=5
CryptoType=crypto/munge
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool-%n
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd-%n.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
MpiDefault=pmix
ReturnToService=2
KillWait=10
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
NodeName=n[1-2] NodeHostname=$host NodeAddr=127.0.0.1 Port=[17001-17002] CPUs=$cores
PartitionName=low Nodes=ALL Default=YES PriorityTier=1 GraceTime=60 State=UP
PartitionName=high Nodes=ALL PriorityTier=10 PreemptMode=OFF State=UP
CONF
export SLURM_CONF=$folder/slurm.conf
slurmctld -i
for node in n1 n2; do
    slurmd -N $node
done
for _ in $(seq 100); do
    [ "$(sinfo --noheader --format=%T --nodes=n1,n2 --partition=low 2>/dev/null)" = idle ] && exit 0
    sleep 0.2
done
echo "cluster.sh: the nodes do not come up: $(sinfo 2>&1)" >&2
exit 1
