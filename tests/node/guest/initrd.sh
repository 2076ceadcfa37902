#!/bin/busybox sh
# The first program in the machine: loads what the kernel needs to find its disk, and hands on to the node.
set -eu
busybox=/bin/busybox

"$busybox" mount -t proc proc /proc
"$busybox" mount -t devtmpfs devtmpfs /dev
while read -r module; do
    "$busybox" insmod "/modules/$module.ko"
done </order

tries=100
until [ -b /dev/nvme0n1 ]; do
    tries=$((tries - 1))
    [ "$tries" -gt 0 ] || exit 1 # the kernel panics, and the machine ends
    "$busybox" sleep 0.1
done
"$busybox" mkdir /node
"$busybox" mount -t ext4 /dev/nvme0n1 /node
"$busybox" umount /proc
exec "$busybox" switch_root /node /node/init
