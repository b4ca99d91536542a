#!/usr/bin/env bash
# Runs one command on all workers of a slice, and follows it: logs per worker there and here. The
# command outlives the connection; --attach takes it up again.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
# shellcheck source=tpu_scripts/common.sh
. "$here/common.sh"

usage() {
    cat <<END
Usage: run.sh --name NAME --project PROJECT --zone ZONE [FLAG..] -- COMMAND ARG..
       run.sh .. --attach | --status | --stop
Starts the command on every worker, in ~/w2s, with the package's environment, each argument as it
is written (for a pipeline: -- bash -c '..'), and follows it to its end. Ctrl-C, or a connection that
breaks, leaves it running. Ends with the status of the workers that failed by themselves, the largest
of these: 75 where the slice was taken away or the workers were told to stop, 69 where it does not
answer.

  --run RUN          a name for this command (default main); two of them run side by side only
                     where one leaves the chips alone
  --worker WHICH     one worker's number, for what needs no chips (default all); --attach, --status
                     and --stop of such a command take it too
  --detach           start it and come back
  --attach           follow the one that was started
  --status           a line for each worker: running, exit:STATUS, lost or none
  --stop             SIGTERM to all workers, and SIGKILL after the grace
  --grace SECONDS    what workers have to end after SIGTERM, and after another one failed
                     (default 120)
  --show WORKER      whose log is shown (default 0, or the one of --worker; none shows no log)
  --logs FOLDER      FOLDER/NAME/RUN/worker-0.log, .. (default runs/tpu; W2S_TPU_LOGS)
$COMMON_HELP
END
}

RUN=main
ACTION=
GRACE=120
SHOW=
STOPPED=()
COMMAND=()
while (($#)); do
    case $1 in --*=*) set -- "${1%%=*}" "${1#*=}" "${@:2}" ;; esac
    if common_flag "$@"; then
        shift "$TAKEN"
        continue
    fi
    case $1 in
        --run) need_value "$@" && RUN=$2 && shift 2 ;;
        --grace) need_value "$@" && GRACE=$2 && shift 2 ;;
        --show) need_value "$@" && SHOW=$2 && shift 2 ;;
        --worker) need_value "$@" && WHICH=$2 && shift 2 ;;
        --detach | --attach | --status | --stop)
            [[ -z $ACTION ]] || usage_error "--$ACTION or $1, not both"
            ACTION=${1#--} && shift
            ;;
        --) shift && COMMAND=("$@") && break ;;
        *) usage_error "what is '$1'? the command stands behind --; --help lists the flags" ;;
    esac
done
check_common
[[ $RUN =~ ^[A-Za-z0-9][A-Za-z0-9._-]*$ ]] ||
    usage_error "--run takes letters, digits, dots, underscores and hyphens, not '$RUN'"
[[ $GRACE =~ ^(0|[1-9][0-9]*)$ ]] || usage_error "--grace is a whole number of seconds, not '$GRACE'"
check_which
SHOW=${SHOW:-${WHICH/all/0}}
[[ $SHOW =~ ^(0|[1-9][0-9]*|none)$ ]] || usage_error "--show takes a worker's number or none, not '$SHOW'"
case $ACTION in
    '' | detach) ((${#COMMAND[@]})) || usage_error "which command? it stands behind --" ;;
    *) ((${#COMMAND[@]} == 0)) || usage_error "--$ACTION takes no command" ;;
esac
FOLDER=$LOGS/$NAME/$RUN

# read_worker WORKER: append what is new of its log, and leave its state in SCRATCH/WORKER.state.
# shellcheck disable=SC2329  # each_worker calls it
read_worker() {
    local worker=$1 from=0 to size state status=0
    if [[ $DRY_RUN ]]; then
        act read "$RUN" 0 "$worker"
        return
    fi
    [[ ! -e $FOLDER/.offset-$worker ]] || from=$(<"$FOLDER/.offset-$worker")
    act read "$RUN" "$from" "$worker" || status=$?
    ((status == 0)) || return "$status"
    read -r _ _ state from to size <<<"$(grep -a -m 1 '^w2s-exit ' "$SCRATCH/$worker.out")"
    if ((to > from)); then
        tail -c $((to - from)) "$SCRATCH/$worker.out" >"$SCRATCH/$worker.new"
        # A connection that broke on the way is asked again from the same byte.
        (($(wc -c <"$SCRATCH/$worker.new") == to - from)) || return "$UNREACHABLE"
        cat "$SCRATCH/$worker.new" >>"$FOLDER/worker-$worker.log"
        [[ $SHOW != "$worker" ]] || cat "$SCRATCH/$worker.new"
    fi
    echo "$to" >"$FOLDER/.offset-$worker"
    # An end counts when the whole log is here.
    [[ $to == "$size" || $state != exit:* ]] || state=running
    echo "$state" >"$SCRATCH/$worker.state"
}

stop_all() {
    each_worker act stop "$RUN" "$GRACE"
    [[ $DRY_RUN ]] || complain "stop"
}

# die_if_gone: end where the slice was taken away; a gcloud that fails is no answer.
die_if_gone() {
    if look && [[ $SLICE == dead || $SLICE == missing || $SLICE == stopped ]]; then
        say "$NAME was taken away: $(describe_slice)"
        exit "$PREEMPTED"
    fi
}

# begin_logs: a line of each worker's log here that parts this run from the one before.
begin_logs() {
    local worker log
    mkdir -p "$FOLDER"
    for worker in $(numbers); do
        log=$FOLDER/worker-$worker.log
        touch "$log"
        wc -c <"$log" >"$FOLDER/.begin-$worker"
        echo "== $(date -u +%Y-%m-%dT%H:%M:%SZ) $(quoted "${COMMAND[@]}")" >>"$log"
        echo 0 >"$FOLDER/.offset-$worker"
    done
}

start_all() {
    local worker
    each_worker act start "$RUN" "$(date +%s)-$$" "${COMMAND[@]}"
    [[ ! $DRY_RUN ]] || return 0
    if ((WORST == 0)); then
        begin_logs
        return
    fi
    die_if_gone
    complain "start"
    for worker in "${!STATUS[@]}"; do
        case ${STATUS[worker]} in
            17) die "run '$RUN' is under way on $NAME: --attach follows it, --stop ends it" ;;
            127) die "$NAME is not set up: setup.sh does it" ;;
        esac
    done
    say "the others are stopped"
    CALL_TRIES=1
    stop_all
    exit "$WORST"
}

# states: STATES, one of each worker, from the files that read_worker left.
states() {
    local worker
    STATES=()
    for worker in $(numbers); do
        STATES[worker]=unknown
        [[ ! -e $SCRATCH/$worker.state ]] || STATES[worker]=$(<"$SCRATCH/$worker.state")
    done
}

# follow: until every worker has ended; a worker that fails gives the others GRACE seconds.
follow() {
    local failures=0 failed_at='' worker ended failed
    CALL_TRIES=1
    while :; do
        each_worker read_worker
        if ((WORST > 0)); then
            failures=$((failures + 1))
            die_if_gone
            if ((failures >= TRIES)); then
                complain "read"
                say "$NAME does not answer; the run may be going on: --attach looks again"
                exit "$UNREACHABLE"
            fi
        else
            failures=0
        fi
        states
        ended=0 failed=
        for worker in "${!STATES[@]}"; do
            case ${STATES[worker]} in
                exit:0) ended=$((ended + 1)) ;;
                exit:* | lost | none) ended=$((ended + 1)) failed=$worker ;;
            esac
        done
        ((ended < ${#STATES[@]})) || return 0
        if [[ $failed && -z $failed_at ]]; then
            say "worker $failed ended (${STATES[failed]}); the others have $GRACE s to do so"
            failed_at=$SECONDS
        elif [[ $failed_at ]] && ((SECONDS - failed_at >= GRACE)); then
            say "they did not, and are stopped"
            for worker in "${!STATES[@]}"; do
                [[ ${STATES[worker]} != running ]] || STOPPED[worker]=1
            done
            stop_all
            failed_at=$SECONDS
        fi
        sleep "$POLL"
    done
}

# blame: BLAMED, the workers to which a failure is owed, and BLAME, the largest status of theirs.
# Machines that were started anew come before commands that failed, and those before commands that
# were told to stop; what `follow` stopped is owed to others.
blame() {
    local worker status rank highest=0
    BLAMED=() BLAME=0
    for worker in "${!STATES[@]}"; do
        status=${STATES[worker]#exit:}
        case $status in
            0) continue ;;
            "$PREEMPTED") rank=2 ;;
            lost | none | unknown) rank=4 status=$PREEMPTED ;;
            *) rank=3 ;;
        esac
        ((rank == 4)) || [[ -z ${STOPPED[worker]:-} ]] || rank=1
        ((rank >= highest)) || continue
        ((rank == highest)) || BLAMED=() BLAME=0
        highest=$rank
        BLAMED+=("$worker")
        ((status <= BLAME)) || BLAME=$status
    done
}

# conclude: a line for each worker, the end of the logs that tell of a failure, its status.
conclude() {
    local worker begin
    for worker in "${!STATES[@]}"; do
        say "worker $worker: ${STATES[worker]}"
    done
    blame
    for worker in ${BLAMED[@]+"${BLAMED[@]:0:3}"}; do
        [[ $SHOW != "$worker" ]] || continue
        begin=0
        [[ ! -e $FOLDER/.begin-$worker ]] || begin=$(<"$FOLDER/.begin-$worker")
        say "the end of worker $worker's log:"
        tail -c "+$((begin + 1))" "$FOLDER/worker-$worker.log" | tail -n 15 >&2
    done
    say "logs: $FOLDER"
    exit "$BLAME"
}

ready_or_die
case $ACTION in
    stop)
        stop_all
        [[ $DRY_RUN ]] || ((WORST > 0)) || say "run '$RUN' is not under way any more"
        exit "$WORST"
        ;;
    status)
        mkdir -p "$FOLDER"
        SHOW=none
        each_worker read_worker
        [[ ! $DRY_RUN ]] || exit 0
        complain "read"
        states
        for worker in "${!STATES[@]}"; do
            echo "worker $worker: ${STATES[worker]}"
        done
        exit "$WORST"
        ;;
    attach) [[ $DRY_RUN ]] || mkdir -p "$FOLDER" ;;
    *)
        start_all
        if [[ $ACTION == detach ]]; then
            [[ $DRY_RUN ]] || say "run '$RUN' is under way on ${#STATUS[@]} of $WORKERS workers: --attach follows it"
            exit
        fi
        ;;
esac
if [[ $DRY_RUN ]]; then
    echo "# then these, from where the log ended before, every $POLL s until every worker has ended"
    each_worker read_worker
    exit
fi
follow
if [[ $ACTION == attach && "${STATES[*]}" != *exit* && "${STATES[*]}" != *lost* ]]; then
    die "there is no run '$RUN' on $NAME"
fi
conclude
