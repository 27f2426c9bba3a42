#!/bin/sh
# The memory that an image takes: a tmpfs of its own at /run/anchor/image, which image stages make, seal and free.
#
# Needs anchor-report.sh and anchor-mounts.sh.
# shellcheck disable=SC2154 # anchor_fetch_reserve is the core's parameter, anchor_recall is set by anchor_recall

# usage: anchor_memory_available
# Sets anchor_memory_available: the bytes of memory that an image may use now, which is all but the reserve; never negative.
anchor_memory_available() {
    local key value rest
    anchor_memory_available=0
    while read -r key value rest; do
        [ "$key" != MemAvailable: ] || anchor_memory_available=$((value * 1024 - anchor_fetch_reserve))
    done <"${ANCHOR_ROOT:-}/proc/meminfo"
    [ "$anchor_memory_available" -ge 0 ] || anchor_memory_available=0
}

# usage: anchor_memory_space DIR SIZE [OPTION,...]
# Mounts the tmpfs on DIR; SIZE and the further OPTIONs are tmpfs(5)'s. With several NUMA nodes its pages go to all of
# them in turn: one node's memory neither fills up nor serves all reads. anchor_memory_free unmounts it.
anchor_memory_space() {
    local options="mode=0700,noexec,nosuid,nodev,size=$2${3:+,$3}" error
    anchor_recall "${ANCHOR_ROOT:-}/sys/devices/system/node/has_memory"
    case $anchor_recall in
        *[,-]*) options=$options,mpol=interleave ;;
    esac
    error=$({ { [ -d "$1" ] || mkdir -p "$1"; } && mount -t tmpfs -o "$options" anchor-image "$1"; } 2>&1) && return 0
    anchor_fail "cannot make a tmpfs for the image: $error"
    return 1
}

# usage: anchor_memory_seal DIR [SIZE]
# Makes the tmpfs read-only, and cuts it to SIZE bytes.
anchor_memory_seal() {
    local error
    error=$(mount -o "remount,ro,noexec,nosuid,nodev${2:+,size=$2}" "$1" 2>&1) && return 0
    anchor_fail "cannot make the image's tmpfs read-only: $error"
    return 1
}

# usage: anchor_memory_free DIR
# Unmounts the tmpfs with all that is mounted in it, whoever did that and however often, and so frees the memory; before
# it the image, where that is mounted already.
anchor_memory_free() {
    ! anchor_mounted "${1%/*}/lower" || umount "${1%/*}/lower" || umount -l "${1%/*}/lower"
    while anchor_mounted "$1"; do
        umount -R "$1" 2>/dev/null || umount -l "$1" || return 0
    done
}
