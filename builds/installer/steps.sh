# shellcheck shell=sh
# The commands, step by step.

do_init() {
    begin
    survey
    decide_fabric
    install_driver
    start_services
    check_driver
    wait_for_fabric
    extend_containerd_path
    report_status Ready
    log "driver $DRIVER_VERSION is ready"
    supervise
}

do_load() {
    begin
    survey
    install_driver
    report_status Ready
    trap - EXIT
    log "driver $DRIVER_VERSION is loaded"
}

# A node without a driver is where every command begins, and all that this one is asked for.
do_unload() {
    begin
    log 'no driver of this installer is loaded'
}

# What these commands do first: see that they can work, alone, on a node without a driver.
begin() {
    begin_alone lock
    undo_earlier_run
}

# begin_alone LOCK: what every command does first that changes something
begin_alone() {
    trap 'explain $?' EXIT
    trap 'stop_asked' TERM INT
    # The vendor's libraries are for the vendor's tools, which get their own path.
    unset LD_LIBRARY_PATH
    [ "$(id -u)" -eq 0 ] || die 'not running as root: run this container privileged'
    [ -d "$RUN_FOLDER" ] && [ -w "$RUN_FOLDER" ] ||
        die "$RUN_FOLDER is not there or not writable: mount the host's /run/nvidia there, Bidirectional"
    for tool in awk findmnt flock grep insmod ldconfig modinfo mount mountpoint nsenter rmmod tac umount; do
        command -v "$tool" >/dev/null || die "this image has no $tool: use an undamaged image"
    done
    [ -r "$RELEASE_FILE" ] || die "this image has no $RELEASE_FILE: use an undamaged image"
    # shellcheck source=/dev/null
    . "$RELEASE_FILE"
    [ -d "$STATE_FOLDER" ] || mkdir -m 0700 "$STATE_FOLDER" ||
        die "$STATE_FOLDER cannot be made: mount the host's /run/nvidia, writable"
    exec 9>"$STATE_FOLDER/$1"
    answer=$(flock -n 9 2>&1) || {
        [ -z "$answer" ] || die "$STATE_FOLDER/$1 cannot be locked ($answer): mount the host's /run/nvidia there"
        die 'another nvidia-driver is at work on this node: stop its pod first'
    }
}

undo_earlier_run() {
    if [ -s "$JOURNAL" ]; then
        log 'undoing what an earlier run left'
        undo_changes || die "what an earlier run left cannot be undone$(left_advice)"
    fi
    found=$(loaded_modules)
    ! is_loaded nouveau || found="nouveau${found:+ $found}"
    [ -z "$found" ] ||
        die "the host has loaded $found: remove the driver from the host, or set driver.enabled to false to use it"
}

install_driver() {
    trap 'finish $?' EXIT
    kernel=$(choose_set "$MODULE_FOLDER" "$(uname -r)" "$(cat "$PROC_FOLDER/version")") || die "$kernel"
    type=$(requested_type "${KERNEL_MODULE_TYPE-}" "${OPEN_KERNEL_MODULES_ENABLED-}") || die "$type"
    [ "$type" != auto ] || decide_type
    [ -z "$REFUSED" ] || warn "$REFUSED"
    modules=$(choose_modules "$kernel" "$type") || die "$modules"
    rdma=$(switch_of GPU_DIRECT_RDMA_ENABLED "${GPU_DIRECT_RDMA_ENABLED:-false}") || die "$rdma"
    log "driver $DRIVER_VERSION, $type modules, ${kernel##*/}"
    [ "$rdma" = false ] || log 'GPUDirect RDMA: nvidia-peermem is loaded by a container of its own'
    report_status NotReady
    write_choice "$modules"
    write_loader_caches
    mount_root
    set_firmware_path
    bypass_iommu
    load_modules "$modules"
    create_device_nodes
}

# decide_type: by the devices of the node
decide_type() {
    [ -z "$REFUSED" ] || die "$REFUSED"
    type=$(printf '%s' "$SUPPORT" | choose_type "${DRIVER_VERSION%%.*}" "$SWITCHES") || die "$type"
}

# write_choice FOLDER: for the container that loads nvidia-peermem
write_choice() {
    { printf '%s\n' "$1" >"$CHOICE_FILE"; } 2>/dev/null ||
        die "$CHOICE_FILE cannot be written: mount the host's /run/nvidia, writable"
}

# report_status NotReady|Ready: the startup probe waits for it
report_status() {
    # Noted both times: what is written last is undone first, and nobody may take a driver for ready that is going.
    note status
    rm -f "$READY_FILE" # the probe's own file; before the probe ran it can only be a killed container's
    { mkdir -p "${STATUS_FILE%/*}" && printf '%s\n' "$1" >"$STATUS_FILE"; } 2>/dev/null ||
        die "$STATUS_FILE cannot be written: mount the host's /run/nvidia, writable"
}

undo_status() {
    rm -f "$STATUS_FILE" "$READY_FILE" "$CHOICE_FILE"
}

stop_asked() {
    [ -z "$SLEEPER" ] || kill "$SLEEPER" 2>/dev/null || :
    log 'told to stop'
    exit 0
}

# explain STATUS: the end of a run that has changed nothing
explain() {
    [ "$1" -eq 0 ] || [ -n "$REPORTED" ] || complain 'stopped by a fault of its own: report it with this log'
}

# finish STATUS: the end of a run that leaves no driver behind
finish() {
    status=$1
    # A second signal must not cut the undoing short.
    trap '' TERM INT
    trap - EXIT
    explain "$status"
    stop_services || :
    left=''
    undo_changes || left="not everything could be undone$(left_advice)"
    leave "$status" "$left"
}

# left_advice: why changes were left after undo_changes, and what to do
left_advice() {
    if [ -n "$MODULES_IN_USE" ]; then
        printf ', in use are %s: end the pods that use the GPUs, then delete this pod' "$MODULES_IN_USE"
    else
        printf ': the warnings above say why; reboot the node if they persist'
    fi
}
