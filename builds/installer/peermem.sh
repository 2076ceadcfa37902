# shellcheck shell=sh
# GPUDirect RDMA: nvidia-peermem, which a container of its own loads once driver and network drivers are there, and
# again whenever the network drivers took it with them. The driver's container has the journal, and unloads this one
# with the rest, so the two never write to one file.

do_reload_nvidia_peermem() {
    begin_alone peermem-lock
    wanted=$(switch_of GPU_DIRECT_RDMA_ENABLED "${GPU_DIRECT_RDMA_ENABLED:-true}") || die "$wanted"
    [ "$wanted" = true ] ||
        die 'GPU_DIRECT_RDMA_ENABLED is false: set driver.rdma.enabled to true, or leave this container out'
    network=$(switch_of USE_HOST_MOFED "${USE_HOST_MOFED:-false}") || die "$network"
    told=''
    while :; do
        lacking=$(peermem_lacks "$network")
        [ -n "$lacking" ] || break
        [ "$lacking" = "$told" ] || log "waiting for $lacking"
        told=$lacking
        pause "$PAUSE"
    done
    trap 'unload_peermem $?' EXIT
    if is_loaded nvidia-peermem; then
        log 'module nvidia-peermem is loaded already'
    else
        read -r modules <"$CHOICE_FILE" || die "$CHOICE_FILE cannot be read: restart the driver's container"
        needed=$(needs_of "$modules" nvidia-peermem) || die "$needed"
        load_needed nvidia-peermem "$needed"
        load_module "$modules" nvidia-peermem
    fi
    while is_loaded nvidia-peermem; do
        pause "$INTERVAL"
    done
    die 'nvidia-peermem was unloaded, with the driver or the network drivers: once restarted this container loads it again'
}

do_probe_nvidia_peermem() {
    is_loaded nvidia-peermem ||
        die 'nvidia-peermem is not loaded: the log of the container that runs reload_nvidia_peermem tells why'
    # While it is being loaded or unloaded it is there as well.
    state=live
    [ ! -r "$SYS_FOLDER/module/nvidia_peermem/initstate" ] ||
        read -r state <"$SYS_FOLDER/module/nvidia_peermem/initstate" || :
    [ "$state" = live ] || die "nvidia-peermem is not loaded, it is $state: wait for the next probe"
}

# peermem_lacks true|false: what must still come; nothing when all is there. The argument is whether the network
# drivers are the host's, or come in a container, which says so when it is done.
peermem_lacks() {
    if ! is_loaded nvidia || [ "$(cat "$STATUS_FILE" 2>/dev/null)" != Ready ]; then
        printf 'the driver, which another container loads\n'
    elif [ "$1" = true ]; then
        for module in ib_core mlx5_core; do
            is_loaded "$module" || {
                printf "the host's module %s\n" "$module"
                return
            }
        done
    elif [ ! -e "$NETWORK_FOLDER/.driver-ready" ]; then
        printf 'the network drivers: their container makes %s (where they are the host'"'"'s, %s)\n' \
            "$NETWORK_FOLDER/.driver-ready" 'set driver.rdma.useHostMofed to true'
    fi
}

# unload_peermem STATUS: the end of a run that may have loaded it
unload_peermem() {
    status=$1
    trap '' TERM INT
    trap - EXIT
    explain "$status"
    MODULES_IN_USE=$(modules_in_use)
    case " $MODULES_IN_USE " in *' nvidia-peermem '*) ;; *) MODULES_IN_USE='' ;; esac # the others are not ours
    left=''
    undo_module nvidia-peermem ||
        left='nvidia-peermem stays loaded: end the pods that use RDMA, then delete this pod'
    leave "$status" "$left"
}
