# shellcheck shell=sh
# The driver root: the image's user space, mounted where the node's other containers and the kernel look for it.

# Let the loader find the libraries: from outside by the driver root's own cache, which the container toolkit reads, and
# in this container with no environment at all. The links of the libraries are the image's and stay as they are.
write_loader_caches() {
    mkdir -p "$DRIVER_FOLDER/etc" || die "$DRIVER_FOLDER/etc cannot be made: the container needs a writable file system"
    answer=$(ldconfig -X -r "$DRIVER_FOLDER" "/usr/lib/$TRIPLET" 2>&1) &&
        [ -s "$DRIVER_FOLDER/etc/ld.so.cache" ] ||
        die "the driver root's loader cache cannot be made ($answer): the container needs a writable file system"
    answer=$(ldconfig -X "$DRIVER_FOLDER/usr/lib/$TRIPLET" 2>&1) ||
        die "the container's loader cache cannot be made ($answer): the container needs a writable file system"
}

mount_root() {
    # A mount that stays in this container helps nobody: toolkit, device plugin and the kernel's firmware loader look
    # from outside.
    answer=$(findmnt --noheadings --output PROPAGATION --target "$RUN_FOLDER" 2>&1) ||
        die "the propagation of $RUN_FOLDER cannot be read ($answer): mount the host's /run/nvidia there"
    case $answer in
        *shared*) ;;
        *) die "$RUN_FOLDER is mounted $answer, so the node would not see the driver: mount it Bidirectional" ;;
    esac
    undo_root || die "$ROOT_FOLDER has a mount of an earlier run: unmount it on the node"
    mkdir -p "$ROOT_FOLDER" || die "$ROOT_FOLDER cannot be made: mount the host's /run/nvidia there, writable"
    note root
    # It stays shared, as its parent is: so the unmounting, too, reaches the node, with whatever others mounted below.
    answer=$(mount --rbind "$DRIVER_FOLDER" "$ROOT_FOLDER" 2>&1) ||
        die "the driver root cannot be mounted at $ROOT_FOLDER ($answer): run this container privileged"
    log "driver root mounted at $ROOT_FOLDER"
}

# Unmount the driver root, and any that killed containers left below it. Lazily: pods that still have a library of it
# open keep that, and must not keep the node from getting its next driver.
undo_root() {
    while mountpoint -q "$ROOT_FOLDER"; do
        answer=$(umount --recursive --lazy "$ROOT_FOLDER" 2>&1) || {
            warn "$ROOT_FOLDER cannot be unmounted: $answer"
            return 1
        }
    done
}

# Tell the kernel where the GPUs' firmware is. It looks from the host's root, so this is a path there.
set_firmware_path() {
    old=$(cat "$FIRMWARE_SETTING" 2>/dev/null) ||
        die "$FIRMWARE_SETTING cannot be read: mount it from the host, the GPUs' firmware is found by it"
    [ "$old" != "$FIRMWARE_FOLDER" ] || old=''
    [ -z "$old" ] || log "the kernel's firmware path is $old; it comes back when the driver is unloaded"
    note firmware "$old"
    write_firmware_path "$FIRMWARE_FOLDER" ||
        die "$FIRMWARE_SETTING cannot be written: mount it from the host, writable; the GPUs' firmware is found by it"
    log "firmware path set to $FIRMWARE_FOLDER"
}

# undo_firmware OLD
undo_firmware() {
    [ "$(cat "$FIRMWARE_SETTING" 2>/dev/null)" = "$FIRMWARE_FOLDER" ] || return 0
    write_firmware_path "$1" || {
        warn "the kernel's firmware path cannot be set back to '$1' in $FIRMWARE_SETTING"
        return 1
    }
}

# write_firmware_path PATH: an empty one is written as a NUL, for a write of nothing never reaches the kernel
write_firmware_path() {
    if [ -n "$1" ]; then
        write_setting "$1" "$FIRMWARE_SETTING"
    else
        { printf '\0' >"$FIRMWARE_SETTING"; } 2>/dev/null
    fi
}
