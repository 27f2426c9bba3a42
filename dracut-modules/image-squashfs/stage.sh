#!/bin/sh
# Download a squashfs or erofs image into memory and mount it from there; or mount one that is in place already.
#
# A downloaded image lies once in memory, in a tmpfs of its own. A loop device reads it there directly: on a tmpfs, direct I/O
# would save nothing, because the tmpfs is the page cache.
# shellcheck disable=SC2154 # anchor_squashfs_* are this stage's parameters, anchor_recall is set by anchor_recall

# usage: anchor_squashfs_run
# Reads $anchor_squashfs_url, $anchor_squashfs_mirrors and $anchor_squashfs_sha256, or instead of them what the manifest
# says. Leaves /run/anchor/image/image, complete and read-only: the image itself, or a link to where it is in place.
# Safe to repeat. On failure it unmounts the tmpfs, which frees the memory.
anchor_squashfs_run() {
    anchor_untraced anchor_squashfs__run
}

# usage: anchor_squashfs__run
# The same, traced: a URL may hold a password.
anchor_squashfs__run() {
    local dir="${ANCHOR_ROOT:-}/run/anchor/image" urls sha256="$anchor_squashfs_sha256" status
    anchor_fetch_mirrors "$anchor_squashfs_url" "$anchor_squashfs_mirrors"
    urls=$anchor_fetch_urls
    if [ -n "${anchor_manifest_urls:-}" ]; then
        urls=$anchor_manifest_urls
        sha256=$anchor_manifest_sha256
    elif [ -z "$sha256" ]; then
        anchor_info "rd.anchor.squashfs.sha256= is not given: nothing but the server's certificate vouches for the image"
    fi
    # An earlier try left it, complete; but what is wanted may have changed since.
    anchor_recall "$dir.of"
    if [ "$anchor_recall" = "$sha256 $urls" ] && anchor_mounted "$dir"; then
        case $anchor_mounted in
            ro | ro,*) return 0 ;;
        esac
    fi
    anchor_remove "$dir.of" "$dir.format"
    anchor_memory_free "$dir"
    anchor_squashfs__place "$dir" "$urls" "$sha256"
    status=$?
    [ "$status" -eq 2 ] || return "$status"
    # It may use all memory for now, because anchor_fetch knows the limit; then it is cut to size.
    anchor_memory_space "$dir" 100% nr_inodes=64 || return 1
    if anchor_fetch "$urls" "$dir/image" "$sha256" "${anchor_manifest_size:-}" memory &&
        anchor_squashfs__check "$dir/image" "$anchor_fetch_size" &&
        anchor_memory_seal "$dir" "$anchor_squashfs__size"; then
        (umask 077 && anchor_keep "$dir.of" "$sha256 $urls")
        return 0
    fi
    anchor_memory_free "$dir"
    return 1
}

# usage: anchor_squashfs__place DIR URLS SHA256
# Status 0: DIR/image leads to an image that is used where it is; 2: it has to be downloaded; 1: failed.
anchor_squashfs__place() {
    local status
    # What lies elsewhere can be changed after its digest was taken. Where only a signature is believed, it is copied.
    ! anchor_params_signed || return 2
    case $2 in
        *' '*) return 2 ;;
    esac
    anchor_fetch_place "$2" "$3"
    status=$?
    [ "$status" -eq 0 ] || return "$status"
    anchor_squashfs__check "$anchor_fetch_placed" || return 1
    mkdir -p "$1" && ln -sfn "$anchor_fetch_placed" "$1/image" && return 0
    anchor_fail "cannot write to $1" "is /run full?"
}

# usage: anchor_squashfs_mount DIR
# Mounts the image read-only on DIR. Safe to repeat. On failure it frees the image's memory.
anchor_squashfs_mount() {
    local dir="${ANCHOR_ROOT:-}/run/anchor/image"
    anchor_mounted "$1" && return 0
    # What the run has found, which was another process.
    anchor_recall "$dir.format"
    anchor_squashfs__format=$anchor_recall
    [ -n "$anchor_recall" ] || anchor_squashfs__check "$dir/image" || return 1
    anchor_mount_file "$anchor_squashfs__format" "$dir/image" "$1" && return 0
    anchor_fail "cannot mount the image: $anchor_mount_error" \
        "does this kernel have loop and $anchor_squashfs__format with the image's compression? (see dmesg)"
    anchor_memory_free "$dir"
    return 1
}

# usage: anchor_squashfs__check FILE [SIZE]
# Whether FILE is a whole squashfs or erofs; when not, says what it is instead. Sets anchor_squashfs__format to the file
# system's type and anchor_squashfs__size to the file's bytes; keeps the type for the mount, and notes it.
anchor_squashfs__check() {
    local used
    anchor_squashfs__size=${2:-}
    [ -n "$anchor_squashfs__size" ] || anchor_squashfs__size=$(stat -L -c %s "$1")
    # The superblock of a squashfs is in its first 96 bytes. erofs leaves 1024 bytes to boot loaders, then comes its own.
    # shellcheck disable=SC2046 # od prints numbers
    set -- $(od -A n -v -t u1 -N 1064 "$1" 2>/dev/null)
    if [ $# -lt 1028 ] || [ "${1025} ${1026} ${1027} ${1028}" != '226 225 245 224' ]; then
        anchor_squashfs__squashfs "$@" || return 1
    else
        shift 1024
        anchor_squashfs__erofs "$@"
    fi
    if [ "$anchor_squashfs__size" -lt "$used" ]; then
        anchor_fail "the image is truncated: it has $anchor_squashfs__size of $used bytes" \
            "the file on the server is incomplete; publish it again"
        return 1
    fi
    anchor_note format "$anchor_squashfs__format"
    anchor_keep "${ANCHOR_ROOT:-}/run/anchor/image.format" "$anchor_squashfs__format"
}

# usage: anchor_squashfs__erofs BYTE...
# The superblock of an erofs: sets anchor_squashfs__format and used. After the magic E2 E1 F5 E0, byte 12 is the block
# size as a power of two, four bytes at 36 the number of blocks (fs/erofs/erofs_fs.h of the kernel).
anchor_squashfs__erofs() {
    anchor_squashfs__format=erofs
    used=1152 # a superblock alone, for a file that is too short to say
    [ $# -lt 40 ] || [ "${13}" -gt 16 ] ||
        used=$(((${37} + (${38} << 8) + (${39} << 16) + (${40} << 24)) << ${13}))
}

# usage: anchor_squashfs__squashfs BYTE...
# The superblock of a squashfs: sets anchor_squashfs__format and used. Notes its compression. It begins with the magic
# "hsqs"; two bytes at 20 are the compression, eight at 40 the bytes used.
anchor_squashfs__squashfs() {
    local compression
    if [ "${1:-} ${2:-} ${3:-} ${4:-}" != '104 115 113 115' ]; then
        anchor_fail "the image is neither a squashfs nor an erofs: it is $(anchor_squashfs__looks_like "$@")" \
            "check the URL of the image (rd.anchor.squashfs.url= or the manifest)"
        return 1
    fi
    anchor_squashfs__format=squashfs
    compression=${21:-}
    used=96 # a superblock alone, for a file that is too short to say
    [ $# -lt 48 ] || used=$((${41} + (${42} << 8) + (${43} << 16) + (${44} << 24) + (${45} << 32) + (${46} << 40)))
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
