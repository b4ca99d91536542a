#!/usr/bin/env bash
# Copies between the workers of a slice and a bucket, once or again and again.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
# shellcheck source=tpu_scripts/common.sh
. "$here/common.sh"

usage() {
    cat <<END
Usage: copy.sh --name NAME --project PROJECT --zone ZONE --worker WHICH up PATH gs://BUCKET/..
       copy.sh .. --worker WHICH down gs://BUCKET/.. PATH
       copy.sh .. --worker WHICH --every SECONDS up PATH gs://BUCKET/..
Copies a folder or a file to a bucket, or back; a PATH is relative to ~/w2s. What is there and the
same is not copied again, and nothing is deleted.

  --worker WHICH     a worker's number, or all: then each has a folder worker-0, .. of its own
                     behind the bucket's address
  --shared           with all: no folder of their own, as for a model that all workers need
  --every SECONDS    go on copying up in the background, until
                     run.sh --run copy --stop
  --if-any           down: nothing there yet is no error
  --run RUN          the name of the background copy (default copy)
$COMMON_HELP
END
}

WHICH=
SHARED=
EVERY=
ANY=
RUN=copy
WORDS=()
while (($#)); do
    case $1 in --*=*) set -- "${1%%=*}" "${1#*=}" "${@:2}" ;; esac
    if common_flag "$@"; then
        shift "$TAKEN"
        continue
    fi
    case $1 in
        --worker) need_value "$@" && WHICH=$2 && shift 2 ;;
        --every) need_value "$@" && EVERY=$2 && shift 2 ;;
        --run) need_value "$@" && RUN=$2 && shift 2 ;;
        --shared) SHARED=1 && shift ;;
        --if-any) ANY=any && shift ;;
        -*) usage_error "what is '$1'? --help lists the flags" ;;
        *) WORDS+=("$1") && shift ;;
    esac
done
check_common
((${#WORDS[@]} == 3)) || usage_error "copy what? up PATH gs://BUCKET/.., or down gs://BUCKET/.. PATH"
DIRECTION=${WORDS[0]}
case $DIRECTION in
    up) LOCAL=${WORDS[1]} URL=${WORDS[2]%/} ;;
    down) URL=${WORDS[1]%/} LOCAL=${WORDS[2]} ;;
    *) usage_error "copy up or down, not '$DIRECTION'" ;;
esac
[[ $URL =~ ^gs://[a-z0-9._-]+(/.*)?$ ]] || usage_error "a bucket's address is gs://BUCKET/.., not '$URL'"
check_which
[[ -z $SHARED || $WHICH == all ]] || usage_error "--shared goes with --worker all"
if [[ $EVERY ]]; then
    is_count "$EVERY" --every
    [[ $DIRECTION == up ]] || usage_error "--every goes with up"
fi

# copy_worker WORKER
# shellcheck disable=SC2329  # each_worker calls it
copy_worker() {
    local worker=$1 url=$URL
    [[ $WHICH != all || $SHARED ]] || url+=/worker-$worker
    if [[ $EVERY ]]; then
        on_worker "$worker" bash w2s/worker.sh start "$RUN" "$(date +%s)-$$" \
            bash worker.sh loop "$LOCAL" "$url" "$EVERY"
    elif [[ $DIRECTION == up ]]; then
        on_worker "$worker" bash w2s/worker.sh up "$LOCAL" "$url"
    else
        on_worker "$worker" bash w2s/worker.sh down "$url" "$LOCAL" ${ANY:+"$ANY"}
    fi
}

ready_or_die
each_worker copy_worker
[[ ! $DRY_RUN ]] || exit 0
complain "copy"
if ((WORST == 0)); then
    how="copied $DIRECTION"
    [[ -z $EVERY ]] || how="copied up every $EVERY s from now on"
    say "$LOCAL is $how, on ${#STATUS[@]} of $WORKERS workers"
fi
exit "$WORST"
