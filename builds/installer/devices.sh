# shellcheck shell=sh
# NVIDIA's devices on the node: on the PCI bus, and as the loaded driver knows them.

# pci_devices FOLDER: one line a GPU or NVSwitch of NVIDIA's, `gpu <id>` or `switch <id>`
pci_devices() (
    for device in "$1"/bus/pci/devices/*; do
        [ -r "$device/vendor" ] && [ -r "$device/class" ] && [ -r "$device/device" ] || continue
        read -r vendor <"$device/vendor" || :
        read -r class <"$device/class" || :
        read -r id <"$device/device" || :
        case $vendor:$class in
            0x10de:0x0300* | 0x10de:0x0302*) printf 'gpu %s\n' "${id#0x}" ;;
            0x10de:0x0680*) printf 'switch %s\n' "${id#0x}" ;;
            *) ;;
        esac
    done
)

# gpu_minors FOLDER: the minor numbers of the GPUs that the loaded driver has taken on
gpu_minors() (
    for gpu in "$1"/driver/nvidia/gpus/*/information; do
        [ -r "$gpu" ] || continue
        awk -F: '/^Device Minor/ { gsub(/[^0-9]/, "", $2); print $2 }' "$gpu"
    done
)
