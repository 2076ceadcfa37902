# shellcheck shell=sh
# What the loaded driver needs to be useful: device nodes, the persistence daemon, and somebody to watch it.

SERVICES='' # names of the services that run; start_NAME, alive_NAME and stop_NAME go with each
SLEEPER=''

# vendor TOOL...: run a tool of the driver root with its libraries. Only these get that path: the host's modprobe, say,
# must not pick up libraries of ours.
vendor() (
    tool=$1
    shift
    env LD_LIBRARY_PATH="$DRIVER_FOLDER/usr/lib/$TRIPLET" "$DRIVER_FOLDER/usr/bin/$tool" "$@"
)

# The driver makes no device nodes by itself. These are this container's; on the host the operator makes them.
create_device_nodes() {
    # nvidia-modprobe also makes links there and fails where it cannot; a runtime gives no container that folder.
    mkdir -p /dev/char || :
    set -- -c 255 # nvidiactl
    for minor in $(gpu_minors "$PROC_FOLDER"); do
        set -- "$@" -c "$minor"
    done
    create_nodes "$@"
    create_nodes -u -c 0 # nvidia-uvm, nvidia-uvm-tools
    create_nodes -m      # nvidia-modeset
}

create_nodes() {
    answer=$(vendor nvidia-modprobe "$@" 2>&1) ||
        die "nvidia-modprobe $* failed ($answer): run this container privileged"
}

# start_services: those that the hardware needs
start_services() {
    if [ -n "$(gpu_minors "$PROC_FOLDER")" ] && [ -x "$DRIVER_FOLDER/usr/bin/nvidia-persistenced" ]; then
        SERVICES='persistenced'
    fi
    case $(pci_devices "$SYS_FOLDER") in
        *switch*)
            warn 'this node has NVSwitches, but this image no fabric manager yet:' \
                'GPUs that are joined by the switches will not run CUDA'
            ;;
        *) ;;
    esac
    for service in $SERVICES; do
        "start_$service"
    done
}

# Ask the driver itself, as the operator's startup probe will: a pod that fails now says why, one that goes on looks
# alive for twenty minutes.
check_driver() {
    if [ -z "$(gpu_minors "$PROC_FOLDER")" ]; then
        case $(pci_devices "$SYS_FOLDER") in
            *gpu*) die 'the driver has taken on none of the GPUs: lines of NVRM in dmesg of the node tell why' ;;
            *) log 'there is no GPU: nvidia-smi is not asked' ;;
        esac
        return
    fi
    answer=$(vendor nvidia-smi 2>&1) ||
        die "nvidia-smi failed ($answer): dmesg of the node has lines of NVRM with the reason"
}

start_persistenced() {
    rm -f "$PID_FOLDER/nvidia-persistenced.pid"
    # Not through a pipe: a daemon that holds its end would keep us waiting. Nor may it hold the lock.
    vendor nvidia-persistenced --persistence-mode >"$STATE_FOLDER/persistenced" 2>&1 9>&- ||
        die "nvidia-persistenced does not start ($(cat "$STATE_FOLDER/persistenced")): the node's syslog has the reason"
    log 'nvidia-persistenced started'
}

alive_persistenced() {
    pid=$(cat "$PID_FOLDER/nvidia-persistenced.pid" 2>/dev/null) && kill -0 "$pid" 2>/dev/null
}

stop_persistenced() {
    pid=$(cat "$PID_FOLDER/nvidia-persistenced.pid" 2>/dev/null) || return 0
    kill -TERM "$pid" 2>/dev/null || return 0
    tries=100
    while [ "$tries" -gt 0 ]; do # it holds the devices until it is gone
        kill -0 "$pid" 2>/dev/null || return 0
        tries=$((tries - 1))
        sleep 0.1
    done
    kill -KILL "$pid" 2>/dev/null || return 0
}

# Look after the services until told to stop.
supervise() {
    while :; do
        sleep "$INTERVAL" 9>&- &
        SLEEPER=$!
        wait "$SLEEPER" || :
        for service in $SERVICES; do
            "alive_$service" || {
                # No reason to take the driver from the pods that use it.
                warn "nvidia-$service has ended: it is started again"
                "start_$service"
            }
        done
    done
}

stop_services() {
    [ -z "$SLEEPER" ] || kill "$SLEEPER" 2>/dev/null || :
    for service in $SERVICES; do
        "stop_$service"
    done
}
