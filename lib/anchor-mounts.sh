#!/bin/sh
# What is mounted on the node, from the kernel's own table: it is there before /etc/mtab or findmnt are, and has no copy
# below ANCHOR_ROOT; and file systems that lie in a file.

# usage: anchor_mounted DIR
# Whether something is mounted on DIR, a path without blanks or backslashes (the kernel writes those as octal numbers).
# Sets anchor_mounted to the options of that mount.
anchor_mounted() {
    local device dir type options rest
    while read -r device dir type options rest; do
        # shellcheck disable=SC2034 # for the caller
        [ "$dir" != "$1" ] || {
            anchor_mounted=$options
            return 0
        }
    done </proc/self/mounts
    return 1
}

# usage: anchor_mount_file TYPE FILE DIR [OPTION,...]
# Mounts a file, or a block device, that is a file system of TYPE, read-only and with further OPTIONs of mount, on DIR, which
# it makes. Sets anchor_mount_error on status 1.
anchor_mount_file() {
    local options="loop,ro${4:+,$4}"
    if [ -b "$2" ]; then
        options=${options#loop,}
    else
        [ -d /sys/module/loop ] || modprobe -q loop 2>/dev/null
    fi
    # shellcheck disable=SC2034 # for the caller
    anchor_mount_error=$({ [ -d "$3" ] || mkdir -p "$3"; } 2>&1 && mount -t "$1" -o "$options" "$2" "$3" 2>&1)
}
