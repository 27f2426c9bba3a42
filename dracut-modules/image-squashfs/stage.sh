#!/bin/sh
# Download a squashfs image into memory and mount it from there.
#
# The image lies once in memory, in a tmpfs of its own. A loop device reads it there directly: on a tmpfs, direct I/O
# would save nothing, because the tmpfs is the page cache.
# shellcheck disable=SC2154 # anchor_squashfs_* are this stage's parameters, anchor_recall is set by anchor_recall

# usage: anchor_squashfs_run
# Reads $anchor_squashfs_url, $anchor_squashfs_sha256. Leaves /run/anchor/image/image, complete and read-only. Safe to
# repeat. On failure it unmounts the tmpfs, which frees the memory.
anchor_squashfs_run() {
    local dir="${ANCHOR_ROOT:-}/run/anchor/image"
    if anchor_squashfs__mounted "$dir"; then
        # Read-only is the last thing that happens to it, so this one is complete.
        case $anchor_squashfs__options in
            ro | ro,*) return 0 ;;
        esac
    elif ! anchor_squashfs__space "$dir"; then
        return 1
    fi
    [ -n "$anchor_squashfs_sha256" ] ||
        anchor_info "rd.anchor.squashfs.sha256= is not given: nothing but the server's certificate vouches for the image"
    if anchor_fetch "$anchor_squashfs_url" "$dir/image" "$anchor_squashfs_sha256" &&
        anchor_squashfs__check "$dir/image" &&
        anchor_squashfs__seal "$dir"; then
        return 0
    fi
    anchor_squashfs__free "$dir"
    return 1
}

# usage: anchor_squashfs_mount DIR
# Mounts the image read-only on DIR. Safe to repeat. On failure it frees the image's memory.
anchor_squashfs_mount() {
    local dir="${ANCHOR_ROOT:-}/run/anchor/image" error
    anchor_squashfs__mounted "$1" && return 0
    [ -d /sys/module/loop ] || modprobe -q loop 2>/dev/null
    error=$(mount -t squashfs -o loop,ro "$dir/image" "$1" 2>&1) && return 0
    anchor_fail "cannot mount the image: $error" \
        "does this kernel have loop and squashfs with the image's compression? (see dmesg)"
    anchor_squashfs__free "$dir"
    return 1
}

# usage: anchor_squashfs__mounted DIR
# Whether something is mounted on DIR, a path without blanks. Sets anchor_squashfs__options to its options.
anchor_squashfs__mounted() {
    local device dir type rest
    while read -r device dir type anchor_squashfs__options rest; do
        [ "$dir" != "$1" ] || return 0
    done </proc/self/mounts
    return 1
}

# usage: anchor_squashfs__space DIR
# Mounts the image's tmpfs. It may use all memory for now, because anchor_fetch knows the limit; then it is cut to size.
# With several NUMA nodes its pages go to all of them in turn: one node's memory neither fills up nor serves all reads.
anchor_squashfs__space() {
    local options=mode=0700,noexec,nosuid,nodev,nr_inodes=64,size=100% error
    anchor_recall "${ANCHOR_ROOT:-}/sys/devices/system/node/has_memory"
    case $anchor_recall in
        *[,-]*) options=$options,mpol=interleave ;;
    esac
    error=$({ mkdir -p "$1" && mount -t tmpfs -o "$options" anchor-image "$1"; } 2>&1) && return 0
    anchor_fail "cannot make a tmpfs for the image: $error"
    return 1
}

# usage: anchor_squashfs__check FILE
# Whether FILE is a whole squashfs; when not, says what it is instead. Notes its compression.
anchor_squashfs__check() {
    local file="$1" size used compression
    size=$(stat -c %s "$file")
    # The superblock begins with the magic "hsqs"; two bytes at 20 are the compression, eight at 40 the bytes used.
    # shellcheck disable=SC2046 # od prints numbers
    set -- $(od -A n -v -t u1 -N 48 "$file")
    if [ "$1 $2 $3 $4" != '104 115 113 115' ]; then
        anchor_fail "what the server sent is not a squashfs: it is $(anchor_squashfs__looks_like "$@")" \
            "check rd.anchor.squashfs.url="
        return 1
    fi
    compression=${21:-}
    used=96 # a superblock alone, for a file that is too short to say
    [ $# -lt 48 ] || used=$((${41} + (${42} << 8) + (${43} << 16) + (${44} << 24) + (${45} << 32) + (${46} << 40)))
    if [ "$size" -lt "$used" ]; then
        anchor_fail "the image is truncated: it has $size of $used bytes" \
            "the file on the server is incomplete; publish it again"
        return 1
    fi
    case $compression in
        1) compression=gzip ;;
        2) compression=lzma ;;
        3) compression=lzo ;;
        4) compression=xz ;;
        5) compression=lz4 ;;
        6) compression=zstd ;;
    esac
    anchor_note compression "$compression"
}

# usage: anchor_squashfs__looks_like [BYTE...]
# Prints what a file with these first bytes, as decimal numbers, seems to be.
anchor_squashfs__looks_like() {
    case "$* " in
        ' ') printf 'empty' ;;
        '60 '*) printf 'an HTML or XML page, perhaps an error message of the server' ;;
        '123 '*) printf 'JSON, perhaps an error message of the server' ;;
        '31 139 '* | '40 181 47 253 '* | '253 55 122 88 90 '*)
            printf 'a compressed file, which has to be unpacked on the server'
            ;;
        '127 69 76 70 '*) printf 'a program' ;;
        *) printf 'something else' ;;
    esac
}

# usage: anchor_squashfs__seal DIR
# Cuts the tmpfs to what the image needs and makes it read-only.
anchor_squashfs__seal() {
    local error size
    size=$(stat -c %s "$1/image")
    error=$(mount -o "remount,ro,noexec,nosuid,nodev,size=$size" "$1" 2>&1) && return 0
    anchor_fail "cannot make the image's tmpfs read-only: $error"
    return 1
}

# usage: anchor_squashfs__free DIR
# Unmounts the image's tmpfs and so frees its memory.
anchor_squashfs__free() {
    umount "$1" || umount -l "$1"
}
