# shellcheck shell=sh
# Pods of the driver, as a kubelet and its runtime run them; and what can be seen on the node meanwhile.
# All that a step has to say goes to standard output; whether it is right is not judged here.

STATUS=/run/nvidia/validations/.driver-daemons-status
FIRMWARE=/sys/module/firmware_class/parameters/path
PATIENCE=600 # tenths of a second that anything may take

runtime() {
    crun --root /var/lib/crun "$@" # not below /run, whose use is measured
}

# start POD [LAYER]...: a container of the image, with layers on top of it; its log and status go to /pods/POD
start() {
    pod=/pods/$1
    layers=/image
    shift
    for layer in "$@"; do layers=/layers/$layer:$layers; done
    # What the operator mounts from the host, the kubelet makes where it is missing.
    mkdir -p /run/nvidia/driver/lib/firmware /run/nvidia-fabricmanager /run/nvidia-topologyd /run/mellanox/drivers ||
        return
    mkdir -p "$pod/rootfs" "$pod/upper" "$pod/work" || return
    : >"$pod/started"
    mount -t overlay -o "lowerdir=$layers,upperdir=$pod/upper,workdir=$pod/work" overlay "$pod/rootfs" || return
    (
        status=0
        runtime run --bundle "$pod" "${pod##*/}" >"$pod/log" 2>&1 || status=$?
        echo "$status" >"$pod/status"
    ) </dev/null >/dev/null 2>&1 &
}

# until_true COMMAND...
until_true() {
    left=$PATIENCE
    until "$@"; do
        left=$((left - 1))
        [ "$left" -gt 0 ] || {
            echo "in $((PATIENCE / 10)) s not true: $*"
            return 1
        }
        sleep 0.1
    done
}

has_ended() {
    [ -s "/pods/$1/status" ]
}

# Whether the pod says so: not one that was killed before it.
is_ready() {
    [ "$STATUS" -nt "/pods/$1/started" ] && [ "$(cat "$STATUS" 2>/dev/null)" = Ready ]
}

is_ready_or_has_ended() {
    is_ready "$1" || has_ended "$1"
}

# run POD: start one that is not the driver's
run() {
    start "$1" || return
    until_true inside "$1" true 2>/dev/null
}

# init POD [LAYER]...: start a pod and wait until it says that the driver is ready, or ends; its log, and its status
# if it ended
init() {
    start "$@" || return
    until_true is_ready_or_has_ended "$1" || return
    log "$1"
    ! has_ended "$1" || return "$(cat "/pods/$1/status")"
}

log() {
    cat "/pods/$1/log"
}

# probe POD: the operator's startup probe, once
probe() {
    runtime exec "$1" sh /usr/local/bin/startup-probe.sh
}

# inside POD COMMAND...
inside() {
    runtime exec "$@"
}

# stop POD: as the kubelet stops a pod, first its preStop, then SIGTERM; what it says from then on, and its status
stop() {
    said=$(log "$1" | wc -l)
    runtime exec "$1" /bin/sh -c 'rm -f /run/nvidia/validations/.*-ctr-ready' || return
    runtime kill "$1" TERM || return
    gone "$1" || return
    tail -n "+$((said + 1))" "/pods/$1/log"
    return "$(cat "/pods/$1/status")"
}

# crash POD: killed with all of its processes, as a runtime does where the first of them has died
crash() {
    runtime kill --all "$1" KILL || return
    gone "$1" || return
    return "$(cat "/pods/$1/status")"
}

# lose POD PROGRAM: a program of the pod's dies; what the pod says from then on, and its status
lose() {
    said=$(log "$1" | wc -l)
    pkill -KILL -x "$(printf '%.15s' "$2")" || return # as much of a name as the kernel keeps
    gone "$1" || return
    tail -n "+$((said + 1))" "/pods/$1/log"
    return "$(cat "/pods/$1/status")"
}

# interrupt POD SIGNAL [--all]: start a pod and signal it, or all of its processes, while it is at work: the driver root
# is mounted, modules are not loaded; what it said, and its status
interrupt() {
    start "$1" || return
    until_true mountpoint -q /run/nvidia/driver || return
    runtime kill ${3:+"$3"} "$1" "$2" || return
    gone "$1" || return
    log "$1"
    return "$(cat "/pods/$1/status")"
}

# gone POD: wait for its end; then the runtime forgets the container and what was written in it
gone() {
    until_true has_ended "$1" || return
    runtime delete --force "$1" 2>/dev/null || :
    umount "/pods/$1/rootfs" || return
    rm -rf "/pods/$1/upper" "/pods/$1/work"
}

# use: somebody on the node has a device of the driver's open. unuse: and closes it again
use() {
    major=$(awk '$2 == "nvidia-uvm" { print $1 }' /proc/devices)
    [ -c /dev/nvidia-uvm ] || mknod /dev/nvidia-uvm c "$major" 0 || return
    sleep 1000 8</dev/nvidia-uvm >/dev/null 2>&1 &
    echo $! >/var/tmp/user
}

unuse() {
    user=$(cat /var/tmp/user)
    kill "$user" || return
    until_true is_gone "$user" || return
    rm /dev/nvidia-uvm
}

is_gone() {
    [ ! -e "/proc/$1/fd/8" ]
}

# What is on the node, each a kind of line:
#       module <name>
#       mount <place below /run/nvidia> <propagation>
#       firmware <path that the kernel has>
#       file <path below /run/nvidia, but not of the driver root>
#       daemon <name of a program>
state() {
    awk '$1 ~ /^nvidia/ { print "module", $1 }' /proc/modules
    awk '$5 ~ "^/run/nvidia" { print "mount", $5, $7 }' /proc/self/mountinfo
    printf 'firmware %s\n' "$(tr -d '\000' <"$FIRMWARE")"
    find /run/nvidia -path /run/nvidia/driver -prune -o -type f -printf 'file %p\n'
    for program in /proc/[0-9]*/comm; do
        [ -e "${program%comm}exe" ] || continue # one of the kernel's own threads
        read -r name <"$program" 2>/dev/null || continue
        case $name in nvidia* | nv-*) printf 'daemon %s\n' "$name" ;; *) ;; esac
    done
}

# show FILE
show() {
    cat "$1"
}

# tree FOLDER: all there is below a folder, `<type> <path> [<target of a link>]`
tree() {
    find "$1" -mindepth 1 -printf '%y %P %l\n'
}

# firmware: where the kernel looks for it, from the host
firmware() {
    find "$(tr -d '\000' <"$FIRMWARE")/" -name '*.bin' -size +0
}

# used FOLDER: bytes in use on the file system of a folder
used() {
    stat -f -c '%S %b %f' "$1" | {
        read -r size blocks free
        echo "$((size * (blocks - free)))"
    }
}

# classic TYPE: the classic way, as far as it is comparable: archives unpacked into the node's memory, modules loaded
# from there
classic() {
    root=/run/nvidia/driver
    mkdir -p "$root" || return
    for archive in "user-space" "$1"; do
        tar -xzf "/node/classic/$archive.tar.gz" -C "$root" || return
    done
    printf '%s/lib/firmware' "$root" >"$FIRMWARE" || return
    for module in nvidia nvidia-uvm nvidia-modeset nvidia-drm; do
        file=$root/lib/modules/$module.ko
        needs=$(modinfo -F depends "$file") || return
        [ "$module:$needs" != nvidia-drm: ] || continue # this kernel has no DRM
        for other in $(printf '%s\n' "$needs" | tr , ' '); do
            case $other in nvidia*) ;; *) modprobe "$other" || return ;; esac
        done
        insmod "$file" || return
    done
}

unclassic() {
    for module in nvidia_drm nvidia_modeset nvidia_uvm nvidia; do
        [ ! -e "/sys/module/$module" ] || rmmod "$module" || return
    done
    printf '\000' >"$FIRMWARE" || return
    find /run/nvidia/driver -mindepth 1 -delete
}
