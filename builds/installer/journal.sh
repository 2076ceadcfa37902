# shellcheck shell=sh disable=SC2034 # the other parts use the variables
# What a run changed on the node, and how to undo it.
#
# A change is written down before it is made, on the host's /run/nvidia: so one and the same code undoes a failed
# step, a stopped `init`, a `load` of an hour ago, and a container that was killed at any point. Hence every undo_*
# must be content with a change that was never made, or was undone by somebody else.

JOURNAL=$STATE_FOLDER/journal
MODULES_IN_USE=''

# note CHANGE [DETAIL]: undo_CHANGE DETAIL will undo it
note() {
    printf '%s %s\n' "$1" "${2-}" >>"$JOURNAL" || die "$JOURNAL cannot be written: mount the host's /run/nvidia, writable"
}

# Undo every change, newest first. What cannot be undone now stays in the journal, and the status says so.
undo_changes() {
    [ -s "$JOURNAL" ] || return 0
    tac "$JOURNAL" >"$JOURNAL.undo"
    : >"$JOURNAL.left"
    MODULES_IN_USE=$(modules_in_use)
    while IFS=' ' read -r change detail; do
        case $change in
            module | root | firmware | status | iommu)
                "undo_$change" "$detail" || printf '%s %s\n' "$change" "$detail" >>"$JOURNAL.left"
                ;;
            *) warn "the journal $JOURNAL has an entry that this version does not know: $change" ;;
        esac
    done <"$JOURNAL.undo"
    tac "$JOURNAL.left" >"$JOURNAL.undo"
    mv "$JOURNAL.undo" "$JOURNAL"
    rm -f "$JOURNAL.left"
    [ ! -s "$JOURNAL" ]
}
