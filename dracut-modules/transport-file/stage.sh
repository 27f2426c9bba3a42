#!/bin/sh
# An image that is already in place. Where the image stage can mount it there, nothing is copied; else it is copied into
# memory like any other. Only regular files are taken, and no link is followed: a path says where the file is.
# shellcheck disable=SC2154 # anchor_fetch_left and others are anchor_fetch's

# usage: anchor_file_place URL
# Sets anchor_fetch_placed to the file's path. Status 0, or 1 after anchor_fail.
anchor_file_place() {
    anchor_file__find "$1" || return 1
    # shellcheck disable=SC2034 # for anchor_fetch
    anchor_fetch_placed=$anchor_file__path
}

# usage: anchor_file_run URL FILE MAX_BYTES
# Status: 0 whole, 1 permanent failure, 2 try again, 3 start from zero (see anchor-fetch.sh). Keeps in FILE.file which
# version of which URL was begun.
anchor_file_run() {
    local file="$2" max="$3" state="$2.file" offset before error identity='' from=''
    anchor_file__find "$1" || return 1
    anchor_fetch_size "$file"
    offset=$anchor_fetch_size
    before=$anchor_file__identity
    [ ! -r "$state" ] || {
        IFS= read -r identity
        IFS= read -r from
    } <"$state"
    if [ "$offset" -gt 0 ] &&
        { [ "$offset" -gt "$anchor_file__size" ] ||
            { [ "${anchor_fetch_verified:-0}" != 1 ] && [ "$identity$from" != "$before$1" ]; }; }; then
        anchor_fetch_error="the file is not the one that was begun"
        return 3
    fi
    if [ "$anchor_file__size" -gt "$max" ]; then
        anchor_file__too_large
        return 1
    fi
    printf '%s\n%s\n' "$before" "$1" >"$state"
    error=$(LC_ALL=C timeout -k 2 "$anchor_fetch_left" dd if="$anchor_file__path" of="$file" bs=1M conv=notrunc status=none \
        skip="$offset" count="$((anchor_file__size - offset))" iflag=nofollow,nonblock,fullblock,skip_bytes,count_bytes \
        oflag=append 2>&1 </dev/null) || {
        anchor_fail "cannot copy $anchor_fetch_url: ${error##*: }" "see its file system, and how much memory is free"
        return 1
    }
    anchor_file__find "$1" || return 1
    anchor_fetch_size "$file"
    [ "$anchor_file__identity" != "$before" ] || [ "$anchor_fetch_size" != "$anchor_file__size" ] || return 0
    anchor_fetch_error="the file changed while it was copied"
    return 3
}

# usage: anchor_file__total FILE
# Sets anchor_fetch_total to the size that FILE will have, or to nothing while that is not known.
anchor_file__total() {
    anchor_recall "$1.file"
    anchor_fetch_total=${anchor_recall%% *}
}

# usage: anchor_file__find URL
# Sets anchor_file__path, anchor_file__size and anchor_file__identity (what changes with each version) of the regular file
# that URL names. Status 1 after anchor_fail.
anchor_file__find() {
    local path="${1#*://}" root="${ANCHOR_ROOT:-}" hint="write file:///PATH with the file's own path, without links"
    anchor_fetch_plain "$1"
    case $path in
        localhost/*) path=${path#localhost} ;;
    esac
    case $path in
        *[%?#]* | [!/]* | *//* | */ | */./* | */. | */../* | */..)
            anchor_fail "$anchor_fetch_url is not the URL of a file of this node" "$hint"
            return 1
            ;;
        /dev/* | /proc/* | /sys/* | /run/anchor/credentials/*)
            anchor_fail "refused to take an image from $anchor_fetch_url: no image is there" "$hint"
            return 1
            ;;
    esac
    if [ ! -e "$root$path" ]; then
        anchor_fail "$anchor_fetch_url is not there" \
            "the image has to be in the initramfs, or on a file system that is mounted before; check the path"
        return 1
    fi
    anchor_file__path=$(readlink -e "$root$path")
    if [ "$anchor_file__path" != "${root:+$(readlink -e "$root")}$path" ]; then
        anchor_fail "there is a link in the path of $anchor_fetch_url" "$hint"
        return 1
    fi
    anchor_file__identity=$(stat -c '%s %d:%i;%y;%z' "$anchor_file__path") || anchor_file__identity=0
    anchor_file__size=${anchor_file__identity%% *}
    [ -f "$anchor_file__path" ] && [ "$anchor_file__size" -gt 0 ] && return 0
    anchor_fail "$anchor_fetch_url is not a file with something in it" "give the path of the image itself"
}

# usage: anchor_file__too_large
anchor_file__too_large() {
    local needs
    anchor_fetch_amount "$anchor_file__size"
    needs=$anchor_fetch_amount
    anchor_fetch_amount "$max"
    anchor_fail "$anchor_fetch_url is too large: it needs $needs, and $anchor_fetch_amount fit ($anchor_fetch_room)" \
        "$anchor_fetch_room_hint"
}
