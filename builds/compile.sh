#!/bin/sh
# Compiles the kernel modules of one type. Runs in a container of the kmodbuild image, without network:
# sources in /src/$FOLDER (always the same path, so that the result does not depend on where we run),
# results in /out. The environment says the rest.
set -eu

cd "/src/$FOLDER"
[ ! -d /src/conftest ] || cp -a /src/conftest .

# -g0 comes after the kernel's own -g: what debug information costs to make would be stripped below anyway.
# Without CROSS_COMPILE the tools are the image's own.
make -j"$JOBS" modules \
  SYSSRC="$SYSSRC" SYSOUT="$SYSOUT" KERNEL_UNAME="$KERNEL" KCFLAGS=-g0 \
  ARCH="$ARCH" ${CROSS_COMPILE:+CROSS_COMPILE="$CROSS_COMPILE"}

mkdir -p /out/modules
for module in $MODULES; do
  if [ ! -s "$module.ko" ]; then
    echo "compile.sh: error: make succeeded but $module.ko is missing" >&2
    exit 1
  fi
  "${CROSS_COMPILE:-}strip" --strip-debug -o "/out/modules/$module.ko" "$module.ko"
done
cp -a conftest /out/conftest
