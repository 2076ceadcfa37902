# shellcheck shell=sh disable=SC2034 # the other parts use the variables
# The node's devices: on the PCI bus, as the loaded driver knows them, and what is set up before it is loaded.

GPUS=''    # PCI device ids of the GPUs
SWITCHES=0 # number of NVSwitches on the bus
BRIDGES='' # PCI addresses of the devices by which NVSwitches of NVLink 5 are managed
SUPPORT='' # gpu_support's lines on the GPUs
REFUSED='' # why there are none

# pci_devices FOLDER: one line a device, `gpu <id> <address>` and `switch <id>` for NVIDIA's, and `network <address>` for
# Mellanox's, but for virtual functions
pci_devices() (
    for device in "$1"/bus/pci/devices/*; do
        [ -r "$device/vendor" ] && [ -r "$device/class" ] && [ -r "$device/device" ] || continue
        read -r vendor <"$device/vendor" || :
        read -r class <"$device/class" || :
        read -r id <"$device/device" || :
        case $vendor:$class in
            0x10de:0x0300* | 0x10de:0x0302*) printf 'gpu %s %s\n' "${id#0x}" "${device##*/}" ;;
            0x10de:0x0680*) printf 'switch %s\n' "${id#0x}" ;;
            0x15b3:*) [ -e "$device/physfn" ] || printf 'network %s\n' "${device##*/}" ;;
            *) ;;
        esac
    done
)

# survey: what is on the bus, and what the driver's data say of it
survey() {
    GPUS='' SWITCHES=0 BRIDGES='' SUPPORT='' REFUSED='' network='' gpu_addresses=''
    while read -r kind id address; do
        case $kind in
            gpu) GPUS="$GPUS $id" gpu_addresses="$gpu_addresses $address" ;;
            switch) SWITCHES=$((SWITCHES + 1)) ;;
            network) network="$network $id" ;;
            *) ;;
        esac
    done <<DEVICES
$(pci_devices "$SYS_FOLDER")
DEVICES
    [ -n "$GPUS" ] || return 0
    # NVSwitches of NVLink 5 are not on the bus: a network adapter whose vital product data have SW_MNG leads to them.
    # Reading these takes its time, so it is done for GPUs that have no switches on the bus only.
    if [ "$SWITCHES" -eq 0 ]; then
        for address in $network; do
            ! grep -q SW_MNG "$SYS_FOLDER/bus/pci/devices/$address/vpd" 2>/dev/null || BRIDGES="$BRIDGES $address"
        done
    fi
    # shellcheck disable=SC2086 # one word an id
    SUPPORT=$(gpu_support "$GPU_DATA" $GPUS) || {
        REFUSED=$SUPPORT SUPPORT=''
        return 0
    }
    printf '%s\n' "$SUPPORT" | sort -u | while read -r id types name; do
        log "GPU 10de:$id $name, module types: $types"
    done
}

# gpu_minors FOLDER: the minor numbers of the GPUs that the loaded driver has taken on
gpu_minors() (
    for gpu in "$1"/driver/nvidia/gpus/*/information; do
        [ -r "$gpu" ] || continue
        awk -F: '/^Device Minor/ { gsub(/[^0-9]/, "", $2); print $2 }' "$gpu"
    done
)

# Let GPUs reach memory without translation: else traffic from GPU to GPU takes the long way, or none. It can be set
# only while no driver has the device. Where the kernel refuses (other devices in the group, an IOMMU that has no such
# mode), GPUs work, only slower.
bypass_iommu() {
    for address in $gpu_addresses; do
        setting=$SYS_FOLDER/bus/pci/devices/$address/iommu_group/type
        old=$(cat "$setting" 2>/dev/null) || continue
        case $old in DMA | DMA-FQ) ;; *) continue ;; esac # the latter is the former, with lazy flushes
        note iommu "$address $old"
        if write_setting identity "$setting"; then
            log "IOMMU group of $address set from $old to identity"
        else
            warn "the IOMMU group of $address stays $old, the kernel refuses identity: traffic between GPUs may be slow"
        fi
    done
}

# undo_iommu ADDRESS OLD: a device that a driver still has keeps what it has until that is gone
undo_iommu() {
    [ -z "$(loaded_modules)" ] || return 1
    setting=$SYS_FOLDER/bus/pci/devices/${1% *}/iommu_group/type
    [ "$(cat "$setting" 2>/dev/null)" = identity ] || return 0
    write_setting "${1#* }" "$setting" || warn "the IOMMU group of ${1% *} stays identity: a reboot sets it back"
}

# write_setting VALUE FILE
write_setting() {
    { printf '%s' "$1" >"$2"; } 2>/dev/null
}
