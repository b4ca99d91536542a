#!/usr/bin/env bash
# Gives a TPU slice back: the node and its queued resource. Says what is left.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
# shellcheck source=tpu_scripts/common.sh
. "$here/common.sh"

usage() {
    cat <<END
Usage: delete.sh --name NAME --project PROJECT --zone ZONE [FLAG..]
Deletes the node and the queued resource of this name, with all that is on the machines' disks, and
says what is left in the zone. Buckets are not touched.

  --yes              do not ask
$COMMON_HELP
END
}

while (($#)); do
    case $1 in --*=*) set -- "${1%%=*}" "${1#*=}" "${@:2}" ;; esac
    common_flag "$@" || usage_error "what is '$1'? --help lists the flags"
    shift "$TAKEN"
done
check_common

list_left() {
    call gcloud compute tpus queued-resources list "${where[@]}" \
        --format='value(name.basename(),state.state)'
    call gcloud compute tpus tpu-vm list "${where[@]}" \
        --format='value(name.basename(),acceleratorType,state)'
}

if [[ $DRY_RUN ]]; then
    print_looks
    echo "# what is there of it is deleted, the queued resource first"
    delete_queue
    delete_node
    list_left
    exit
fi

look_or_die
if [[ $SLICE == missing ]]; then
    say "there is no node and no queued resource $NAME in $ZONE: nothing to delete"
else
    confirm "Delete $NAME ($(describe_slice)) with all that is on its disks?"
    remove_slice || die "$NAME is not gone ($(describe_slice)), and costs money as long: ${ERROR:-}"
    say "$NAME is deleted"
fi
left=$(list_left) || die "what else is in $ZONE cannot be listed; its words are above"
if [[ $left ]]; then
    say "Left in $ZONE, and costing money:"
    say "$left"
else
    say "Nothing is left in $ZONE. Buckets keep their files, and their price, until they are deleted."
fi
