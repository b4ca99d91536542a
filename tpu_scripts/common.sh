# shellcheck shell=bash
# What the scripts of this folder share: flags, messages, calls of gcloud, the state of a slice, and
# work on all of its workers. Only sourced; written for bash 3.2 (macOS) and later.
# shellcheck disable=SC2034  # what is set here is read there

NAME=${W2S_TPU_NAME:-}
PROJECT=${W2S_TPU_PROJECT:-}
ZONE=${W2S_TPU_ZONE:-}
TYPE=${W2S_TPU_TYPE:-}
KIND=${W2S_TPU_KIND:-}
RUNTIME=${W2S_TPU_RUNTIME:-}
VIA=${W2S_TPU_VIA:-external}
POLL=${W2S_TPU_POLL:-15}
TRIES=${W2S_TPU_TRIES:-5}
PARALLEL=${W2S_TPU_PARALLEL:-16}
LOGS=${W2S_TPU_LOGS:-runs/tpu}
WHICH=all
DRY_RUN=
YES=

# EX_TEMPFAIL, as `w2s` itself ends on SIGTERM: the same command again goes on where it stopped.
PREEMPTED=75
# EX_UNAVAILABLE: the slice is there, but does not answer.
UNREACHABLE=69

SCRATCH=$(mktemp -d)
trap 'rm -rf "$SCRATCH"' EXIT

COMMON_HELP="\
Which slice (or the variable):
  --name NAME        its name                             W2S_TPU_NAME
  --project PROJECT  the Google Cloud project             W2S_TPU_PROJECT
  --zone ZONE        such as us-east5-b                   W2S_TPU_ZONE
Everywhere:
  --via WAY          ssh by external or internal address, or iap (default external; W2S_TPU_VIA)
  --poll SECONDS     between two looks (default 15; W2S_TPU_POLL)
  --tries N          calls of gcloud before a failure counts (default 5; W2S_TPU_TRIES)
  --parallel N       workers spoken to at once (default 16; W2S_TPU_PARALLEL)
  --dry-run          print the commands, ready to paste; call nothing
  --help             this text"

say() { printf '%s\n' "$*" >&2; }

die() {
    say "${0##*/}: error: $*"
    exit 1
}

usage_error() {
    say "${0##*/}: error: $*"
    exit 2
}

# quoted ARG..: one line that a POSIX shell reads back as these arguments.
quoted() {
    local word mark="'\\''" line=
    for word in "$@"; do
        case $word in
            '' | *[!A-Za-z0-9_./:=@%+,-]*) word="'${word//\'/$mark}'" ;;
        esac
        line+="${line:+ }$word"
    done
    printf '%s\n' "$line"
}

# call COMMAND ARG..: run it, or under --dry-run print it.
call() {
    if [[ $DRY_RUN ]]; then quoted "$@"; else "$@"; fi
}

need_value() { (($# > 1)) || usage_error "$1 needs a value"; }

# common_flag FLAG [VALUE] ..: take a flag that all scripts have; TAKEN says how many words it was.
common_flag() {
    TAKEN=2
    case $1 in
        --dry-run) DRY_RUN=1 TAKEN=1 ;;
        --yes) YES=1 TAKEN=1 ;;
        --help | -h) usage && exit 0 ;;
        --name) need_value "$@" && NAME=$2 ;;
        --project) need_value "$@" && PROJECT=$2 ;;
        --zone) need_value "$@" && ZONE=$2 ;;
        --via) need_value "$@" && VIA=$2 ;;
        --poll) need_value "$@" && POLL=$2 ;;
        --tries) need_value "$@" && TRIES=$2 ;;
        --parallel) need_value "$@" && PARALLEL=$2 ;;
        --logs) need_value "$@" && LOGS=$2 ;;
        *) return 1 ;;
    esac
}

# slice_flag FLAG [VALUE] ..: the same for what is to be created.
slice_flag() {
    TAKEN=2
    case $1 in
        --type) need_value "$@" && TYPE=$2 ;;
        --kind) need_value "$@" && KIND=$2 ;;
        --runtime) need_value "$@" && RUNTIME=$2 ;;
        *) return 1 ;;
    esac
}

# is_count VALUE FLAG: wrong usage unless it is a whole number above zero.
is_count() { [[ $1 =~ ^[1-9][0-9]*$ ]] || usage_error "$2 is a whole number above zero, not '$1'"; }

is_seconds() { [[ $1 =~ ^[0-9]+(\.[0-9]+)?$ ]] || usage_error "$2 is a number of seconds, not '$1'"; }

# check_common: what every script needs, before anything is called.
check_common() {
    [[ $NAME ]] || usage_error "which slice? --name NAME, or W2S_TPU_NAME"
    [[ $PROJECT ]] || usage_error "which project? --project PROJECT, or W2S_TPU_PROJECT"
    [[ $ZONE ]] || usage_error "which zone? --zone ZONE, or W2S_TPU_ZONE"
    [[ $NAME =~ ^[a-z]([a-z0-9-]*[a-z0-9])?$ ]] ||
        usage_error "a name has small letters, digits and hyphens, and begins with a letter: not '$NAME'"
    [[ $LOGS && $LOGS != -* ]] || usage_error "--logs needs a folder, not '$LOGS'"
    is_seconds "$POLL" --poll
    is_count "$TRIES" --tries
    is_count "$PARALLEL" --parallel
    CALL_TRIES=$TRIES
    where=(--project="$PROJECT" --zone="$ZONE")
    case $VIA in
        external) remote=(gcloud compute tpus tpu-vm) route=() ;;
        internal) remote=(gcloud compute tpus tpu-vm) route=(--internal-ip) ;;
        # Only the alpha commands tunnel.
        iap) remote=(gcloud alpha compute tpus tpu-vm) route=(--tunnel-through-iap) ;;
        *) usage_error "--via is external, internal or iap, not '$VIA'" ;;
    esac
    [[ $DRY_RUN ]] || command -v gcloud >/dev/null ||
        die "gcloud is not on the path: https://cloud.google.com/sdk/docs/install"
}

# read_type: from TYPE, an accelerator type (v6e-16) or a topology (v6e:4x4), the accelerator type,
# its CHIPS and VMS, and the RUNTIME where none was named. Wrong usage for what is neither.
read_type() {
    local family=${TYPE%%[-:]*} count shape=
    [[ $TYPE != tpu7x* ]] || usage_error "tpu7x is rented through GKE only: see gke.yaml"
    if [[ $TYPE =~ ^[a-z0-9]+:[1-9][0-9]*(x[1-9][0-9]*)+$ ]]; then
        shape=${TYPE#*:} && count=$((${shape//x/*}))
    elif [[ $TYPE =~ ^[a-z0-9]+-[1-9][0-9]*$ ]]; then
        count=${TYPE#*-}
    else
        usage_error "a type is such as v5litepod-16, v5p-128 or v6e-16, or v6e:4x4; not '$TYPE'"
    fi
    case $family in
        v5e | v5litepod) family=v5litepod && RUNTIME=${RUNTIME:-v2-alpha-tpuv5-lite} ;;
        v6e) RUNTIME=${RUNTIME:-v2-alpha-tpuv6e} ;;
        v5p) RUNTIME=${RUNTIME:-v2-alpha-tpuv5} ;;
        v2 | v3 | v4) RUNTIME=${RUNTIME:-tpu-ubuntu2204-base} ;;
        *) usage_error "a type is of the family v4, v5e (v5litepod), v5p or v6e, not '$TYPE'" ;;
    esac
    # v5e and v6e count chips, the others cores, two a chip; up to 8 chips of the former are one VM.
    case $family in
        v5litepod | v6e)
            CHIPS=$count VMS=$((count <= 8 ? 1 : count / 4))
            ;;
        *)
            [[ $shape ]] && count=$((2 * count))
            CHIPS=$((count / 2)) VMS=$((count <= 8 ? 1 : count / 8))
            ;;
    esac
    TYPE=$family-$count
    [[ -z $shape || $shape == "$(usual_shape)" ]] || usage_error \
        "$TYPE comes as $(usual_shape), not as $shape; use another topology, or gcloud by hand"
}

# usual_shape: the topology in which the accelerator type TYPE comes.
usual_shape() {
    case ${TYPE%-*}-$CHIPS in
        v5litepod-1 | v6e-1) echo 1x1 ;;
        v5litepod-4 | v6e-4) echo 2x2 ;;
        v5litepod-8 | v6e-8) echo 2x4 ;;
        v5litepod-16 | v6e-16) echo 4x4 ;;
        v5litepod-32 | v6e-32) echo 4x8 ;;
        v5litepod-64 | v6e-64) echo 8x8 ;;
        v5litepod-128 | v6e-128) echo 8x16 ;;
        v5litepod-256 | v6e-256) echo 16x16 ;;
        *-4) echo 2x2x1 ;;
        *-8) echo 2x2x2 ;;
        *-16) echo 2x2x4 ;;
        *-32) echo 2x4x4 ;;
        *-64) echo 4x4x4 ;;
        *-128) echo 4x4x8 ;;
        *-256) echo 4x8x8 ;;
        *-512) echo 8x8x8 ;;
        *-1024) echo 8x8x16 ;;
        *) echo "a shape that these scripts do not know" ;;
    esac
}

# last_error FILE: what gcloud complained of, in one line.
last_error() {
    local line words=
    while IFS= read -r line || [[ $line ]]; do
        [[ -z $words && $line != ERROR* ]] || words+="$line "
    done <"$1"
    [[ -s $1 ]] || words="no word from gcloud"
    printf '%s\n' "${words:0:400}"
}

# ask ARG..: gcloud's answer in ANSWER. Returns 3 where the thing does not exist, 1 where gcloud goes
# on failing (ERROR says how); passing faults are tried again.
ask() {
    local try
    for ((try = 1; ; try++)); do
        if ANSWER=$(gcloud "$@" 2>"$SCRATCH/ask"); then return 0; fi
        ERROR=$(last_error "$SCRATCH/ask")
        case $ERROR in
            *NOT_FOUND*"$NAME"* | *"$NAME"*"was not found"*) return 3 ;;
            *PERMISSION_DENIED* | *UNAUTHENTICATED* | *INVALID_ARGUMENT* | *"auth login"*) return 1 ;;
        esac
        ((try < TRIES)) || return 1
        say "gcloud failed, and is asked again in $POLL s: $ERROR"
        sleep "$POLL"
    done
}

# look: NODE and QUEUE, the states of the node and of the queued resource (MISSING where there is
# none), WORKERS, FOUND (the accelerator type), and what they make together, SLICE:
# missing, pending, ready, stopped or dead. Returns 1 where gcloud goes on failing.
look() {
    local status=0
    ask compute tpus tpu-vm describe "$NAME" "${where[@]}" \
        --format='csv[no-heading](state,networkEndpoints.len(),acceleratorType)' || status=$?
    case $status in
        0) IFS=, read -r NODE WORKERS FOUND <<<"$ANSWER" ;;
        3) NODE=MISSING WORKERS=0 FOUND= ;;
        *) return 1 ;;
    esac
    status=0
    ask compute tpus queued-resources describe "$NAME" "${where[@]}" --format='value(state.state)' ||
        status=$?
    case $status in
        0) QUEUE=${ANSWER:-UNKNOWN} ;;
        3) QUEUE=MISSING ;;
        *) return 1 ;;
    esac
    case $QUEUE/$NODE in
        FAILED/* | SUSPEND*/* | DELETING/* | */PREEMPTED | */TERMINATED | */DELETING) SLICE=dead ;;
        */READY) SLICE=ready ;;
        MISSING/MISSING) SLICE=missing ;;
        ACTIVE/MISSING) SLICE=dead ;; # deleted under its queued resource
        */STOP* | */HID*) SLICE=stopped ;;
        *) SLICE=pending ;;
    esac
}

# hand_on: what was named by flags, for the scripts that this one calls.
hand_on() {
    export W2S_TPU_NAME=$NAME W2S_TPU_PROJECT=$PROJECT W2S_TPU_ZONE=$ZONE W2S_TPU_VIA=$VIA
    export W2S_TPU_TYPE=$TYPE W2S_TPU_KIND=$KIND W2S_TPU_RUNTIME=$RUNTIME W2S_TPU_LOGS=$LOGS
    export W2S_TPU_POLL=$POLL W2S_TPU_TRIES=$TRIES W2S_TPU_PARALLEL=$PARALLEL
}

# describe_slice: the states, for messages.
describe_slice() {
    local text="node $NODE"
    [[ $QUEUE == MISSING ]] || text+=", queued resource $QUEUE"
    echo "$text"
}

look_or_die() { look || die "$ERROR"; }

# print_looks: what look calls, for --dry-run.
print_looks() {
    quoted gcloud compute tpus tpu-vm describe "$NAME" "${where[@]}" \
        --format='csv[no-heading](state,networkEndpoints.len(),acceleratorType)'
    quoted gcloud compute tpus queued-resources describe "$NAME" "${where[@]}" \
        --format='value(state.state)'
}

delete_queue() {
    call gcloud compute tpus queued-resources delete "$NAME" "${where[@]}" --force --quiet
}

delete_node() { call gcloud compute tpus tpu-vm delete "$NAME" "${where[@]}" --quiet; }

# remove_slice: after a look, delete the queued resource and the node, until another finds neither.
# Returns 1 where that cannot be had; NODE and QUEUE say what is left.
remove_slice() {
    local try
    for ((try = 1; ; try++)); do
        [[ $SLICE != missing ]] || return 0
        ((try <= TRIES)) || return 1
        ((try == 1)) || sleep "$POLL"
        if [[ $QUEUE != MISSING ]]; then
            delete_queue </dev/null >&2 || say "it is tried again in $POLL s"
        else
            delete_node </dev/null >&2 || say "it is tried again in $POLL s"
        fi
        look || return 1
    done
}

# confirm QUESTION: go on only where --yes was given or a person says so.
confirm() {
    local answer
    [[ -z $YES ]] || return 0
    [[ -t 0 ]] || usage_error "nobody to ask; --yes says yes: $1"
    read -r -p "$1 [y/N] " answer
    [[ $answer == [yY]* ]] || die "not done"
}

# ready_or_die: WORKERS of a slice that is ready; under --dry-run those of W2S_TPU_TYPE, or one.
ready_or_die() {
    if [[ $DRY_RUN ]]; then
        WORKERS=1
        print_looks
        if [[ $TYPE ]]; then
            read_type
            WORKERS=$VMS
        else
            echo "# below, worker 0 stands for all; with W2S_TPU_TYPE set, each is printed"
        fi
        return
    fi
    look_or_die
    case $SLICE in
        ready) ;;
        missing) die "there is no slice $NAME in $ZONE: create.sh makes one" ;;
        dead)
            say "${0##*/}: error: $NAME is gone ($(describe_slice)): create.sh --replace, or watch.sh"
            exit "$PREEMPTED"
            ;;
        *) die "$NAME is not ready ($(describe_slice)): create.sh waits for it" ;;
    esac
    [[ $WHICH == all ]] || ((WHICH < WORKERS)) ||
        die "there is no worker $WHICH: $NAME has $WORKERS, counted from 0"
}

# ssh_worker WORKER ARG..: run the command of these arguments on one worker.
ssh_worker() {
    local worker=$1
    shift
    call "${remote[@]}" ssh "$NAME" "${where[@]}" ${route[@]+"${route[@]}"} --worker="$worker" \
        --ssh-flag=-oServerAliveInterval=15 --quiet --command="$(quoted "$@")"
}

# scp_worker WORKER FILE TARGET: copy a file to one worker; TARGET is relative to its home.
scp_worker() {
    call "${remote[@]}" scp "$2" "$NAME:$3" "${where[@]}" ${route[@]+"${route[@]}"} \
        --worker="$1" --quiet
}

# on_worker WORKER ARG..: the same, told apart from a connection that failed, which is tried again:
# whatever arrived says `w2s-exit STATUS` first or last. Its output is in SCRATCH/WORKER.out.
# Returns the command's status, or 69 where the worker does not answer.
on_worker() {
    local worker=$1 try line status
    shift
    if [[ $DRY_RUN ]]; then
        ssh_worker "$worker" "$@"
        return
    fi
    for ((try = 1; ; try++)); do
        status=0
        ssh_worker "$worker" "$@" </dev/null >"$SCRATCH/$worker.out" 2>"$SCRATCH/$worker.err" ||
            status=$?
        line=$(grep -a -m 1 '^w2s-exit [0-9]' "$SCRATCH/$worker.out") || true
        if [[ $line ]]; then
            line=${line#w2s-exit }
            return "${line%% *}"
        fi
        ((status != 127)) || return 127 # there is no worker.sh
        ((try < CALL_TRIES)) || return "$UNREACHABLE"
        sleep "$POLL"
    done
}

# act ARG.. WORKER: one action of worker.sh.
act() {
    local worker=${!#}
    on_worker "$worker" bash w2s/worker.sh "${@:1:$#-1}"
}

# numbers: the workers' numbers, or the one that WHICH names.
numbers() {
    local worker
    if [[ $WHICH != all ]]; then
        echo "$WHICH"
        return
    fi
    for ((worker = 0; worker < WORKERS; worker++)); do
        echo "$worker"
    done
}

# check_which: whether WHICH is a number, or all.
check_which() {
    [[ $WHICH =~ ^(0|[1-9][0-9]*|all)$ ]] ||
        usage_error "which worker? --worker all, or a worker's number"
}

# each_worker COMMAND ARG..: run it with a worker's number behind it, for those of `numbers`, PARALLEL
# at a time. STATUS holds what each returned, WORST the largest.
each_worker() {
    local all first worker status pids
    # shellcheck disable=SC2207
    all=($(numbers))
    WORST=0
    STATUS=()
    for ((first = 0; first < ${#all[@]}; first += PARALLEL)); do
        pids=()
        for worker in "${all[@]:first:PARALLEL}"; do
            if [[ $DRY_RUN ]]; then
                "$@" "$worker"
                continue
            fi
            "$@" "$worker" &
            pids[worker]=$!
        done
        [[ $DRY_RUN ]] && continue
        for worker in "${!pids[@]}"; do
            status=0
            wait "${pids[worker]}" || status=$?
            STATUS[worker]=$status
            ((status <= WORST)) || WORST=$status
        done
    done
}

# complain WHAT: a line for each worker whose last command failed.
complain() {
    local worker
    for worker in "${!STATUS[@]}"; do
        case ${STATUS[worker]} in
            0) continue ;;
            127) say "worker $worker is not set up: setup.sh does it" ;;
            "$UNREACHABLE") say "worker $worker does not answer: $(last_error "$SCRATCH/$worker.err")" ;;
            *)
                say "worker $worker: $1 failed with status ${STATUS[worker]}; its last words:"
                grep -a -v '^w2s-exit ' "$SCRATCH/$worker.out" | tail -n 15 >&2 || true
                ;;
        esac
    done
}
