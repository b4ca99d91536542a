#!/usr/bin/env bash
# Makes all workers of a slice ready to run w2s: Python, the package, secrets, a mounted bucket.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
# shellcheck source=tpu_scripts/common.sh
. "$here/common.sh"

usage() {
    cat <<END
Usage: setup.sh --name NAME --project PROJECT --zone ZONE --source SOURCE [FLAG..]
Makes all workers ready: ~/w2s/venv with Python 3.11 or later and the package with its [tpu] extra,
and at last a check that all of them see all chips. Done again, it does only what is not done.

  --source SOURCE    git+https://..@REF, a file .whl, or  W2S_TPU_SOURCE
                     checkout: the one that this script
                     lies in, as it is
  --env-file FILE    KEY=VALUE lines that every command   W2S_TPU_ENV_FILE
                     gets, such as HF_TOKEN
  --mount gs://B[/P] mount a bucket at ~/w2s/bucket       W2S_TPU_MOUNT
  --no-check         do not start JAX to count chips
  --logs FOLDER      where logs go (default runs/tpu; W2S_TPU_LOGS)
$COMMON_HELP
END
}

SOURCE=${W2S_TPU_SOURCE:-}
ENV_FILE=${W2S_TPU_ENV_FILE:-}
MOUNT=${W2S_TPU_MOUNT:-}
CHECK=1
while (($#)); do
    case $1 in --*=*) set -- "${1%%=*}" "${1#*=}" "${@:2}" ;; esac
    if common_flag "$@"; then
        shift "$TAKEN"
        continue
    fi
    case $1 in
        --source) need_value "$@" && SOURCE=$2 && shift 2 ;;
        --env-file) need_value "$@" && ENV_FILE=$2 && shift 2 ;;
        --mount) need_value "$@" && MOUNT=$2 && shift 2 ;;
        --no-check) CHECK= && shift ;;
        *) usage_error "what is '$1'? --help lists the flags" ;;
    esac
done
check_common

# check_secrets: wrong usage unless a shell reads every line of the file as one variable. A value is
# never shown. What a worker's shell stumbles over would be missing without a word.
check_secrets() {
    local line number=0 name='[A-Za-z_][A-Za-z0-9_]*' plain='[]A-Za-z0-9_.,/:@%+=[-]*'
    local single="'[^']*'" double='"[^"$`\\]*"'
    while IFS= read -r line || [[ $line ]]; do
        number=$((number + 1))
        [[ $line =~ ^(export )?$name=($plain|$single|$double)$ || $line =~ ^[[:blank:]]*(#.*)?$ ]] ||
            usage_error "$ENV_FILE, line $number: write KEY=VALUE, a VALUE of other than letters and digits as 'VALUE', and end lines as Unix does"
    done <"$ENV_FILE"
}

case $SOURCE in
    '') usage_error "which package? --source git+https://..@REF, FILE.whl or checkout, or W2S_TPU_SOURCE" ;;
    git+*@* | checkout) ;;
    git+*) usage_error "--source $SOURCE names no commit, tag or branch: end it with @REF" ;;
    *.whl) [[ -r $SOURCE ]] || usage_error "there is no file $SOURCE" ;;
    *) usage_error "--source is git+https://..@REF, a .whl file or checkout, not '$SOURCE'" ;;
esac
[[ -z $ENV_FILE || -r $ENV_FILE ]] || usage_error "there is no file $ENV_FILE"
[[ -z $ENV_FILE ]] || check_secrets
[[ -z $MOUNT || $MOUNT =~ ^gs://[a-z0-9._-]+(/.*)?$ ]] ||
    usage_error "--mount takes gs://BUCKET or gs://BUCKET/PREFIX, not '$MOUNT'"

digest() {
    if command -v sha256sum >/dev/null; then sha256sum <"$1"; else shasum -a 256 <"$1"; fi | cut -c1-16
}

# pack_checkout FILE: the checkout's tracked and new files, as they are now.
pack_checkout() {
    local root=$here/.. file
    git -C "$root" rev-parse --git-dir >/dev/null 2>&1 ||
        die "$root is no git checkout: --source git+https://..@REF, or a wheel"
    git -C "$root" ls-files -z --cached --others --exclude-standard |
        while IFS= read -r -d '' file; do
            [[ ! -e $root/$file ]] || printf '%s\0' "$file"
        done >"$SCRATCH/files"
    COPYFILE_DISABLE=1 tar -C "$root" --null -T "$SCRATCH/files" -cf - | gzip -n >"$1"
}

# prepare WORKER: its folders, which is also the first contact.
prepare() {
    on_worker "$1" bash -c 'mkdir -p w2s/source w2s/runs && chmod 700 w2s; echo w2s-exit $?'
}

# bring FILE TARGET WORKER
bring() {
    local try
    if [[ $DRY_RUN ]]; then
        scp_worker "$3" "$1" "$2"
        return
    fi
    for ((try = 1; ; try++)); do
        if scp_worker "$3" "$1" "$2" </dev/null >"$SCRATCH/$3.out" 2>"$SCRATCH/$3.err"; then return; fi
        ((try < TRIES)) || return "$UNREACHABLE"
        sleep "$POLL"
    done
}

# everywhere WHAT COMMAND ARG..: on all workers, or it ends here.
everywhere() {
    local what=$1
    shift
    [[ $DRY_RUN ]] || say "$what"
    each_worker "$@"
    if ((WORST > 0)); then
        complain "$what"
        exit "$WORST"
    fi
}

ready_or_die
case $SOURCE in
    git+*) action=(install git "$SOURCE" "$SOURCE") file= ;;
    *.whl)
        file=$SOURCE
        action=(install wheel "${SOURCE##*/}" "${SOURCE##*/} $(digest "$file")")
        ;;
    checkout)
        file=$SCRATCH/checkout.tar.gz
        [[ $DRY_RUN ]] && echo "# $file is packed from this checkout"
        pack_checkout "$file"
        action=(install checkout checkout.tar.gz "checkout $(digest "$file")")
        ;;
esac
everywhere "folders" prepare
everywhere "worker.sh" bring "$here/worker.sh" w2s/worker.sh
[[ -z $file ]] || everywhere "${file##*/}" bring "$file" "w2s/source/${file##*/}"
[[ -z $ENV_FILE ]] || everywhere "secrets" bring "$ENV_FILE" w2s/env
everywhere "install" act "${action[@]}"
if [[ $MOUNT ]]; then
    bucket=${MOUNT#gs://} prefix=
    [[ $bucket != */* ]] || prefix=${bucket#*/} bucket=${bucket%%/*}
    everywhere "mount" act mount "$bucket" "${prefix%/}"
fi
[[ $CHECK ]] || exit 0
# Every process waits for all others here, and each must see every chip.
probe="\
import jax
if $WORKERS > 1:
    jax.distributed.initialize()
here, everywhere = jax.local_device_count(), jax.device_count()
print(f'process {jax.process_index()} of {jax.process_count()}: {here} of {everywhere} chips')
assert jax.default_backend() == 'tpu', jax.default_backend()
assert jax.process_count() == $WORKERS, 'not all $WORKERS workers take part'
"
hand_on
[[ $DRY_RUN ]] || say "check"
"$here/run.sh" ${DRY_RUN:+--dry-run} --run check -- python -c "$probe"
[[ $DRY_RUN ]] || say "$NAME is set up: $WORKERS workers"
