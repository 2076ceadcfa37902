# shellcheck shell=sh
# The commands, step by step.

do_init() {
    begin
    install_driver
    start_services
    check_driver
    report_status Ready
    log "driver $DRIVER_VERSION is ready"
    supervise
}

do_load() {
    begin
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

# What every command does first: see that it can work, alone, on a node without a driver.
begin() {
    trap 'explain $?' EXIT
    trap 'stop_asked' TERM INT
    # The vendor's libraries are for the vendor's tools, which get their own path.
    unset LD_LIBRARY_PATH
    [ "$(id -u)" -eq 0 ] || die 'not running as root: run this container privileged'
    [ -d "$RUN_FOLDER" ] && [ -w "$RUN_FOLDER" ] ||
        die "$RUN_FOLDER is not there or not writable: mount the host's /run/nvidia there, Bidirectional"
    for tool in awk findmnt flock insmod modinfo mount mountpoint nsenter rmmod tac umount; do
        command -v "$tool" >/dev/null || die "this image has no $tool: use an undamaged image"
    done
    [ -r "$RELEASE_FILE" ] || die "this image has no $RELEASE_FILE: use an undamaged image"
    # shellcheck source=/dev/null
    . "$RELEASE_FILE"
    [ -d "$STATE_FOLDER" ] || mkdir -m 0700 "$STATE_FOLDER" ||
        die "$STATE_FOLDER cannot be made: mount the host's /run/nvidia, writable"
    exec 9>"$STATE_FOLDER/lock"
    flock -n 9 || die 'another nvidia-driver is at work on this node: stop its pod first'
    undo_earlier_run
}

undo_earlier_run() {
    if [ -s "$JOURNAL" ]; then
        log 'undoing what an earlier run left'
        undo_changes || die "what an earlier run left cannot be undone$(left_advice)"
    fi
    found=$(loaded_modules)
    [ -z "$found" ] ||
        die "the host has loaded $found: remove the driver from the host, or set driver.enabled to false to use it"
}

install_driver() {
    trap 'finish $?' EXIT
    kernel=$(choose_set "$MODULE_FOLDER" "$(uname -r)" "$(cat "$PROC_FOLDER/version")") || die "$kernel"
    type=$(requested_type "${KERNEL_MODULE_TYPE-}" "${OPEN_KERNEL_MODULES_ENABLED-}") || die "$type"
    [ "$type" != auto ] || decide_type
    modules=$(choose_modules "$kernel" "$type") || die "$modules"
    log "driver $DRIVER_VERSION, $type modules, ${kernel##*/}"
    report_status NotReady
    mount_root
    set_firmware_path
    load_modules "$modules"
    create_device_nodes
}

# decide_type: by the devices of the node
decide_type() {
    gpus='' switches=0
    while read -r kind id; do
        case $kind in
            gpu) gpus="$gpus $id" ;;
            switch) switches=$((switches + 1)) ;;
            *) ;;
        esac
    done <<DEVICES
$(pci_devices "$SYS_FOLDER")
DEVICES
    support=''
    if [ -n "$gpus" ]; then
        # shellcheck disable=SC2086 # one word an id
        support=$(gpu_support "$DRIVER_FOLDER/usr/share/nvidia/supported-gpus/supported-gpus.json" $gpus) ||
            die "$support"
        printf '%s\n' "$support" | sort -u | while read -r id types name; do
            log "GPU 10de:$id $name, module types: $types"
        done
    fi
    type=$(printf '%s' "$support" | choose_type "${DRIVER_VERSION%%.*}" "$switches") || die "$type"
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
    rm -f "$STATUS_FILE" "$READY_FILE"
}

stop_asked() {
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
    undo_changes || {
        left="not everything could be undone$(left_advice)"
        if [ "$status" -eq 0 ]; then
            complain "$left"
            status=1
        else
            warn "$left"
        fi
    }
    exit "$status"
}

# left_advice: why changes were left after undo_changes, and what to do
left_advice() {
    if [ -n "$MODULES_IN_USE" ]; then
        printf ', in use are %s: end the pods that use the GPUs, then delete this pod' "$MODULES_IN_USE"
    else
        printf ': the warnings above say why; reboot the node if they persist'
    fi
}
