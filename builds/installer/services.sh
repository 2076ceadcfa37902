# shellcheck shell=sh
# What the loaded driver needs to be useful: device nodes, the persistence daemon, and somebody to watch it.

SERVICES='' # names of the services that run; start_NAME, alive_NAME, lost_NAME and stop_NAME go with each
SLEEPER=''

# vendor TOOL...: run a tool of the driver root with its libraries. Only these get that path: the host's modprobe, say,
# must not pick up libraries of ours.
vendor() (
    vendor_exec "$@"
)

# vendor_exec TOOL...: become that tool
vendor_exec() {
    tool=$1
    shift
    exec env LD_LIBRARY_PATH="$DRIVER_FOLDER/usr/lib/$TRIPLET" "$DRIVER_FOLDER/usr/bin/$tool" "$@"
}

# pause SECONDS, unless a signal ends it: a shell takes notice of one only where it waits
pause() {
    sleep "$1" 9>&- &
    SLEEPER=$!
    wait "$SLEEPER" || :
    SLEEPER=''
}

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
        start_service persistenced
    fi
    for service in $FABRIC_SERVICES; do
        start_service "$service"
    done
}

start_service() {
    SERVICES="$1 $SERVICES" # the last one is stopped first
    "start_$1"
}

# Ask the driver itself, as the operator's startup probe will: a pod that fails now says why, one that goes on looks
# alive for twenty minutes.
check_driver() {
    if [ -z "$(gpu_minors "$PROC_FOLDER")" ]; then
        [ -z "$GPUS" ] || die 'the driver has taken on none of the GPUs: lines of NVRM in dmesg of the node tell why'
        log 'there is no GPU: nvidia-smi is not asked'
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

# No reason to take the driver from the pods that use it.
lost_persistenced() {
    warn 'nvidia-persistenced has ended: it is started again'
    start_persistenced
}

stop_persistenced() {
    pid=$(cat "$PID_FOLDER/nvidia-persistenced.pid" 2>/dev/null) || return 0
    stop_process "$pid"
}

# stop_process PID: it holds the devices until it is gone
stop_process() {
    [ -n "$1" ] && kill -TERM "$1" 2>/dev/null || return 0
    tries=100
    while [ "$tries" -gt 0 ]; do
        kill -0 "$1" 2>/dev/null || return 0
        tries=$((tries - 1))
        pause 0.1 # which also takes notice of children that have ended
    done
    kill -KILL "$1" 2>/dev/null || return 0
}

# Look after the services until told to stop.
supervise() {
    while :; do
        pause "$INTERVAL"
        for service in $SERVICES; do
            "alive_$service" || "lost_$service"
        done
    done
}

stop_services() {
    for service in $SERVICES; do
        "stop_$service"
    done
}
