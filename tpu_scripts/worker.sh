#!/usr/bin/env bash
# The worker's side: setup.sh puts it on every worker as ~/w2s/worker.sh, the other scripts call it.
# Each call prints `w2s-exit STATUS`, by which they know that it was reached.
set -euo pipefail
[[ $0 != */* ]] || cd "${0%/*}"

usage() {
    cat <<'END'
Usage: bash w2s/worker.sh ACTION ARG..   (called by the other scripts; on a worker of the slice)
  install KIND WHAT ID   put the package into w2s/venv, unless ID is what it holds
  mount BUCKET PREFIX    mount a bucket at w2s/bucket
  start RUN TOKEN ARG..  start a command that outlives the connection
  read RUN OFFSET        its state, and what its log holds from this byte
  stop RUN SECONDS       SIGTERM, and SIGKILL after so many seconds
  up PATH URL            copy a folder or file to a bucket
  down URL PATH [any]    copy it back; with `any`, nothing there is no error
  loop PATH URL SECONDS  copy a folder up again and again
END
}

BOOT=unknown
[[ ! -r /proc/sys/kernel/random/boot_id ]] || read -r BOOT </proc/sys/kernel/random/boot_id

# state FOLDER: none, running, exit:STATUS, or lost (the machine or the supervisor died).
state() {
    local pid born
    if [[ -e $1/status ]]; then
        echo "exit:$(<"$1/status")"
    elif [[ ! -e $1/pid ]]; then
        echo none
    elif read -r pid born <"$1/pid" && [[ $born == "$BOOT" ]] && kill -0 "$pid" 2>/dev/null; then
        echo running
    elif [[ -e $1/status ]]; then # it ended between the two looks
        echo "exit:$(<"$1/status")"
    else
        echo lost
    fi
}

find_python() {
    local version
    for version in 3.12 3.13 3.11; do
        if command -v "python$version" >/dev/null && "python$version" -c 'import ensurepip' 2>/dev/null
        then
            echo "python$version"
            return
        fi
    done
    return 1
}

# The images of v5 and v6 slices have Python 3.10; uv brings a newer one without root.
make_venv() {
    local python
    if python=$(find_python); then
        "$python" -m venv venv
        return
    fi
    if [[ ! -x bin/uv ]]; then
        curl -LsSf https://astral.sh/uv/install.sh | env UV_INSTALL_DIR="$PWD/bin" UV_NO_MODIFY_PATH=1 sh
    fi
    bin/uv venv --seed --python 3.12 venv
}

install_package() {
    local kind=$1 what=$2 identity=$3 source
    if [[ -e installed && $(<installed) == "$identity" ]] && venv/bin/python -c 'import w2s_jax'; then
        echo "already installed: $identity"
        return
    fi
    rm -f installed
    case $kind in
        git) source=$what ;;
        wheel) source=file://$PWD/source/$what ;;
        checkout)
            rm -rf source/checkout
            mkdir -p source/checkout
            tar -xzf "source/$what" -C source/checkout
            source=file://$PWD/source/checkout
            ;;
    esac
    venv/bin/python -c 'import sys; assert sys.version_info >= (3, 11)' 2>/dev/null || {
        rm -rf venv
        make_venv
    }
    venv/bin/python -m pip install --quiet --upgrade pip
    # Without this, pip keeps an installed package of the same version.
    venv/bin/python -m pip uninstall --quiet --yes w2s-jax
    venv/bin/python -m pip install --quiet "w2s-jax[tpu] @ $source"
    printf '%s\n' "$identity" >installed
    echo "installed: $identity"
}

# Debian's and Ubuntu's way to gcsfuse, as its manual has it.
install_gcsfuse() {
    local key=/usr/share/keyrings/cloud.google.asc list=/etc/apt/sources.list.d/gcsfuse.list
    curl -fsSL https://packages.cloud.google.com/apt/doc/apt-key.gpg | sudo tee "$key" >/dev/null
    echo "deb [signed-by=$key] https://packages.cloud.google.com/apt gcsfuse-$(lsb_release -cs) main" |
        sudo tee "$list" >/dev/null
    sudo apt-get -qq -o DPkg::Lock::Timeout=300 update
    sudo apt-get -qq -o DPkg::Lock::Timeout=300 install -y gcsfuse
}

mount_bucket() {
    local bucket=$1 prefix=$2 options=(--implicit-dirs --rename-dir-limit=200000)
    if grep -q " $PWD/bucket fuse" /proc/mounts; then
        [[ -e mounted && $(<mounted) == "$bucket/$prefix" ]] ||
            { echo "w2s/bucket holds another bucket: fusermount -u ~/w2s/bucket" && return 1; }
        echo "already mounted: $bucket"
        return
    fi
    command -v gcsfuse >/dev/null || install_gcsfuse
    mkdir -p bucket
    # One worker must see at once what another wrote: a checkpoint is the work of all of them.
    options+=(--metadata-cache-ttl-secs=0)
    if gcsfuse --help 2>&1 | grep -q -- --metadata-cache-negative-ttl-secs; then
        options+=(--metadata-cache-negative-ttl-secs=0)
    fi
    [[ -z $prefix ]] || options+=(--only-dir="$prefix")
    gcsfuse "${options[@]}" "$bucket" bucket
    printf '%s\n' "$bucket/$prefix" >mounted
}

start() {
    local run=$1 token=$2 folder=runs/$1 tries
    shift 2
    if [[ $(state "$folder") == running ]]; then
        [[ $(<"$folder/token") != "$token" ]] || return 0 # the connection broke after it had started
        echo "run '$run' is under way"
        return 17
    fi
    mkdir -p "$folder"
    [[ ! -e $folder/log ]] || mv "$folder/log" "$folder/log.before"
    rm -f "$folder/status" "$folder/pid"
    printf '%s\n' "$token" >"$folder/token"
    printf '%q ' "$@" >"$folder/command"
    : >"$folder/log"
    nohup setsid bash "$PWD/worker.sh" supervise "$folder" "$@" </dev/null >/dev/null 2>&1 &
    for ((tries = 0; tries < 500; tries++)); do
        [[ ! -e $folder/pid ]] || return 0
        sleep 0.02
    done
    echo "the command did not start"
    return 1
}

# supervise FOLDER ARG..: run the command in the foreground, so that a signal to the group reaches it
# and its status is still written.
supervise() {
    local folder=$1 status=0
    shift
    trap : TERM INT
    echo "$$ $BOOT" >"$folder/pid.new"
    mv "$folder/pid.new" "$folder/pid"
    if [[ -r env ]]; then
        set -a +u # an unset name in it must not look like a machine that died
        # shellcheck source=/dev/null
        . ./env
        set +a -u
    fi
    export PATH="$PWD/venv/bin:$PATH" PYTHONUNBUFFERED=1
    "$@" >>"$folder/log" 2>&1 || status=$?
    echo "$status" >"$folder/status.new"
    mv "$folder/status.new" "$folder/status"
}

# The state is taken before the log's size: an end that is seen has a whole log behind it.
read_log() {
    local folder=runs/$1 from=$2 now size=0 limit=4000000
    now=$(state "$folder")
    [[ ! -e $folder/log ]] || size=$(wc -c <"$folder/log")
    ((from <= size)) || from=0
    ((size - from <= limit)) || size=$((from + limit))
    echo "w2s-exit 0 $now $from $size $(wc -c <"$folder/log" 2>/dev/null || echo 0)"
    ((size == from)) || head -c "$size" "$folder/log" | tail -c +$((from + 1))
}

stop() {
    local folder=runs/$1 pid tries
    if [[ $(state "$folder") != running ]]; then
        echo "run '$1' is not under way"
        return
    fi
    read -r pid _ <"$folder/pid"
    kill -TERM -- "-$pid" 2>/dev/null || true
    for ((tries = 0; tries < 10 * $2; tries++)); do
        [[ $(state "$folder") == running ]] || return 0
        sleep 0.1
    done
    kill -KILL -- "-$pid" 2>/dev/null || true
    echo 137 >"$folder/status"
    echo "run '$1' did not end within $2 s of SIGTERM, and was killed"
}

up() {
    if [[ -d $1 ]]; then
        gcloud storage rsync --recursive "$1" "$2"
    elif [[ -e $1 ]]; then
        gcloud storage cp "$1" "$2"
    else
        echo "there is no $1 on $(hostname)"
        return 1
    fi
}

down() {
    local url=$1 path=$2 found
    if ! found=$(gcloud storage ls "$url" 2>&1); then
        # Only a plain answer means that nothing is there: after a fault a run would begin anew.
        if [[ ${3:-} == any && $found == *"matched no objects"* ]]; then
            echo "nothing at $url yet"
            return
        fi
        printf '%s\n' "$found"
        return 1
    fi
    if [[ $found == "$url" ]]; then
        mkdir -p "$(dirname "$path")"
        gcloud storage cp "$url" "$path"
    else
        mkdir -p "$path"
        gcloud storage rsync --recursive "$url" "$path"
    fi
}

loop() {
    while :; do
        [[ ! -e $1 ]] || up "$1" "$2" || echo "the copy failed; again in $3 s"
        sleep "$3"
    done
}

case ${1:-} in
    --help) usage && exit ;;
    read) read_log "$2" "$3" && exit ;;
    loop) loop "$2" "$3" "$4" ;;
    supervise) supervise "${@:2}" && exit ;;
    install) action=install_package ;;
    mount) action=mount_bucket ;;
    start | stop | up | down) action=$1 ;;
    *) usage >&2 && exit 2 ;;
esac
# Not `(..) || status=$?`, which would have every step of the action go on after a failure.
set +e
(set -e && "$action" "${@:2}") 2>&1
status=$?
# 127 of a call says that there is no worker.sh.
echo "w2s-exit $((status == 127 ? 1 : status))"
