#!/usr/bin/env bash
# Sees a command through on a slice that can be taken away: rents it, sets it up, runs the command,
# and does so again after a preemption, a bounded number of times.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
# shellcheck source=tpu_scripts/common.sh
. "$here/common.sh"

usage() {
    cat <<END
Usage: watch.sh --name NAME --project PROJECT --zone ZONE --type TYPE --kind KIND --source SOURCE
                [FLAG..] -- COMMAND ARG..
Rents the slice where it is missing, sets it up, runs the command on all workers and follows it. Where
the slice is taken away, or the workers were told to stop (status 75), it is deleted, rented and set
up anew and the command started again, which must go on where it stopped. A command that fails on a
slice in good health ends the watch with its status. Call it again after it was stopped itself: it
takes up the run that is under way.

  --type, --kind, --runtime, --gcloud-flag, --timeout   as for create.sh
  --source, --env-file, --mount, --no-check             as for setup.sh
  --run, --grace, --show, --logs                        as for run.sh
  --sync PATH=gs://B/P     before the command, copy each worker's share (gs://B/P/worker-0, ..) to
                           PATH; while it runs and at its end copy PATH back; again for more
  --sync-every SECONDS     how often (default 60)
  --max-restarts N         then give up, with status 75 (default 20)
  --backoff SECONDS        before the first restart; doubled each time, up to 900 (default 30), and
                           back to this after a run of an hour
  --settle SECONDS         after a failure, how long a preemption has to show itself (default 90)
  --restart-on-failure     start again after any failure
  --delete-at-end          delete the slice at the end, whichever it is
  --yes                    do not ask
$COMMON_HELP
END
}

MAX=20
BACKOFF=30
SETTLE=90
EVERY=60
RUN=main
ALWAYS=
DELETE=
CREATE=()
SETUP=()
FOLLOW=()
SYNC=()
COMMAND=()
while (($#)); do
    case $1 in --*=*) set -- "${1%%=*}" "${1#*=}" "${@:2}" ;; esac
    if common_flag "$@" || slice_flag "$@"; then
        shift "$TAKEN"
        continue
    fi
    case $1 in
        --gcloud-flag | --timeout) need_value "$@" && CREATE+=("$1" "$2") && shift 2 ;;
        --source | --env-file | --mount) need_value "$@" && SETUP+=("$1" "$2") && shift 2 ;;
        --no-check) SETUP+=("$1") && shift ;;
        --run) need_value "$@" && RUN=$2 && shift 2 ;;
        --grace | --show) need_value "$@" && FOLLOW+=("$1" "$2") && shift 2 ;;
        --sync) need_value "$@" && SYNC+=("$2") && shift 2 ;;
        --sync-every) need_value "$@" && EVERY=$2 && shift 2 ;;
        --max-restarts) need_value "$@" && MAX=$2 && shift 2 ;;
        --backoff) need_value "$@" && BACKOFF=$2 && shift 2 ;;
        --settle) need_value "$@" && SETTLE=$2 && shift 2 ;;
        --restart-on-failure) ALWAYS=1 && shift ;;
        --delete-at-end) DELETE=1 && shift ;;
        --) shift && COMMAND=("$@") && break ;;
        *) usage_error "what is '$1'? the command stands behind --; --help lists the flags" ;;
    esac
done
check_common
((${#COMMAND[@]})) || usage_error "which command? it stands behind --"
for number in "$MAX" "$BACKOFF" "$SETTLE"; do
    [[ $number =~ ^[0-9]+$ ]] ||
        usage_error "--max-restarts, --backoff and --settle take whole numbers, not '$number'"
done
is_count "$EVERY" --sync-every
for pair in ${SYNC[@]+"${SYNC[@]}"}; do
    [[ $pair == ?*=gs://?* ]] || usage_error "--sync takes PATH=gs://BUCKET/.., not '$pair'"
done
hand_on
# What is wrong with the other scripts' flags shows before anything is rented.
for script in create setup run; do
    case $script in
        create) set -- ${CREATE[@]+"${CREATE[@]}"} ;;
        setup) set -- ${SETUP[@]+"${SETUP[@]}"} ;;
        run) set -- --run "$RUN" ${FOLLOW[@]+"${FOLLOW[@]}"} -- "${COMMAND[@]}" ;;
    esac
    "$here/$script.sh" --dry-run "$@" >"$SCRATCH/$script" || exit $?
done

# sync_each ARG..: copy.sh for every --sync, with PATH and URL put in for %p and %u.
sync_each() {
    local pair index=0 word words
    for pair in ${SYNC[@]+"${SYNC[@]}"}; do
        words=()
        for word in "$@"; do
            case $word in
                %p) word=${pair%%=gs://*} ;;
                %u) word=gs://${pair#*=gs://} ;;
                %r) word=$RUN-sync-$index ;;
            esac
            words+=("$word")
        done
        "$here/copy.sh" ${DRY_RUN:+--dry-run} --worker all "${words[@]}" || return
        index=$((index + 1))
    done
}

stop_syncing() {
    local index
    for ((index = 0; index < ${#SYNC[@]}; index++)); do
        "$here/run.sh" ${DRY_RUN:+--dry-run} --run "$RUN-sync-$index" --stop --grace 30 || return
    done
}

if [[ $DRY_RUN ]]; then
    echo "# create.sh: rent the slice"
    cat "$SCRATCH/create"
    echo "# setup.sh"
    cat "$SCRATCH/setup"
    [[ ${#SYNC[@]} == 0 ]] || echo "# copy.sh: what an earlier run left, and then what this one writes"
    sync_each --if-any down %u %p
    sync_each --every "$EVERY" --run %r up %p %u
    echo "# run.sh: the command"
    cat "$SCRATCH/run"
    [[ ${#SYNC[@]} == 0 ]] || echo "# copy.sh, for the last time"
    stop_syncing
    sync_each up %p %u
    echo "# after a preemption, delete.sh and all of it again, at most $MAX times"
    [[ -z $DELETE ]] || echo "# at the end, delete.sh"
    exit
fi

read_type
confirm "Rent $TYPE in $ZONE, $KIND, now and again up to $MAX times, each until it is taken away?"
trap 'say "watch.sh: stopped; $NAME stays, and costs money: delete.sh deletes it"; exit 130' INT TERM

# once: one life of the slice. STAGE says how far it came.
once() {
    local found status=0
    STAGE=create
    "$here/create.sh" --yes --replace ${CREATE[@]+"${CREATE[@]}"} || return
    STAGE=setup
    found=$("$here/run.sh" --run "$RUN" --status 2>"$SCRATCH/status") || status=$?
    # 127: a new machine, on which nothing can be under way.
    ((status == 0 || status == 127)) || return "$status"
    if [[ $found == *running* ]]; then
        say "run '$RUN' is under way already"
        STAGE=run
        "$here/run.sh" --run "$RUN" ${FOLLOW[@]+"${FOLLOW[@]}"} --attach || return
        return 0
    fi
    "$here/setup.sh" ${SETUP[@]+"${SETUP[@]}"} || return
    sync_each --if-any down %u %p || return
    sync_each --every "$EVERY" --run %r up %p %u || return
    STAGE=run
    "$here/run.sh" --run "$RUN" ${FOLLOW[@]+"${FOLLOW[@]}"} -- "${COMMAND[@]}"
}

# passing STATUS: whether starting again may help.
passing() {
    local since=$SECONDS
    [[ $STAGE == run && -z $ALWAYS ]] || return 0
    (($1 != PREEMPTED && $1 != UNREACHABLE)) || return 0
    # A worker dies some time before its slice is said to be taken away.
    while :; do
        if look && [[ $SLICE != ready ]]; then return 0; fi
        ((SECONDS - since < SETTLE)) || return 1
        sleep "$POLL"
    done
}

finish() {
    if [[ $DELETE ]]; then
        "$here/delete.sh" --yes || say "watch.sh: $NAME may still be there, and cost money: see above"
    else
        say "$NAME stays, and costs money until delete.sh has deleted it"
    fi
    exit "$1"
}

restarts=0
pause=$BACKOFF
while :; do
    began=$SECONDS
    status=0
    once || status=$?
    if [[ $STAGE == run && ${#SYNC[@]} != 0 ]] && look && [[ $SLICE == ready ]]; then
        if ! { stop_syncing && sync_each up %p %u; }; then
            say "the last copy failed: the machines may hold more than the bucket"
            ((status != 0)) || status=$UNREACHABLE
        fi
    fi
    ((status != 0)) || { say "done after $restarts restarts" && finish 0; }
    ((status != 2)) || [[ $STAGE == run ]] || exit 2
    if ! passing "$status"; then
        say "watch.sh: error: the command failed with status $status, on a slice in good health"
        finish "$status"
    fi
    if ((restarts >= MAX)); then
        say "watch.sh: error: given up after $restarts restarts (last status $status, at $STAGE)"
        finish "$PREEMPTED"
    fi
    restarts=$((restarts + 1))
    [[ $STAGE != run ]] || ((SECONDS - began < 3600)) || pause=$BACKOFF
    say "restart $restarts of $MAX in $pause s (status $status, at $STAGE)"
    sleep "$pause"
    pause=$((pause < 450 ? 2 * pause : 900))
    ((pause > 0)) || pause=1
done
