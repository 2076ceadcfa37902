# shellcheck shell=sh
# Compiles the guest's program and its module, in a kmodbuild container. SYSOUT is the folder of the kernel's headers;
# CROSS_COMPILE what the compiler's name begins with where it makes programs for another architecture.
set -eu

make -C "$SYSOUT" M=/src modules

# The compiler by the kernel's name for it: an image need not have one that is called just gcc.
compiler=${CROSS_COMPILE-}gcc
if ! command -v "$compiler" >/dev/null; then
    for compiler in "/usr/bin/$compiler"-[0-9]*; do :; done
fi
"$compiler" -O2 -Wall -Werror -ffreestanding -fno-builtin -fno-stack-protector -fno-pie -fno-tree-loop-distribute-patterns \
    -static -nostdlib -no-pie -Wl,--build-id=none -o /src/init /src/init.c

mkdir /out
cp /src/init /src/nvswitch.ko /out/
