#!/usr/bin/env bash
# A gcloud for tests: records its calls, plays states, and runs what ssh is told on this machine.
#
# Its folder is W2S_STUB. `calls` holds the words of every call, parted by U+001F, and U+001E behind
# each call; `node`, `queue` and `create` hold answers, a line each, of which the last stays; every
# worker is a folder with a home of its own, and `bucket/` stands for Cloud Storage. An answer
# `ERROR words` is a call that fails with these words.
#
# It starts some thousand times in a run of the tests, so it is bash, and forks only where it must.
set -eu
cd "$W2S_STUB"
there=$OLDPWD

fail() {
    printf 'ERROR: (gcloud) %s\n' "$1" >&2
    exit 1
}

# flag NAME ARG..: FLAG, the value of --NAME=VALUE.
flag() {
    local name=$1 word
    shift
    for word in "$@"; do
        [[ $word != "--$name="* ]] || { FLAG=${word#*=} && return; }
    done
    fail "no --$name"
}

put() {
    local name=$1
    shift
    printf '%s\n' "$@" >"$name.$$"
    mv "$name.$$" "$name"
}

# take NAME: ANSWER, the next answer; the last one stays.
take() {
    local lines
    mapfile -t lines <"$1"
    if ((${#lines[@]} > 1)); then
        {
            flock 9
            mapfile -t lines <"$1"
            ((${#lines[@]} == 1)) || put "$1" "${lines[@]:1}"
        } 9>lock
    fi
    ANSWER=${lines[0]:-ERROR INTERNAL: the state is being written}
    [[ $ANSWER != "ERROR "* ]] || fail "${ANSWER#ERROR }"
}

# wipe: what a deleted machine leaves behind: no process and no disk.
wipe() {
    local pid_file pid
    for pid_file in worker-*/w2s/runs/*/pid; do
        [[ ! -e $pid_file ]] || { read -r pid _ <"$pid_file" && kill -KILL -- "-$pid" || true; }
    done 2>/dev/null
    rm -rf worker-*
}

not_found() { fail "NOT_FOUND: Resource 'projects/p/locations/z/$1/$2' was not found"; }

node() {
    case $1 in
        describe)
            take node
            [[ $ANSWER != MISSING ]] || not_found nodes "$2"
            read -r workers <"$W2S_STUB/workers" || true
            read -r type <"$W2S_STUB/type" || true
            printf '%s,%d,%s\n' "$ANSWER" "$workers" "$type"
            ;;
        create)
            flag accelerator-type "$@"
            take create
            put node CREATING READY
            put type "$FLAG"
            echo "$ANSWER"
            ;;
        delete)
            [[ $(<node) != MISSING* ]] || not_found nodes "$2"
            put node MISSING
            wipe
            ;;
        list) cat others ;;
    esac
}

queue() {
    case $1 in
        describe)
            take queue
            [[ $ANSWER != MISSING ]] || not_found queuedResources "$2"
            echo "$ANSWER"
            ;;
        create)
            flag accelerator-type "$@"
            take create
            put queue WAITING_FOR_RESOURCES PROVISIONING ACTIVE
            put node MISSING CREATING READY
            put type "$FLAG"
            ;;
        delete)
            put queue MISSING
            put node MISSING
            wipe
            ;;
    esac
}

# go_home ARG..: into the home of the one worker that ssh and scp speak to.
go_home() {
    local state
    read -r state <node || true
    [[ $state == READY ]] || fail "the TPU is in state $state"
    if [[ -e ssh ]]; then
        take ssh
        [[ $ANSWER == ok ]] || fail "[/usr/bin/ssh] exited with return code [255]."
    fi
    flag worker "$@"
    export HOME=$W2S_STUB/worker-$FLAG STUB_WORKER=worker-$FLAG
    [[ -d $HOME ]] || mkdir -p "$HOME"
    cd "$HOME"
}

# storage VERB FROM [TO]: ls, cp and rsync between `bucket/` and the working folder.
storage() {
    [[ ! -e storage ]] || take storage
    cd "$there"
    local verb=$1 paths=() word
    shift
    for word in "$@"; do
        [[ $word == --* ]] || paths+=("${word/#gs:\/\//$W2S_STUB/bucket/}")
    done
    case $verb in
        ls)
            [[ -e ${paths[0]} ]] || fail "One or more URLs matched no objects."
            [[ -f ${paths[0]} ]] && echo "$1" || echo "$1/.."
            ;;
        cp)
            mkdir -p "${paths[1]%/*}"
            cp "${paths[@]}"
            ;;
        rsync)
            mkdir -p "${paths[1]}"
            cp -r "${paths[0]}/." "${paths[1]}"
            ;;
    esac
}

IFS=$'\x1f'
printf '%s\x1e' "$*" >>calls
unset IFS
[[ $1 != alpha ]] || shift
case "$1 $2 $3" in
    "compute tpus tpu-vm")
        case $4 in
            ssh)
                go_home "$@"
                flag command "$@"
                # gcloud splits at spaces what ssh joins again: as it is, the login shell reads it.
                exec bash -c "$FLAG"
                ;;
            scp)
                cd "$there"
                from=$(realpath "$5")
                cd "$W2S_STUB"
                go_home "$@"
                cp "$from" "${6#*:}"
                ;;
            *) node "${@:4}" ;;
        esac
        ;;
    "compute tpus queued-resources") queue "${@:4}" ;;
    "storage "*) storage "${@:2}" ;;
    *) fail "what is $*?" ;;
esac
