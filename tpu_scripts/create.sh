#!/usr/bin/env bash
# Rents a TPU slice and waits until it is ready. A slice that is there already is told, not rented again.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
# shellcheck source=tpu_scripts/common.sh
. "$here/common.sh"

usage() {
    cat <<END
Usage: create.sh --name NAME --project PROJECT --zone ZONE --type TYPE --kind KIND [FLAG..]
Rents a TPU slice and waits until it is ready. It costs money from then on, until delete.sh.

  --type TYPE        v5litepod-16, v5p-128, v6e-16, ..    W2S_TPU_TYPE
                     or a topology: v6e:4x4
  --kind KIND        how it is rented                     W2S_TPU_KIND
                       on-demand    at the full price, until it is deleted
                       spot         at a lower price, and taken away at any time
                       queued       on demand, when the queue grants it
                       queued-spot  spot, when the queue grants it
  --runtime VERSION  the machines' image (default: the    W2S_TPU_RUNTIME
                     one for the type)
  --gcloud-flag FLAG one more flag of gcloud's create, as
                     --gcloud-flag=--reserved; again for more
  --timeout SECONDS  how long to wait (default 3600); what is queued stays queued after it
  --replace          delete a slice that was taken away or stopped, and rent it anew
  --yes              do not ask
$COMMON_HELP
END
}

TIMEOUT=3600
REPLACE=
EXTRA=()
while (($#)); do
    case $1 in --*=*) set -- "${1%%=*}" "${1#*=}" "${@:2}" ;; esac
    if common_flag "$@" || slice_flag "$@"; then
        shift "$TAKEN"
        continue
    fi
    case $1 in
        --gcloud-flag) need_value "$@" && EXTRA+=("$2") && shift 2 ;;
        --timeout) need_value "$@" && TIMEOUT=$2 && shift 2 ;;
        --replace) REPLACE=1 && shift ;;
        *) usage_error "what is '$1'? --help lists the flags" ;;
    esac
done
check_common
is_count "$TIMEOUT" --timeout
[[ $TYPE ]] || usage_error "which type? --type TYPE, or W2S_TPU_TYPE: v5litepod-16, v5p-128, v6e-16, .."
[[ $KIND ]] || usage_error "on-demand, spot, queued or queued-spot? --kind KIND, or W2S_TPU_KIND"
SPOT=()
case $KIND in
    on-demand | queued) ;;
    spot | queued-spot) SPOT=(--spot) ;;
    *) usage_error "--kind is on-demand, spot, queued or queued-spot, not '$KIND'" ;;
esac
read_type

rent() {
    local options=("${where[@]}" --accelerator-type="$TYPE")
    case $KIND in
        queued*)
            set -- queued-resources create "$NAME" --node-id="$NAME" "${options[@]}" \
                --runtime-version="$RUNTIME"
            ;;
        *) set -- tpu-vm create "$NAME" "${options[@]}" --version="$RUNTIME" ;;
    esac
    call gcloud compute tpus "$@" ${SPOT[@]+"${SPOT[@]}"} ${EXTRA[@]+"${EXTRA[@]}"} --quiet
}

if [[ $DRY_RUN ]]; then
    print_looks
    echo "# a slice that is there already ends it here; else"
    rent
    echo "# then the first two again, every $POLL s, until the node is READY"
    exit
fi

look_or_die
if [[ $REPLACE && ($SLICE == dead || $SLICE == stopped) ]]; then
    confirm "Delete $NAME ($(describe_slice)), and rent it anew?"
    say "$NAME: $(describe_slice); deleting it"
    remove_slice || die "what is left of $NAME cannot be deleted ($(describe_slice)): ${ERROR:-}"
fi
case $SLICE in
    ready | pending)
        [[ -z $FOUND || $FOUND == "$TYPE" ]] ||
            die "$NAME is there already, as $FOUND: delete it first, or name the new one otherwise"
        say "$NAME is there already: $(describe_slice); nothing is created"
        ;;
    dead) die "$NAME was taken away ($(describe_slice)): --replace deletes it and rents it anew" ;;
    stopped) die "$NAME is stopped: \`gcloud compute tpus tpu-vm start $NAME\`, or --replace" ;;
    missing)
        say "About to rent, $KIND, in project $PROJECT, zone $ZONE:"
        say "  $NAME: $TYPE, $CHIPS chips on $VMS machines with $RUNTIME"
        say "It costs money as soon as it is there, whether it works or not, until delete.sh has deleted it."
        confirm "Rent it?"
        # What failed on the way back may have been done: the look decides.
        rent </dev/null >&2 || {
            look_or_die
            [[ $SLICE != missing ]] || die "gcloud could not create $NAME; its words are above"
        }
        ;;
esac

SECONDS=0
told=
while :; do
    look_or_die
    [[ $told == "$(describe_slice)" ]] || say "$NAME: $(describe_slice)"
    told=$(describe_slice)
    case $SLICE in
        ready) break ;;
        dead | stopped) die "$NAME did not come up ($told): see \`gcloud compute tpus queued-resources describe\`, then delete.sh" ;;
    esac
    if ((SECONDS >= TIMEOUT)); then
        die "$NAME is not ready after $TIMEOUT s ($told). It may come, and cost, later: create.sh waits again, delete.sh withdraws it"
    fi
    sleep "$POLL"
done
say "$NAME is ready: $WORKERS workers. It costs money until delete.sh has deleted it."
