#!/bin/sh
# Download a squashfs or erofs image into memory and mount it from there; or mount one that is in place already.
#
# Where a root hash is given, an image that a transport can reach in place is read there, through dm-verity, and nothing of it
# is copied; likewise a download of which nothing else is known. A download with a SHA-256 digest has been checked already.
#
# A downloaded image lies once in memory, in a tmpfs of its own. A loop device reads it there directly: on a tmpfs, direct I/O
# would save nothing, because the tmpfs is the page cache.
# shellcheck disable=SC2154 # anchor_squashfs_* are this stage's parameters, anchor_recall is set by anchor_recall

# usage: anchor_squashfs_run
# Reads $anchor_squashfs_url, $anchor_squashfs_mirrors, $anchor_squashfs_sha256 and $anchor_squashfs_verity, or instead of
# them what the manifest says. Leaves /run/anchor/image/image, complete and read-only: the image itself, or a link to where it
# is in place; and /run/anchor/image.from where the device of anchor-verity.sh, which that names, is to be mounted instead.
# Safe to repeat. On failure it unmounts the tmpfs, which frees the memory.
anchor_squashfs_run() {
    anchor_untraced anchor_squashfs__run
}

# usage: anchor_squashfs__run
# The same, traced: a URL may hold a password.
anchor_squashfs__run() {
    local dir="${ANCHOR_ROOT:-}/run/anchor/image" urls sha256="$anchor_squashfs_sha256" verity="${anchor_squashfs_verity:-}"
    local of anchor_fetch_signed="${anchor_fetch_signed:-}"
    anchor_fetch_mirrors "$anchor_squashfs_url" "$anchor_squashfs_mirrors"
    urls=$anchor_fetch_urls
    if [ -n "${anchor_manifest_urls:-}" ]; then
        urls=$anchor_manifest_urls
        sha256=$anchor_manifest_sha256
        verity=${anchor_manifest_verity:-}
    elif anchor_params_signed; then
        # The command line is nobody's signature.
        verity=
    elif [ -z "$sha256$verity" ]; then
        anchor_info "rd.anchor.squashfs.sha256= is not given: nothing but the server's certificate vouches for the image"
    fi
    # An earlier try left it, complete; but what is wanted may have changed since.
    of="$sha256 $verity $urls"
    anchor_recall "$dir.of"
    if [ "$anchor_recall" = "$of" ] && anchor_mounted "$dir"; then
        case $anchor_mounted in
            ro | ro,*) return 0 ;;
        esac
    fi
    anchor_squashfs__free
    # Before the download: it may give up the drivers that are not loaded.
    if [ -n "$verity" ] && ! anchor_verity_ready; then
        if [ -z "$sha256" ]; then
            anchor_fail "the image has a root hash alone, and this initramfs has no dm-verity for its kernel" \
                "give the image's SHA-256 digest, too, or build the initramfs for a kernel with CONFIG_DM_VERITY"
            return 1
        fi
        anchor_warn "this initramfs has no dm-verity for its kernel: the image is not used in place"
        verity=
    fi
    anchor_squashfs__place
    case $? in
        0) return 0 ;;
        1)
            anchor_squashfs__free
            return 1
            ;;
    esac
    # It may use all memory for now, because anchor_fetch knows the limit; then it is cut to size.
    anchor_memory_space "$dir" 100% nr_inodes=64 || return 1
    # The root hash will tell.
    [ -z "$verity" ] || [ -n "$sha256" ] || anchor_fetch_signed=1
    if anchor_fetch "$urls" "$dir/image" "$sha256" "${anchor_manifest_size:-}" memory &&
        anchor_squashfs__check "$dir/image" "$anchor_fetch_size" &&
        anchor_memory_seal "$dir" "$anchor_squashfs__size" &&
        { [ -z "$verity" ] || [ -n "$sha256" ] || anchor_squashfs__verify "$dir/image"; }; then
        (umask 077 && anchor_keep "$dir.of" "$of")
        return 0
    fi
    anchor_squashfs__free
    return 1
}

# usage: anchor_squashfs__free
# Unmounts the image and takes away all that is below it. Reads dir. Where a server has fallen silent that may take a minute,
# and leave the device behind, of which DIR.verity then still tells.
anchor_squashfs__free() {
    local tries
    anchor_remove "$dir.of" "$dir.format" "$dir.from"
    anchor_memory_unmount "$dir"
    if [ -e "$dir.verity" ]; then
        # Where its server has fallen silent, only the end of the export lets go who still reads.
        for tries in 1 2; do
            anchor_verity_close && rm -f "$dir.verity" && break
            anchor_fetch_leave
        done
    fi
    anchor_fetch_leave
    anchor_memory_free "$dir"
}

# usage: anchor_squashfs__place
# Finds an image that is used where it is. Reads dir, urls, sha256 and verity. Status 0: DIR/image leads to it; 2: it has to
# be downloaded, from urls; 1: failed.
anchor_squashfs__place() {
    local status
    if [ -n "$verity" ]; then
        anchor_squashfs__places
        return
    fi
    # What lies elsewhere can be changed after its digest was taken. Where only a signature is believed, it is copied, unless
    # a root hash that was signed lets it be checked whenever it is read.
    ! anchor_params_signed || return 2
    case $urls in
        *' '*) return 2 ;;
    esac
    anchor_fetch_place "$urls" "$sha256"
    status=$?
    [ "$status" -eq 0 ] || return "$status"
    anchor_squashfs__check "$anchor_fetch_placed" && anchor_squashfs__link
}

# usage: anchor_squashfs__link
# Lets DIR/image lead to where the image is. Status 1 with a report.
anchor_squashfs__link() {
    mkdir -p "$dir" && ln -sfn "$anchor_fetch_placed" "$dir/image" && return 0
    anchor_fail "cannot write to $dir" "is /run full?"
}

# usage: anchor_squashfs__places
# The same with a root hash: tries all places that can be reached, in random order, and leaves the others in urls. The places
# share the attempts and the time that a download may take; that begins anew where none of them will do.
anchor_squashfs__places() {
    local url left='' others='' count=0 told='' hint='' error
    for url in $urls; do
        if anchor_fetch_placeable "$url"; then
            # Most often, the place beside the manifest is one that the manifest names.
            case " $left " in
                *" $url "*) continue ;;
            esac
            left="$left $url"
            count=$((count + 1))
        else
            others="$others${others:+ }$url"
        fi
    done
    [ "$count" -gt 0 ] || return 2
    while [ -n "$left" ]; do
        # shellcheck disable=SC2086 # URLs, without blanks
        anchor_fetch_pick $left
        anchor_fetch_without "$anchor_fetch_picked" "$left"
        left=$anchor_fetch_rest
        anchor_remove "$dir.error" "$dir.hint"
        anchor_squashfs__try "$anchor_fetch_picked" "$count" && return 0
        anchor_recall "$dir.hint"
        hint=$anchor_recall
        anchor_recall "$dir.error"
        error=${anchor_recall:-the attempt was broken off}
        told="$told${told:+; }$error"
        anchor_remove "$dir.error" "$dir.hint"
        anchor_squashfs__free
        [ -z "$left" ] || anchor_warn "the image cannot be used in place: $error; trying another place"
    done
    if [ -z "$others" ]; then
        [ "$count" -eq 1 ] || told="none of the $count places has the image: $told"
        anchor_fail "$told" "$hint"
        return 1
    fi
    anchor_warn "the image cannot be used in place and is downloaded: $told"
    urls=$others
    return 2
}

# usage: anchor_squashfs__try URL COUNT
# Tries one of COUNT places. What goes wrong is not yet the end: status 1 leaves it in DIR.error and DIR.hint.
anchor_squashfs__try() {
    (
        # shellcheck disable=SC2317 # what comes calls it
        anchor_fail() {
            anchor_keep "$dir.error" "$1"
            anchor_keep "$dir.hint" "${2:-}"
            return 1
        }
        anchor_fetch_attempts=$(((anchor_fetch_attempts + $2 - 1) / $2))
        anchor_fetch_timeout=$(((anchor_fetch_timeout + $2 - 1) / $2))
        if ! anchor_fetch_place "$1" '' "$verity"; then
            [ -e "$dir.error" ] || anchor_fail "$anchor_fetch_url cannot be reached in place"
            exit 1
        fi
        anchor_squashfs__check "$anchor_fetch_placed" "$anchor_fetch_size" && anchor_squashfs__verify "$anchor_fetch_placed" &&
            anchor_squashfs__link || exit 1
        anchor_note in_place yes
        anchor_fetch_amount "$anchor_fetch_size"
        anchor_info "using $anchor_fetch_url in place: $anchor_fetch_amount, each block checked when it is read"
    )
}

# usage: anchor_squashfs__verify FILE
# Puts dm-verity over FILE, of which anchor_squashfs__check has been told what it says, and looks at the file system once more,
# through it: what it says now is true, and so is the number of blocks that the device was made of. Reads dir and verity.
anchor_squashfs__verify() {
    local blocks=$(((anchor_squashfs__used + 4095) / 4096))
    anchor_keep "$dir.verity" "$verity"
    anchor_verity_open "$1" "$anchor_squashfs__size" "$anchor_squashfs__used" "$verity" &&
        anchor_squashfs__check "$ANCHOR_VERITY_DEVICE" "$anchor_squashfs__size" || return 1
    if [ $(((anchor_squashfs__used + 4095) / 4096)) -ne "$blocks" ]; then
        anchor_fail "the image's file system has another size than its server said at first" \
            "someone changes the file; leave published images as they are"
        return 1
    fi
    anchor_note verity "$verity"
    anchor_keep "$dir.from" "$ANCHOR_VERITY_DEVICE"
}

# usage: anchor_squashfs_mount DIR
# Mounts the image read-only on DIR. Safe to repeat. On failure it frees the image's memory.
anchor_squashfs_mount() {
    local dir="${ANCHOR_ROOT:-}/run/anchor/image" hint='does this kernel have loop and'
    anchor_mounted "$1" && return 0
    # What the run has found, which was another process.
    anchor_recall "$dir.format"
    anchor_squashfs__format=$anchor_recall
    [ -n "$anchor_recall" ] || anchor_squashfs__check "$dir/image" || return 1
    anchor_recall "$dir.from"
    if [ -n "$anchor_recall" ]; then
        hint='is the whole image the one of the root hash, and does this kernel have'
        anchor_verity_node || return 1
        anchor_verity_within anchor_squashfs__mount "$ANCHOR_VERITY_DEVICE" "$1"
    else
        anchor_squashfs__mount "$dir/image" "$1"
    fi
    case $? in
        0) return 0 ;;
        124) anchor_verity_silent mounted ;;
        *)
            anchor_recall "$dir.error"
            anchor_fail "cannot mount the image: $anchor_recall" \
                "$hint $anchor_squashfs__format with the image's compression? (see dmesg)"
            ;;
    esac
    anchor_squashfs__free
    return 1
}

# usage: anchor_squashfs__mount FROM DIR
# Leaves in DIR.error of the image why it cannot.
anchor_squashfs__mount() {
    anchor_mount_file "$anchor_squashfs__format" "$1" "$2" && return 0
    anchor_keep "$dir.error" "$anchor_mount_error"
    return 1
}

# usage: anchor_squashfs__check FILE [SIZE]
# Whether FILE is a whole squashfs or erofs; when not, says what it is instead. Sets anchor_squashfs__format to the file
# system's type, anchor_squashfs__used to the bytes that it has, and anchor_squashfs__size to the file's; keeps the type for
# the mount, and notes it. FILE may be on a server: then SIZE is given, and nothing waits for ever.
anchor_squashfs__check() {
    local used head file="${ANCHOR_ROOT:-}/run/anchor/image.head"
    anchor_squashfs__size=${2:-}
    [ -n "$anchor_squashfs__size" ] || anchor_squashfs__size=$(stat -L -c %s "$1")
    # The superblock of a squashfs is in its first 96 bytes. erofs leaves 1024 bytes to boot loaders, then comes its own.
    anchor_verity_within od -A n -v -t u1 -N 1064 "$1" >"$file" 2>/dev/null
    case $? in
        0) ;;
        124)
            anchor_verity_silent read
            return
            ;;
        *)
            anchor_fail "the image cannot be read" \
                "see the file's mode, and whether the export squashes root: the node's root reads it"
            return 1
            ;;
    esac
    head=$(cat "$file")
    rm -f "$file"
    # shellcheck disable=SC2086 # od prints numbers
    set -- $head
    # A squashfs may have anything where the superblock of an erofs would be; where it begins, an erofs has what it likes, but
    # no squashfs.
    if [ "${1:-} ${2:-} ${3:-} ${4:-}" != '104 115 113 115' ] &&
        [ $# -ge 1028 ] && [ "${1025} ${1026} ${1027} ${1028}" = '226 225 245 224' ]; then
        shift 1024
        anchor_squashfs__erofs "$@"
    else
        anchor_squashfs__squashfs "$@" || return 1
    fi
    if [ "$anchor_squashfs__size" -lt "$used" ]; then
        anchor_fail "the image is truncated: it has $anchor_squashfs__size of $used bytes" \
            "the file on the server is incomplete; publish it again"
        return 1
    fi
    anchor_squashfs__used=$used
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
