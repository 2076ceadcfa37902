#!/bin/sh
# Run by the host's own shell, on the host: puts a folder on containerd's PATH from its next start, if gVisor is here.
# containerd-path.sh FOLDER [ROOT]; ROOT is for tests.
set -eu

folder=$1 root=${2-}
drop_in=$root/run/systemd/system/containerd.service.d/zz-nvidia-toolkit.conf # of this name to be the last word on PATH

gvisor=''
for place in /var/bin/containerruntimes /usr/local/sbin /usr/local/bin /usr/sbin /usr/bin /opt/bin /opt/cni/bin; do
    [ ! -x "$root$place/containerd-shim-runsc-v1" ] || gvisor=yes
done
[ -n "$gvisor" ] && command -v systemctl >/dev/null || exit 0

path=''
# shellcheck disable=SC2046 # one word an assignment
for assignment in $(systemctl show --property=Environment --value containerd.service); do
    case $assignment in PATH=*) path=${assignment#PATH=} ;; *) ;; esac
done
path=${path:-/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin}
case ":$path:" in *":$folder:"*) exit 0 ;; *) ;; esac

mkdir -p "${drop_in%/*}"
printf '[Service]\nEnvironment=PATH=%s:%s\n' "$path" "$folder" >"$drop_in.new"
mv "$drop_in.new" "$drop_in"
systemctl daemon-reload
echo "this node has gVisor: $folder is on the PATH of containerd from its next start"
