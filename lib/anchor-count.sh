#!/bin/sh
# Counts how often in a row this node has failed to boot, over reboots: in a variable of its EFI firmware, the one place
# that a diskless node has. It is written once for each failure up to ANCHOR_COUNT_MOST, and removed by a success, so
# the firmware's flash sees few writes. Where there is no EFI, or it refuses, nothing is counted.
#
# A variable is a file of efivarfs: four bytes of attributes, here 7 (kept without power, for boot and run time), then
# the value, here one byte (the kernel's Documentation/filesystems/efivarfs.rst).
#
# Needs anchor-report.sh.

ANCHOR_COUNT_FILE=sys/firmware/efi/efivars/AnchorFailedBoots-6f1d5a0c-93f6-4c1b-9c55-0d4a1e4c7b36
ANCHOR_COUNT_MOST=15

# usage: anchor_count_up
# Adds one failure. Sets anchor_count to how many there are now. Status 1, with anchor_count empty, where they cannot be
# counted.
anchor_count_up() {
    local file="${ANCHOR_ROOT:-}/$ANCHOR_COUNT_FILE" before
    anchor_count=
    anchor_count__mounted || return 1
    anchor_count__read
    before=$anchor_count
    [ "$anchor_count" -ge "$ANCHOR_COUNT_MOST" ] || anchor_count=$((anchor_count + 1))
    [ "$anchor_count" -ne "$before" ] || return 0
    anchor_count__unlock
    # One write: the kernel takes each for the whole variable.
    if ! printf '\007\000\000\000%b' "\\00$((anchor_count / 8))$((anchor_count % 8))" 2>/dev/null >"$file"; then
        anchor_count=
        return 1
    fi
    # Some firmware says yes and keeps nothing.
    before=$anchor_count
    anchor_count__read
    [ "$anchor_count" -eq "$before" ] && return 0
    anchor_count=
    return 1
}

# usage: anchor_count_reset
# Forgets the failures, if there are any.
anchor_count_reset() {
    local file="${ANCHOR_ROOT:-}/$ANCHOR_COUNT_FILE"
    anchor_count__mounted && [ -e "$file" ] || return 0
    anchor_count__unlock
    rm -f "$file" || anchor_warn "cannot remove the count of failed boots from the firmware"
}

# usage: anchor_count__mounted
# Whether the firmware's variables can be seen. systemd mounts them; without it this does.
anchor_count__mounted() {
    local directory="${ANCHOR_ROOT:-}/${ANCHOR_COUNT_FILE%/*}" file
    [ -d "$directory" ] || return 1
    for file in "$directory"/*; do
        [ ! -e "$file" ] || return 0
    done
    mount -t efivarfs -o nosuid,nodev,noexec efivarfs "$directory" 2>/dev/null
}

# usage: anchor_count__read
# Sets anchor_count to the variable's number: 0 where there is none, or where it is not what was written here.
anchor_count__read() {
    anchor_count=0
    [ -e "${ANCHOR_ROOT:-}/$ANCHOR_COUNT_FILE" ] || return 0
    # shellcheck disable=SC2046 # numbers, to be split
    set -- $(od -An -v -tu1 -N6 "${ANCHOR_ROOT:-}/$ANCHOR_COUNT_FILE" 2>/dev/null)
    [ "$#:${1:-}" = 5:7 ] && [ "$5" -le "$ANCHOR_COUNT_MOST" ] && anchor_count=$5
    return 0
}

# usage: anchor_count__unlock
# The kernel marks variables that it does not know immutable, so that no rm -r harms the firmware.
anchor_count__unlock() {
    [ ! -e "${ANCHOR_ROOT:-}/$ANCHOR_COUNT_FILE" ] || chattr -i "${ANCHOR_ROOT:-}/$ANCHOR_COUNT_FILE" 2>/dev/null
}
