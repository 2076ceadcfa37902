# shellcheck shell=sh
# The services of NVSwitches: the fabric manager, and for NVLink 5 the subnet manager nvlsm. Both stay in the
# foreground, as children of this shell; what they say is this container's log.

FABRIC_SERVICES='' # which of them this node needs
FABRIC_PORT=''     # GUID of the port that leads to NVSwitches of NVLink 5
FABRIC_PID=''
NVLSM_PID=''
FABRIC_PATIENCE=300 # looks, PAUSE apart, at a fabric that is not complete
SHORT_PATIENCE=30   # looks for a port, and for nvlsm's socket

# Say before anything is changed that the image lacks what the node needs.
decide_fabric() {
    fabric_program='' nvlsm_program=''
    [ ! -x "$DRIVER_FOLDER/usr/bin/nv-fabricmanager" ] || fabric_program=nv-fabricmanager
    [ ! -x "$DRIVER_FOLDER/usr/bin/nvlsm" ] || nvlsm_program=nvlsm
    FABRIC_SERVICES=$(choose_fabric "$GPUS" "$SWITCHES" "$BRIDGES" "$fabric_program" "$nvlsm_program") ||
        die "$FABRIC_SERVICES"
    if [ -z "$FABRIC_SERVICES" ]; then
        [ "$SWITCHES" -eq 0 ] || log 'there are NVSwitches, but no GPUs and no fabric manager: none is started'
        return
    fi
    # It refuses to work with another version of the driver.
    answer=$(vendor nv-fabricmanager --version 2>&1) || die "nv-fabricmanager does not run ($answer): use another image"
    case " $(one_line "$answer") " in
        *" $DRIVER_VERSION "*) ;;
        *) die "nv-fabricmanager is not of the driver's version $DRIVER_VERSION ($answer): use another image" ;;
    esac
}

start_fabricmanager() {
    mkdir -p "$FABRIC_FOLDER" || die "$FABRIC_FOLDER cannot be made: mount the host's /run/nvidia-fabricmanager there"
    awk -v data="$FABRIC_DATA" '
        /^(DAEMONIZE|LOG_FILE_NAME|TOPOLOGY_FILE_PATH)=/ { next }
        { print }
        END { print "DAEMONIZE=0\nLOG_FILE_NAME=\nTOPOLOGY_FILE_PATH=" data }
    ' "$FABRIC_DATA/fabricmanager.cfg" >"$STATE_FOLDER/fabricmanager.cfg" 2>/dev/null ||
        die "$FABRIC_DATA/fabricmanager.cfg cannot be read: use an undamaged image"
    set -- -c "$STATE_FOLDER/fabricmanager.cfg"
    [ -z "$FABRIC_PORT" ] || set -- "$@" -g "$FABRIC_PORT"
    vendor_exec nv-fabricmanager "$@" 9>&- &
    FABRIC_PID=$!
    log "nv-fabricmanager started${FABRIC_PORT:+ at port $FABRIC_PORT}"
}

start_nvlsm() {
    find_port
    # The names of its files are written into its configuration.
    [ -e "$SHARE_FOLDER/nvlsm" ] || { mkdir -p "$SHARE_FOLDER" &&
        ln -sfn "$DRIVER_FOLDER/usr/share/nvidia/nvlsm" "$SHARE_FOLDER/nvlsm"; } ||
        die "$SHARE_FOLDER/nvlsm cannot be made: the container needs a writable file system"
    mkdir -p "$FABRIC_FOLDER" || die "$FABRIC_FOLDER cannot be made: mount the host's /run/nvidia-fabricmanager there"
    rm -f "$FABRIC_FOLDER/fm_sm_ipc.socket"
    vendor_exec nvlsm -F "$SHARE_FOLDER/nvlsm/nvlsm.conf" -g "$FABRIC_PORT" 9>&- &
    NVLSM_PID=$!
    log "nvlsm started at port $FABRIC_PORT"
    # The fabric manager asks it at once. A version that has its socket elsewhere gets the same time.
    tries=$SHORT_PATIENCE
    while [ "$tries" -gt 0 ] && [ ! -e "$FABRIC_FOLDER/fm_sm_ipc.socket" ]; do
        alive_nvlsm || lost_nvlsm
        tries=$((tries - 1))
        pause "$PAUSE"
    done
}

# The port that leads to the NVSwitches, and the device nodes to manage it: the host's drivers, and nodes of this
# container, which had its devices before the host had these.
find_port() {
    for name in mlx5_ib ib_umad; do
        load_needed 'the management of NVSwitches' "$name"
    done
    tries=$SHORT_PATIENCE # drivers take on their devices in their own time
    while :; do
        for address in $BRIDGES; do
            for device in "$SYS_FOLDER/bus/pci/devices/$address/infiniband"/*; do
                [ -n "$FABRIC_PORT" ] || FABRIC_PORT=$(port_of "$device")
            done
        done
        [ -z "$FABRIC_PORT" ] || break
        tries=$((tries - 1))
        [ "$tries" -gt 0 ] ||
            die "no port of$BRIDGES leads to the NVSwitches: dmesg of the node has lines of mlx5 with the reason"
        pause "$PAUSE"
    done
    mkdir -p "$DEVICE_FOLDER/infiniband"
    for folder in "$SYS_FOLDER"/class/infiniband_mad/umad* "$SYS_FOLDER"/class/infiniband_mad/issm*; do
        [ -r "$folder/dev" ] && [ ! -e "$DEVICE_FOLDER/infiniband/${folder##*/}" ] || continue
        IFS=: read -r major minor <"$folder/dev"
        answer=$(mknod "$DEVICE_FOLDER/infiniband/${folder##*/}" c "$major" "$minor" 2>&1) ||
            die "the device node of ${folder##*/} cannot be made ($answer): run this container privileged"
    done
}

# Until the fabric is complete, the GPUs that it joins run nothing: CUDA says 802, system not yet initialized.
wait_for_fabric() {
    [ -n "$FABRIC_SERVICES" ] && [ -n "$GPUS" ] || return 0
    tries=$FABRIC_PATIENCE
    while :; do
        answer=$(vendor nvidia-smi -q 2>&1) ||
            die "nvidia-smi -q failed ($answer): dmesg of the node has lines of NVRM with the reason"
        for service in $FABRIC_SERVICES; do
            "alive_$service" || "lost_$service"
        done
        is_fabric_complete "$answer" && break
        tries=$((tries - 1))
        [ "$tries" -gt 0 ] || die 'the GPUs are not joined yet: the lines of nv-fabricmanager above have the reason'
        pause "$PAUSE"
    done
    log 'the GPUs are joined'
}

# is_fabric_complete TEXT: by what nvidia-smi -q says of the state of each GPU's fabric. Older ones have none.
is_fabric_complete() {
    printf '%s\n' "$1" | awk '
        /^ *Fabric *$/ { fabric = 1; next }
        fabric && /^ *State *:/ { if ($0 ~ /: *(Not Started|In Progress)/) waiting = 1; fabric = 0 }
        END { exit waiting }
    '
}

alive_fabricmanager() {
    kill -0 "$FABRIC_PID" 2>/dev/null
}

alive_nvlsm() {
    kill -0 "$NVLSM_PID" 2>/dev/null
}

# Nothing is started again: what ran on the GPUs is lost with it, and a new pod sets up all of it anew.
lost_fabricmanager() {
    lost nv-fabricmanager "$FABRIC_PID"
}

lost_nvlsm() {
    lost nvlsm "$NVLSM_PID"
}

# lost NAME PID
lost() {
    ended=0
    wait "$2" || ended=$?
    die "$1 has ended (status $ended), and the GPUs that NVSwitches join with it: its lines above have the reason"
}

stop_fabricmanager() {
    stop_process "$FABRIC_PID"
}

stop_nvlsm() {
    stop_process "$NVLSM_PID"
}
