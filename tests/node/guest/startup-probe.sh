# shellcheck shell=sh
# The GPU Operator's startup probe, after the words of its contract: the module is loaded, the daemons say Ready if
# they say anything, nvidia-smi succeeds; then the container is marked ready.
if [ ! -f /sys/module/nvidia/refcnt ]; then
    echo 'nvidia is not loaded'
    exit 1
fi
status=/run/nvidia/validations/.driver-daemons-status
if [ -e "$status" ] && [ "$(cat "$status")" != Ready ]; then
    echo "daemons: $(cat "$status")"
    exit 1
fi
nvidia-smi || exit
touch /run/nvidia/validations/.driver-ctr-ready
