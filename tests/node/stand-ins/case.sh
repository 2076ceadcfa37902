#!/bin/sh
# One run of the installer in the image, and what it left. The container's own mount namespace is the host's here; the
# installer runs in another, which shares /run/nvidia with it, as a pod does with Bidirectional propagation.
#
# case.sh VARIANT COMMAND READY ACT AT: VARIANT is a folder below /variants; COMMAND is told to stop once it says READY;
# ACT (fail, kill, stop) is done at call number AT. A killed one is run again, undisturbed.
set -eu
variant=$1 command=$2 ready=$3 act=$4 at=$5

pod=$(cat /run/pod)
in_pod() {
    # Not the stand-in of this name.
    /usr/bin/nsenter --mount="/proc/$pod/ns/mnt" "$@"
}

mounts() {
    grep -c ' /run/nvidia/driver ' "$1" || :
}

part() {
    printf '\036%s\n' "$1"
}

# run COMMAND READY: in the pod, in a session of its own, until it ends or is ready and has been told to stop
run() {
    : >/node/ready
    : >/node/out
    # shellcheck disable=SC2016 # the inner shell expands it
    setsid sh -c 'echo $$ >/node/pid; exec /usr/bin/nsenter --mount="/proc/$1/ns/mnt" nvidia-driver "$2"' \
        sh "$pod" "$1" >/node/out 2>/node/err </dev/null &
    child=$!
    while kill -0 "$child" 2>/dev/null; do
        if grep -q "$2" /node/out; then
            wc -l </node/calls >/node/ready
            kill -TERM "$child" || :
            break
        fi
        sleep 0.02
    done
    status=0
    wait "$child" || status=$?
}

# A node of this kind, as it was before.
/usr/bin/umount -R /run/nvidia/driver 2>/dev/null || :
rm -rf /node /run/nvidia/* /run/nvidia-fabricmanager /dev/infiniband /usr/share/nvidia /opt/nvidia/driver/etc/ld.so.cache
cp -a "/variants/$variant" /node
mkdir -p /node/pids /run/mellanox/drivers
: >/run/mellanox/drivers/.driver-ready
: >/node/calls
echo 'none 0' >/node/act
rm -f /opt/nvidia/driver/usr/bin/nv-fabricmanager /opt/nvidia/driver/usr/bin/nvlsm
[ ! -e /node/with-fabric ] || cp /fabric/* /opt/nvidia/driver/usr/bin/
if [ -e /node/first ]; then # what must have been done before
    in_pod nvidia-driver "$(cat /node/first)" >/node/out 2>&1 || { cat /node/out && exit 1; }
    : >/node/calls
fi

echo "$act $at" >/node/act
run "$command" "$ready"
if [ "$act" = kill ]; then
    part killed
    echo "$status"
    part before
    cat /node/calls
    : >/node/calls
    echo 'none 0' >/node/act
    run "$command" "$ready"
fi
part status
echo "$status"
for file in out err calls ready; do
    part "$file"
    cat "/node/$file"
done
part modules
(cd /node/sys/module && ls -d nvidia* 2>/dev/null) || :
part host-mounts
mounts /proc/self/mountinfo
part pod-mounts
mounts "/proc/$pod/mountinfo"
part firmware
tr -d '\0\n' </node/sys/module/firmware_class/parameters/path
part iommu
cat /node/sys/bus/pci/devices/*/iommu_group/type 2>/dev/null || :
part probe-files
ls -A /run/nvidia/validations 2>/dev/null || :
part journal
cat /run/nvidia/installer/journal 2>/dev/null || :
part services
for file in /node/pids/*; do
    [ -s "$file" ] || continue
    read -r pid <"$file"
    ! grep -q '^State:.[^Z]' "/proc/$pid/status" 2>/dev/null || echo "${file##*/}"
done
if [ "$command" = init ]; then # what could not be undone can be, later
    echo 'none 0' >/node/act
    part unload
    in_pod nvidia-driver unload 2>&1 || echo "status $?"
    part after-unload
    (cd /node/sys/module && ls -d nvidia* 2>/dev/null) || :
    grep ' /run/nvidia/driver ' /proc/self/mountinfo || :
    cat /run/nvidia/installer/journal 2>/dev/null || :
fi
# Whatever is left of this run ends with it.
kill -s KILL -- "-$(cat /node/pid)" 2>/dev/null || :
