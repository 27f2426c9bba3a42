#!/bin/sh
# How large a downloaded file may become: what its directory has free, what fits into memory, and what the file should have.
# Part of anchor-fetch.sh; where anchor-memory.sh is there, the initramfs may make room.

# Bytes of memory without which the initramfs does not get to switch_root: for what carries and checks the file, and for the
# mounts. Where less was left, the kernel killed one of them (kernel 6.1, of whose available memory 6 MiB cannot be had).
ANCHOR_FETCH_WORK=14680064

# usage: anchor_fetch__budget
# Sets anchor_fetch_max: how many bytes file may have in all; anchor_fetch_room and anchor_fetch_room_hint: the numbers
# behind it, and what would change them; and anchor_fetch_memory, the bytes that fit into memory. Status 1 when there is
# no room for the file.
anchor_fetch__budget() {
    local free=''
    anchor_fetch_fits
    if [ -n "$unbounded" ] && [ -n "$anchor_fetch_fits" ]; then
        anchor_fetch_max=$((anchor_fetch_fits + 1))
    else
        free=$(stat -f -c '%a %S' "$work") || free='0 0'
        anchor_fetch_max=$((${free% *} * ${free#* }))
        anchor_fetch_amount "$anchor_fetch_max"
        anchor_fetch_room="$anchor_fetch_amount free in ${dest%/*}"
    fi
    if [ -n "$anchor_fetch_fits" ] && [ "$anchor_fetch_fits" -lt "$anchor_fetch_max" ]; then
        anchor_fetch_max=$anchor_fetch_fits
        anchor_fetch_room=$anchor_fetch_fits_why
    fi
    anchor_fetch_memory=$anchor_fetch_max
    anchor_fetch_room_hint="give the node more memory, make the image smaller, or lower rd.anchor.fetch.reserve"
    # What an earlier attempt left is part of the file, and no longer part of what is free.
    anchor_fetch_size "$file"
    anchor_fetch_max=$((anchor_fetch_max + anchor_fetch_size))
    if [ -n "$sink" ]; then
        anchor_fetch_max=${anchor_fetch_limit:-999999999999999}
        anchor_fetch_room=${anchor_fetch_limit_why:-}
        anchor_fetch_room_hint="make the image smaller, or take something larger to write it to"
    elif [ -n "${anchor_fetch_limit:-}" ] && [ "$anchor_fetch_limit" -lt "$anchor_fetch_max" ]; then
        anchor_fetch_max=$anchor_fetch_limit
        anchor_fetch_room="no manifest is larger"
    fi
    if [ "$anchor_fetch_max" -le 0 ]; then
        if anchor_fetch__make_room "${expected:-unknown}"; then
            anchor_fetch__budget
            return
        fi
        anchor_fail "no room for $anchor_fetch_url: $anchor_fetch_room" "$anchor_fetch_room_hint"
        return 1
    fi
    [ -n "$expected" ] || return 0
    if [ "$expected" -gt "$anchor_fetch_max" ]; then
        if anchor_fetch__make_room "$expected"; then
            anchor_fetch__budget
            return
        fi
        anchor_fetch_too_large "$expected"
        return 1
    fi
    anchor_fetch_max=$expected
    anchor_fetch_amount "$expected"
    anchor_fetch_room="the file should have $anchor_fetch_amount"
}

# usage: anchor_fetch_fits
# Sets anchor_fetch_fits: how many bytes of memory a file may take now, 0 or less where none; nothing where the kernel does
# not say what there is. Of what is available now, the rest of the initramfs' work needs some; and once switch_root has
# emptied the initramfs, the reserve has to be free. Sets also anchor_fetch_fits_why, the numbers behind it,
# anchor_fetch_fits_later, what the second condition alone would let in, and anchor_fetch_available.
anchor_fetch_fits() {
    local key value rest back=0 files=0 work=$ANCHOR_FETCH_WORK anchor_fetch_size
    anchor_fetch_available=
    anchor_fetch_fits=
    [ -r "${ANCHOR_ROOT:-}/proc/meminfo" ] || return 0
    while read -r key value rest; do
        case $key in
            MemAvailable:) anchor_fetch_available=$((value * 1024)) ;;
            # A ramfs cannot be evicted, and the initramfs is one. What else cannot is locked, or shared memory that a graphics
            # driver holds (drm_gem_get_pages), which no ramfs is.
            Unevictable:) back=$((back + value * 1024)) ;;
            Mlocked:) back=$((back - value * 1024)) ;;
            Cached:) files=$((files + value * 1024)) ;;
            Shmem:) files=$((files - value * 1024)) ;;
        esac
    done <"${ANCHOR_ROOT:-}/proc/meminfo"
    [ -n "$anchor_fetch_available" ] || return 0
    [ "$back" -le "$files" ] || back=$files
    # These stay (anchor-embedded.sh).
    anchor_fetch_size "${ANCHOR_ROOT:-}/etc/anchor/images.squashfs"
    back=$((back - anchor_fetch_size))
    [ "$back" -ge 0 ] || back=0
    # The kernel's own records of a file in memory are 1/448 of it.
    work=$((work + anchor_fetch_available / 448))
    [ "$work" -le "$anchor_fetch_reserve" ] || work=$anchor_fetch_reserve
    anchor_fetch_fits_later=$((anchor_fetch_available + back - anchor_fetch_reserve))
    anchor_fetch_fits=$((anchor_fetch_available - work))
    anchor_fetch_amount "$anchor_fetch_available"
    anchor_fetch_fits_why="$anchor_fetch_amount of memory available"
    if [ "$anchor_fetch_fits" -lt "$anchor_fetch_fits_later" ]; then
        anchor_fetch_amount "$work"
        anchor_fetch_fits_why="$anchor_fetch_fits_why, of which the initramfs needs $anchor_fetch_amount"
        return 0
    fi
    anchor_fetch_fits=$anchor_fetch_fits_later
    if [ "$back" -gt 0 ]; then
        anchor_fetch_amount "$back"
        anchor_fetch_fits_why="$anchor_fetch_fits_why and $anchor_fetch_amount more after switch_root"
    fi
    anchor_fetch_amount "$anchor_fetch_reserve"
    anchor_fetch_fits_why="$anchor_fetch_fits_why, of which $anchor_fetch_amount stay free"
}

# usage: anchor_fetch__make_room BYTES
# Whether there is more memory now for a file of BYTES, or of unknown size: the initramfs gave some of its own. It does not
# where that cannot be enough.
anchor_fetch__make_room() {
    local needs="$1" most
    [ -n "$unbounded" ] && command -v anchor_memory_shed >/dev/null || return 1
    anchor_fetch_fits
    [ -n "$anchor_fetch_fits" ] && [ "$anchor_fetch_fits" -lt "$anchor_fetch_fits_later" ] || return 1
    [ "$needs" != unknown ] || needs=0
    anchor_memory_spare
    [ "$anchor_memory_spare" -gt 0 ] || return 1
    most=$((anchor_fetch_fits + anchor_memory_spare))
    [ "$most" -le "$anchor_fetch_fits_later" ] || most=$anchor_fetch_fits_later
    anchor_fetch_size "$file"
    [ "$needs" -le $((most + anchor_fetch_size)) ] && anchor_memory_shed
}

# usage: anchor_fetch_too_large BYTES
# Says that the file does not fit and needs BYTES, which may be empty: the server did not say. For transports: reads
# anchor_fetch_url, and what anchor_fetch set before the attempt. Returns 1.
anchor_fetch_too_large() {
    local needs='more' fit
    anchor_fetch_needs=${1:-unknown}
    if [ "$anchor_fetch_max" = "$expected" ]; then
        anchor_fetch_needs=
        anchor_fail "$anchor_fetch_url is another file: it has ${1:-more} bytes, and should have $expected" \
            "publish the image again, or take this mirror out"
        return 1
    fi
    if [ -n "$1" ]; then
        anchor_fetch_amount "$1"
        needs=$anchor_fetch_amount
    fi
    anchor_fetch_amount "$anchor_fetch_max"
    fit=$anchor_fetch_amount
    anchor_fail "$anchor_fetch_url is too large: it needs $needs, and $fit fit ($anchor_fetch_room)" "$anchor_fetch_room_hint"
}
