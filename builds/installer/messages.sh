# shellcheck shell=sh disable=SC2034 # the other parts use the variable
# What the installer says. Errors are one line: what failed, then what to do.

REPORTED='' # whether the reason for a failure has been told

log() {
    printf 'nvidia-driver: %s\n' "$*"
}

warn() {
    printf 'nvidia-driver: warning: %s\n' "$(one_line "$*")" >&2
}

complain() {
    REPORTED=yes
    printf 'nvidia-driver: error: %s\n' "$(one_line "$*")" >&2
}

die() {
    complain "$@"
    exit 1
}

# leave STATUS LEFT: the end of a run. What could not be undone is its error, if it has none yet.
leave() {
    if [ -n "$2" ]; then
        [ "$1" -ne 0 ] || die "$2"
        warn "$2"
    fi
    exit "$1"
}

# one_line TEXT: what a tool said, fit for the middle of a sentence
one_line() (
    set -f
    # shellcheck disable=SC2086 # splitting is the point: every run of white space becomes one blank
    set -- $1
    printf '%s\n' "$*"
)
