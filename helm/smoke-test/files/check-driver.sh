#!/bin/sh
# Says which driver the node has, and fails unless it is the expected one.
# EXPECTED is a branch, a version, or empty; NODE_NAME is for messages.
set -eu

expected=${EXPECTED:-}
node=${NODE_NAME:-?}

fail() {
    echo "error: node ${node}: $1" >&2
    exit 1
}

command -v nvidia-smi >/dev/null ||
    fail "no nvidia-smi here: the container toolkit gave no GPU. Right runtime class? Is its pod ready?"

# Not through a pipe: its status would be lost.
found=$(nvidia-smi --query-gpu=driver_version --format=csv,noheader) ||
    fail "nvidia-smi failed: ${found:-it said nothing}. Look at the driver's pod on this node"
[ -n "${found}" ] || fail "nvidia-smi sees no GPU"
nvidia-smi --list-gpus || fail "nvidia-smi cannot list the GPUs"

for version in ${found}; do
    case "${version}" in
        *[!0-9.]* | .* | *.) fail "nvidia-smi gave no driver version, but: ${found}" ;;
        *) ;;
    esac
    case "${expected}" in
        '') ;;
        *.*.*) [ "${version}" = "${expected}" ] || fail "the driver is ${version}, expected ${expected}" ;;
        *)
            case "${version}" in
                "${expected}" | "${expected}".*) ;;
                *) fail "the driver is ${version}, expected one of branch ${expected}" ;;
            esac
            ;;
    esac
done
echo "node ${node}: driver ${version}, expected ${expected:-any}"
