# shellcheck shell=sh
# Nodes that run pods in gVisor: its runtime looks for nvidia-container-cli on containerd's PATH, where it is not.

TOOLKIT_FOLDER=${NVIDIA_TOOLKIT_FOLDER:-/opt/nvidia/toolkit} # toolkit.installDir of the operator, and /toolkit

# Not undone: it takes effect when containerd is started next, which the container toolkit sees to after it was
# installed, and it is gone with the next boot. A node without gVisor is left alone. Pods of other runtimes work
# without, so that no failure of this ends the pod.
extend_containerd_path() {
    answer=$(nsenter -t 1 -m -- /bin/sh -s "$TOOLKIT_FOLDER" <"$PARTS/containerd-path.sh" 2>&1) || {
        warn "containerd cannot be told where nvidia-container-cli is ($answer): pods in gVisor will not get GPUs"
        return 0
    }
    [ -z "$answer" ] || log "$answer"
}
