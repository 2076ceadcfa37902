# shellcheck shell=sh
# The decisions: which set of modules, which type, which parameters. Every function here reads its arguments and
# input only, and prints the answer; where there is none it prints why, fit for an error message, and fails.

# choose_set FOLDER RELEASE VERSION: the folder of the modules made for the running kernel.
# RELEASE is `uname -r`; VERSION is /proc/version, which names the kernel's package and so tells builds of one
# release name apart.
choose_set() (
    known='' same=''
    for folder in "$1"/*/; do
        [ -r "$folder/release" ] && [ -r "$folder/package" ] || continue
        release=$(cat "$folder/release")
        package=$(cat "$folder/package")
        known="${known:+$known, }$release ($package)"
        [ "$release" = "$2" ] || continue
        same=yes
        case " $3 " in
            *" $package "*)
                printf '%s\n' "${folder%/}"
                return
                ;;
            *) ;;
        esac
    done
    if [ -n "$same" ]; then
        printf 'no modules for this build of kernel %s, %s: ' "$2" "$3"
    else
        printf 'no modules for kernel %s: ' "$2"
    fi
    printf 'use an image made for it; this one has modules for %s\n' "${known:-no kernel at all}"
    return 1
)

# requested_type KERNEL_MODULE_TYPE OPEN_KERNEL_MODULES_ENABLED: auto, open or proprietary
requested_type() {
    case $1 in
        auto | open | proprietary) printf '%s\n' "$1" ;;
        '')
            case $2 in
                '') printf 'auto\n' ;;
                true) printf 'open\n' ;;
                false) printf 'proprietary\n' ;;
                *)
                    printf "OPEN_KERNEL_MODULES_ENABLED is '%s': set it to true or false\n" "$2"
                    return 1
                    ;;
            esac
            ;;
        *)
            printf "KERNEL_MODULE_TYPE is '%s': set it to auto, open or proprietary\n" "$1"
            return 1
            ;;
    esac
}

# switch_of NAME VALUE: true or false
switch_of() {
    case $2 in
        true | false) printf '%s\n' "$2" ;;
        *)
            printf "%s is '%s': set it to true or false\n" "$1" "$2"
            return 1
            ;;
    esac
}

# gpu_support DATA ID...: one line a GPU, `<id> <support> <name>`, by the driver's own supported-gpus.json.
# Support is `open` or `proprietary` where only that type drives the GPU, `both`, or `unknown`. A GPU is known by its
# PCI device id alone; where entries of one id differ, only what all of them promise counts.
#
# There is no JSON reader in the image. Splitting at quotation marks tells strings from structure, whatever the layout:
# records of odd number are structure, those of even number are strings (but for escaped quotation marks).
gpu_support() (
    data=$1
    shift
    awk -v wanted="$*" '
        BEGIN {
            RS = "\""
            count = split(tolower(wanted), ids, " ")
        }

        # A chip is an object in the list of the outermost object: at depth 2. What may be nested in it is passed over.
        function structure(text,   at, sign) {
            for (at = 1; at <= length(text); at++) {
                sign = substr(text, at, 1)
                if (sign == "{" && ++depth == 2)
                    id = name = legacy = features = key = list = ""
                else if (sign == "}" && depth-- == 2)
                    chip()
                else if (sign == ":")
                    key = last
                else if (sign == "[" && depth == 2)
                    list = 1
                else if (sign == "]" && depth == 2)
                    list = key = ""
                else if (sign == "," && !list)
                    key = ""
            }
        }

        function string(text) {
            last = text
            if (depth != 2)
                return
            if (key == "devid") {
                id = tolower(text)
                sub(/^0x/, "", id)
            } else if (key == "name") {
                name = text
            } else if (key == "legacybranch") {
                legacy = text
            } else if (key == "features") {
                features = features " " text " "
            }
        }

        function chip(   is_open, is_marked) {
            if (id == "")
                return
            chips++
            is_open = index(features, " kernelopen ") > 0
            is_marked = index(features, " gsp_proprietary_supported ") > 0
            marks = marks || is_marked
            if (!(id in open_too)) {
                open_too[id] = marked[id] = 1
                named[id] = name (legacy == "" ? "" : " (supported up to branch " legacy " only)")
            }
            open_too[id] = open_too[id] && is_open
            marked[id] = marked[id] && is_marked
        }

        escaped { $0 = held "\"" $0; escaped = 0; parity = 1 - parity }
        { parity = 1 - parity }
        parity == 1 { structure($0); next }
        match($0, /\\+$/) && RLENGTH % 2 { held = $0; escaped = 1; next }
        { string($0) }

        END {
            if (!chips || depth != 0)
                exit 1
            for (at = 1; at <= count; at++) {
                id = ids[at]
                if (!(id in open_too))
                    print id, "unknown", "(not in supported-gpus.json)"
                else if (!open_too[id])
                    print id, "proprietary", named[id]
                else if (!marks || marked[id])   # branches without the mark have no GPU that needs the open modules
                    print id, "both", named[id]
                else
                    print id, "open", named[id]
            }
        }
    ' "$data" 2>/dev/null || {
        printf '%s cannot be read as the list of supported GPUs: use an undamaged image, or %s\n' \
            "$data" 'set KERNEL_MODULE_TYPE to open or proprietary'
        return 1
    }
)

# choose_type BRANCH SWITCHES: the module type that `auto` stands for, given gpu_support's lines on standard input,
# the driver's branch and the number of NVSwitches.
choose_type() (
    only_open='' only_proprietary='' both='' unknown=''
    while read -r id support name || [ -n "$id" ]; do
        gpu="10de:$id $name"
        case $support in
            open) only_open="${only_open:+$only_open, }$gpu" ;;
            proprietary) only_proprietary="${only_proprietary:+$only_proprietary, }$gpu" ;;
            both) both=yes ;;
            *) unknown=yes ;;
        esac
    done
    if [ -n "$only_open" ] && [ -n "$only_proprietary" ]; then
        printf 'no module type drives all GPUs, open is needed by %s and proprietary by %s: put them in nodes apart\n' \
            "$only_open" "$only_proprietary"
        return 1
    elif [ -n "$only_proprietary" ]; then
        printf 'proprietary\n'
    elif [ -n "$only_open" ]; then
        printf 'open\n'
    elif [ -n "$unknown" ]; then
        # A GPU newer than the data: from 560 on the vendor's own default for new GPUs is open.
        if [ "$1" -ge 560 ]; then printf 'open\n'; else printf 'proprietary\n'; fi
    elif [ -n "$both" ] || [ "$2" -gt 0 ]; then
        printf 'open\n'
    else
        printf 'no NVIDIA GPU or NVSwitch on the PCI bus: keep the driver off this node, or set KERNEL_MODULE_TYPE\n'
        return 1
    fi
)

# choose_modules SET TYPE: the folder with the modules of a type
choose_modules() (
    other=open
    [ "$2" = proprietary ] || other=proprietary
    if [ -d "$1/$2" ]; then
        printf '%s\n' "$1/$2"
        return
    fi
    if [ -r "$1/$2.absent" ]; then
        printf 'this image has no %s modules for this kernel, by rule: %s: ' "$2" "$(cat "$1/$2.absent")"
    else
        printf 'this image has no %s modules for this kernel: ' "$2"
    fi
    if [ -d "$1/$other" ]; then
        printf 'use another driver branch, or set driver.kernelModuleType to %s if the GPUs allow it\n' "$other"
    else
        printf 'use another image, this one is damaged\n'
    fi
    return 1
)

# parameters_of FILE: the module parameters of a file, one a line; nothing if there is no such file
parameters_of() (
    [ -e "$1" ] || return 0
    awk '
        { gsub(/^[ \t\r]+|[ \t\r]+$/, "") }
        /^#/ || /^$/ { next }
        !/^[A-Za-z0-9_.-]+=/ && !/^[A-Za-z0-9_.-]+$/ { bad = bad " " FNR; next }
        { kept = kept $0 "\n" }
        END {
            if (bad != "") {
                printf "%s has no <parameter>=<value> in line%s: write one module parameter a line\n", FILENAME, bad
                exit 1
            }
            printf "%s", kept
        }
    ' "$1" 2>/dev/null || {
        [ -f "$1" ] || printf '%s is not a file: mount a file with one module parameter a line\n' "$1"
        return 1
    }
)

# default_parameters MODULE SUPPORT PARAMETERS: our own defaults, one a line, given gpu_support's lines and what the
# operator sets. What the operator sets stands, whatever its value.
default_parameters() (
    [ "$1" = nvidia-uvm ] || return 0
    # Heterogeneous memory management is off on a B200. Names of the data are such as "NVIDIA B200".
    case " $(printf '%s' "$2" | tr '\n' ' ') " in *' B200 '*) ;; *) return 0 ;; esac
    case $3 in
        *uvm_disable_hmm*) ;;
        *) printf 'uvm_disable_hmm=1\n' ;;
    esac
)

# choose_fabric GPUS SWITCHES BRIDGES FABRIC-MANAGER NVLSM: which services the NVSwitches of a node need, given its GPUs,
# the number of its NVSwitches, the devices that manage those of NVLink 5, and each program or nothing if the image
# lacks it
choose_fabric() (
    missing=''
    if [ -n "$3" ]; then
        needed='nvlsm fabricmanager'
        [ -n "$5" ] || missing='nvlsm'
    elif [ "$2" -gt 0 ]; then
        needed=fabricmanager
    else
        return 0
    fi
    [ -n "$4" ] || missing="nv-fabricmanager${missing:+ and $missing}"
    if [ -z "$missing" ]; then
        printf '%s\n' "$needed"
    elif [ -n "$1" ]; then
        printf 'the GPUs are joined by NVSwitches and will run nothing without %s, which this image lacks: %s\n' \
            "$missing" 'use an image that was built with it (NVIDIA_REDIST_URL)'
        return 1
    fi
)

# port_of FOLDER: the GUID of the first port by which a subnet manager may work, of an InfiniBand device in sysfs
port_of() (
    for port in "$1"/ports/*; do
        [ -r "$port/cap_mask" ] && [ -r "$port/gids/0" ] || continue
        read -r mask <"$port/cap_mask"
        [ $((mask & 0x400)) -eq 0 ] || continue # the bit says that it may not
        # The later half of a port's first address is its GUID.
        tr -d '\n' <"$port/gids/0" | awk -F: 'NF == 8 { print "0x" $5 $6 $7 $8 }'
        return
    done
)

# insmod_advice MODULE SAID: what to do about what insmod said
insmod_advice() {
    case $1:$2 in
        nvidia-peermem:*'nvalid parameters'* | nvidia-peermem:*'nvalid argument'*)
            printf "the kernel's InfiniBand drivers have no peer-memory interface for these modules, %s, %s" \
                'so RDMA uses DMA-BUF' 'which needs no nvidia-peermem: set driver.rdma.enabled to false'
            ;;
        *'No such device'*) printf 'is there a GPU that this driver supports? dmesg has lines of NVRM that tell' ;;
        *'nvalid module format'* | *'Exec format'*) printf 'use an image made for this build of the kernel' ;;
        *'Required key not available'* | *'rejected by service'* | *'ot permitted'*)
            printf 'the node takes only modules signed with a key it trusts: turn Secure Boot off'
            ;;
        *) printf 'dmesg of the node has the reason' ;;
    esac
}
