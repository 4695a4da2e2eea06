#!/usr/bin/env bash
# The trainer on hosts that ssh reaches without a password:
#     launch/ssh.sh host-a,host-b 8 --preset v3-16b --out /shared/runs/v3-16b …
# Hosts, processes on each, and what goes to dsv3_book.train. Every host must see this repository, --out and --data at
# the same paths. Ctrl-C, SIGTERM, or the end of one host's torchrun stops all of them; the trainer saves before it ends.
set -euo pipefail

if [ $# -lt 3 ]; then
    echo "usage: $0 HOST,HOST,… PROCESSES-PER-HOST ARGUMENTS-OF-DSV3_BOOK.TRAIN…" >&2
    exit 2
fi
IFS=, read -r -a hosts <<<"$1"
processes=$2
shift 2
root=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-$root/.venv/bin/python}
port=${PORT:-29400}

torchrun=(
    "$python" -m torch.distributed.run --nnodes "${#hosts[@]}" --nproc-per-node "$processes"
    --rdzv-backend c10d --rdzv-endpoint "${hosts[0]}:$port" --rdzv-id "$(date +%s)-$$" --max-restarts "${RESTARTS:-3}"
)
environment=(OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" TORCH_ELASTIC_SHUTDOWN_TIMEOUT=600)
for name in GLOO_SOCKET_IFNAME NCCL_SOCKET_IFNAME NCCL_DEBUG; do
    [ -z "${!name:-}" ] || environment+=("$name=${!name}")
done

# What runs on a host: the job, and beside it something that waits for our end of the connection to close. A signal
# can't be sent through ssh, and a killed ssh leaves its command running: this way it stops even if we are killed.
# shellcheck disable=SC2016  # to be expanded over there
there='exec 3<&0; cd "$1" && shift || exit 1
"$@" </dev/null 3<&- & job=$!
{ cat <&3 >/dev/null; kill -TERM $job; } 2>/dev/null & line=$!
wait $job; status=$?; kill $line 2>/dev/null; exit $status'
quoted() { # words as any shell over there reads them; bash's own printf %q is for bash alone
    local word mark="'" marked="'\\''"
    for word in "$@"; do printf "'%s' " "${word//"$mark"/"$marked"}"; done
}
command=$(quoted sh -c "$there" sh "$root" env "${environment[@]}" "${torchrun[@]}" -m dsv3_book.train "$@")

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
mkfifo "$folder/line"
exec 9<>"$folder/line" # held open here, and closed when this script ends, however it does
exec 8<"$folder/line"  # what the connections read: nothing, until that end
hang_up() { exec 9>&-; }
trap 'echo "asked to stop: waiting for the trainer to save" >&2; hang_up' INT TERM

pids=()
for number in "${!hosts[@]}"; do
    (
        set +e
        ssh -o BatchMode=yes "${hosts[number]}" "$command" <&8 2>&1 | sed -u "s/^/${hosts[number]}: /" >&2
        echo "${PIPESTATUS[0]}" >"$folder/$number"
    ) 9>&- & # what runs in the background ignores Ctrl-C, so the hosts' last words still come through
    pids[number]=$!
done

status=0
while [ "${#pids[@]}" -gt 0 ]; do
    wait -n || true # until a host has ended, or a signal has come
    for number in "${!pids[@]}"; do
        kill -0 "${pids[number]}" 2>/dev/null && continue
        ended=$(cat "$folder/$number" 2>/dev/null || echo 1)
        unset "pids[number]"
        if [ "$ended" -ne 0 ] && [ "$status" -eq 0 ]; then
            status=$ended
            echo "${hosts[number]} ended with status $ended: stopping the others" >&2
            hang_up
        fi
    done
done
exit "$status"
