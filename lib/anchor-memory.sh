#!/bin/sh
# The memory that an image takes: a tmpfs of its own at /run/anchor/image, which image stages make, seal and free.
#
# Needs anchor-report.sh and anchor-mounts.sh.
# shellcheck disable=SC2154 # anchor_fetch_reserve and those of others are parameters, anchor_recall is set by anchor_recall

# Bytes that programs need which make an image on the node, beside what the booted system needs.
ANCHOR_MEMORY_MAKING=25165824

# usage: anchor_memory_available
# Sets anchor_memory_available: the bytes of memory that an image may use now that is made on the node; never negative.
anchor_memory_available() {
    local key value rest making=$ANCHOR_MEMORY_MAKING
    [ "$making" -le "$anchor_fetch_reserve" ] || making=$anchor_fetch_reserve
    anchor_memory_available=0
    while read -r key value rest; do
        [ "$key" != MemAvailable: ] || anchor_memory_available=$((value * 1024 - anchor_fetch_reserve - making))
    done <"${ANCHOR_ROOT:-}/proc/meminfo"
    [ "$anchor_memory_available" -ge 0 ] || anchor_memory_available=0
}

# usage: anchor_memory_spare
# Sets anchor_memory_spare: about how many bytes anchor_memory_shed would free, 0 where nothing; and
# anchor_memory_spare_dirs, the directories that would go, as words. What is mounted is not the initramfs' own.
anchor_memory_spare() {
    local root="${ANCHOR_ROOT:-}" dir
    anchor_memory_spare=0
    anchor_memory_spare_dirs=
    # What an initramfs has and no installed system.
    [ -e "$root/etc/initrd-release" ] || return 0
    set --
    for dir in lib/modules lib/firmware usr/lib/modules usr/lib/firmware; do
        # /lib may lead to /usr/lib, which comes next.
        if [ -L "$root/${dir%%/*}" ] || [ ! -d "$root/$dir" ] || ! anchor_memory__bare "$root/$dir"; then
            continue
        fi
        anchor_memory_spare_dirs="$anchor_memory_spare_dirs $dir"
        # As deep as drivers are: VERSION/kernel/drivers/net/ethernet/mellanox/mlx5/core/FILE, one of the largest.
        dir=$root/$dir
        set -- "$@" "$dir"/* "$dir"/*/* "$dir"/*/*/* "$dir"/*/*/*/* "$dir"/*/*/*/*/* "$dir"/*/*/*/*/*/* \
            "$dir"/*/*/*/*/*/*/* "$dir"/*/*/*/*/*/*/*/* "$dir"/*/*/*/*/*/*/*/*/*
    done
    [ $# -eq 0 ] || anchor_memory_spare=$(stat -c '%s %F' "$@" 2>/dev/null | {
        sum=0
        while read -r size kind; do
            [ "$kind" != 'regular file' ] || sum=$((sum + size))
        done
        printf '%s' "$sum"
    })
}

# usage: anchor_memory__bare DIR
# Whether nothing is mounted on DIR, nor in it, nor on a directory that it is in.
anchor_memory__bare() {
    local device at rest
    while read -r device at rest; do
        case $at/ in
            "$1"/*) return 1 ;;
        esac
        case $at:$1 in
            "${ANCHOR_ROOT:-}"/?*:"$at"/*) return 1 ;;
        esac
    done </proc/self/mounts
}

# usage: anchor_memory_shed
# Frees what the initramfs itself has in memory and no later step reads: drivers, once those are loaded that the steps need,
# and firmware. A device that appears now has to wait for the booted system. For anchor_fetch, when a file would not fit;
# needs anchor-fetch.sh, its local urls, and what anchor_memory_spare sets. Status 1 where less than all could be freed.
anchor_memory_shed() {
    local dir stage url drivers='' before status=0 needed=' ' anchor_transport anchor_transport_needs_digest
    # The image is the last file that is fetched; what brought a manifest has its drivers. Another try of this boot finds
    # no others.
    for url in $urls; do
        ! anchor_stage_for_scheme "${url%%://*}" || needed="${needed}transport_$anchor_transport "
    done
    for stage in ${anchor_stages:-}; do
        case $stage:$needed in
            core_*:* | "image_${anchor_image:-}:"* | *:*" $stage "*)
                "anchor_${stage}_drivers"
                drivers="$drivers $anchor_drivers"
                ;;
        esac
    done
    # shellcheck disable=SC2086 # names of drivers, one word each
    [ -z "$drivers" ] || modprobe -q -a $drivers </dev/null >/dev/null 2>&1
    anchor_fetch_fits
    before=$anchor_fetch_available
    for dir in $anchor_memory_spare_dirs; do
        rm -rf "${ANCHOR_ROOT:-}/$dir" || status=1
    done
    anchor_fetch_fits
    anchor_fetch_amount $((anchor_fetch_available - before))
    anchor_info "memory is tight: the initramfs gave up drivers that are not in use, and firmware ($anchor_fetch_amount)"
    return "$status"
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

# usage: anchor_memory_unmount DIR
# Unmounts the image, where that is mounted already.
anchor_memory_unmount() {
    ! anchor_mounted "${1%/*}/lower" || umount "${1%/*}/lower" || umount -l "${1%/*}/lower"
}

# usage: anchor_memory_free DIR
# Unmounts the tmpfs with all that is mounted in it, whoever did that and however often, and so frees the memory; before
# it the image.
anchor_memory_free() {
    anchor_memory_unmount "$1"
    while anchor_mounted "$1"; do
        umount -R "$1" 2>/dev/null || umount -l "$1" || return 0
    done
}
