#!/bin/sh
# What is mounted on the node, from the kernel's own table: it is there before /etc/mtab or findmnt are, and has no copy
# below ANCHOR_ROOT.

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
