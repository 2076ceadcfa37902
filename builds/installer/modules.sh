# shellcheck shell=sh
# The kernel modules: loading in order, unloading in reverse.

# sys_name MODULE: the kernel's own spelling
sys_name() {
    printf '%s\n' "$1" | tr - _
}

is_loaded() {
    [ -e "$SYS_FOLDER/module/$(sys_name "$1")" ]
}

# Which modules of NVIDIA's are loaded
loaded_modules() (
    set --
    for module in nvidia nvidia-uvm nvidia-modeset nvidia-drm nvidia-peermem; do
        ! is_loaded "$module" || set -- "$@" "$module"
    done
    printf '%s\n' "$*"
)

# Which modules have users other than the modules on top of them
modules_in_use() (
    set --
    for module in nvidia-peermem nvidia-drm nvidia-modeset nvidia-uvm nvidia; do
        folder=$SYS_FOLDER/module/$(sys_name "$module")
        [ -r "$folder/refcnt" ] || continue
        read -r users <"$folder/refcnt"
        for holder in "$folder"/holders/*; do
            [ ! -e "$holder" ] || users=$((users - 1))
        done
        [ "$users" -le 0 ] || set -- "$@" "$module"
    done
    printf '%s\n' "$*"
)

# load_modules FOLDER
load_modules() {
    for module in nvidia nvidia-uvm nvidia-modeset nvidia-drm; do
        needed=$(needs_of "$1" "$module") || die "$needed"
        # On a kernel without DRM this one is an empty shell that needs nothing, not even its siblings.
        if [ "$module" = nvidia-drm ] && [ -z "$needed" ]; then
            log 'nvidia-drm is left out: this kernel has no DRM'
            continue
        fi
        load_needed "$module" "$needed"
        note module "$module"
        load_module "$1" "$module"
    done
    # Another container of the pod loads this one, once the driver is ready; but all that leans on nvidia goes with it.
    note module nvidia-peermem
}

# needs_of FOLDER MODULE: the modules that it needs, a comma between two
needs_of() (
    said=$(modinfo -F depends "$1/$2.ko" 2>&1) || {
        printf '%s cannot be read (%s): use an undamaged image\n' "$1/$2.ko" "$said"
        return 1
    }
    printf '%s\n' "$said"
)

# load_needed MODULE NAMES: the kernel's own modules among NAMES, a comma between two. They are the host's, so the
# host's modprobe loads them, and they stay when the driver goes.
load_needed() {
    for name in $(printf '%s\n' "$2" | tr , ' '); do
        case $name in nvidia | nvidia[-_]*) continue ;; *) ;; esac
        answer=$(nsenter -t 1 -m -- modprobe "$name" 2>&1) ||
            die "the kernel's module $name, which $1 needs, cannot be loaded ($answer): dmesg of the node tells why"
    done
}

# load_module FOLDER MODULE
load_module() {
    parameters=$(parameters_of "$PARAMETER_FOLDER/$2.conf") || die "$parameters"
    defaults=$(default_parameters "$2" "$SUPPORT" "$parameters")
    file=$1/$2.ko name=$2
    set --
    while IFS= read -r parameter; do
        [ -z "$parameter" ] || set -- "$@" "$parameter"
    done <<PARAMETERS
$defaults
$parameters
PARAMETERS
    answer=$(insmod "$file" "$@" 2>&1) ||
        die "module $name cannot be loaded ($answer): $(insmod_advice "$name" "$answer")"
    log "module $name loaded${*:+ with $*}"
}

# undo_module MODULE. Nothing is unloaded while any of them is in use: half a driver serves nobody.
undo_module() {
    is_loaded "$1" || return 0
    [ -z "$MODULES_IN_USE" ] || return 1
    answer=$(rmmod "$(sys_name "$1")" 2>&1) || {
        # Two containers may unload nvidia-peermem at once, when their pod ends.
        is_loaded "$1" || return 0
        warn "module $1 cannot be unloaded: $answer"
        return 1
    }
    log "module $1 unloaded"
}
