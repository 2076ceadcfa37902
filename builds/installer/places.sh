# shellcheck shell=sh disable=SC2034 # the other parts use them
# Where things are, in the image and on the node. Tests set the INSTALLER_* variables; nothing else does.

HOME_FOLDER=${INSTALLER_HOME:-/opt/nvidia}      # what the image brings
RUN_FOLDER=${INSTALLER_RUN:-/run/nvidia}        # what the node's containers share, mounted from the host
SYS_FOLDER=${INSTALLER_SYS:-/sys}
PROC_FOLDER=${INSTALLER_PROC:-/proc}
DEVICE_FOLDER=${INSTALLER_DEVICES:-/dev}
PARAMETER_FOLDER=${INSTALLER_PARAMETERS:-/drivers} # <module>.conf, mounted by the operator
PID_FOLDER=${INSTALLER_PIDS:-/var/run/nvidia-persistenced}
FABRIC_FOLDER=${INSTALLER_FABRIC:-/run/nvidia-fabricmanager} # sockets, mounted from the host
NETWORK_FOLDER=${INSTALLER_NETWORK:-/run/mellanox/drivers}   # the network drivers' container, mounted from the host
SHARE_FOLDER=${INSTALLER_SHARE:-/usr/share/nvidia}           # where the vendor's programs look for their files
INTERVAL=${INSTALLER_INTERVAL:-10}              # seconds between two looks at the services
PAUSE=${INSTALLER_PAUSE:-1}                     # seconds between two looks for what is about to come

RELEASE_FILE=$HOME_FOLDER/installer/release.env
DRIVER_FOLDER=$HOME_FOLDER/driver
MODULE_FOLDER=$HOME_FOLDER/modules

ROOT_FOLDER=$RUN_FOLDER/driver
STATE_FOLDER=$RUN_FOLDER/installer
CHOICE_FILE=$STATE_FOLDER/modules # the folder of the loaded modules, in every container of this image
STATUS_FILE=$RUN_FOLDER/validations/.driver-daemons-status
READY_FILE=$RUN_FOLDER/validations/.driver-ctr-ready

FIRMWARE_SETTING=$SYS_FOLDER/module/firmware_class/parameters/path
FIRMWARE_FOLDER=$ROOT_FOLDER/lib/firmware
GPU_DATA=$DRIVER_FOLDER/usr/share/nvidia/supported-gpus/supported-gpus.json
FABRIC_DATA=$DRIVER_FOLDER/usr/share/nvidia/nvswitch
