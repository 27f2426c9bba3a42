#!/bin/sh
# Give the node a root to write to: a tmpfs of a fixed size, and overlayfs on top of the read-only image.
#
# Needs anchor-report.sh and anchor-mounts.sh. What it mounts is for the booted system: /run/anchor travels through
# switch_root, and nothing is unmounted after success. overlayfs copies files up when they are written; nothing is copied
# beforehand.
# shellcheck disable=SC2154 # anchor_overlay_write and anchor_overlay_size are parameters

# usage: anchor_overlay_run LOWER NEWROOT
# Mounts the image, already mounted on LOWER, on NEWROOT: writable as a whole, or read-only with writable directories.
# Reads $anchor_overlay_write (comma list of absolute directories, or "/") and $anchor_overlay_size (bytes or N%).
# Safe to repeat. On failure it takes back what it mounted and returns 1.
anchor_overlay_run() {
    local lower="$1" newroot="$2" base="${ANCHOR_ROOT:-}/run/anchor/overlay"
    if anchor_mounted "$newroot"; then
        [ -e "$base/complete" ] && return 0
        anchor_fail "something else is mounted on $newroot" "leave mounting the root to root=anchor"
        return 1
    fi
    # What an interrupted run left.
    anchor_overlay__undo "$base" "$newroot"
    if anchor_overlay__space "$base" &&
        anchor_overlay__root "$base" "$lower" "$newroot" &&
        anchor_overlay__show "$base" "$lower" "$newroot" &&
        : >"$base/complete"; then
        anchor_note writable "$anchor_overlay_write"
        anchor_note size "$anchor_overlay_size"
        return 0
    fi
    anchor_overlay__undo "$base" "$newroot"
    return 1
}

# usage: anchor_overlay__undo BASE NEWROOT
anchor_overlay__undo() {
    if anchor_mounted "$2"; then
        umount -R "$2" || umount -l "$2"
    fi
    if anchor_mounted "$1"; then
        umount "$1" || umount -l "$1"
    fi
}

# usage: anchor_overlay__space BASE
# Mounts the tmpfs that holds everything written. Its root is closed: who may see a file is decided on the overlay.
# An SELinux policy will want rootcontext=<label of the lower root> among these options.
anchor_overlay__space() {
    local error options="mode=0700,nosuid,nodev,size=$anchor_overlay_size"
    error=$({ { [ -d "$1" ] || mkdir -p "$1"; } && mount -t tmpfs -o "$options" anchor-overlay "$1"; } 2>&1) && return 0
    anchor_fail "cannot make the writable layer of $anchor_overlay_size: $error" "see rd.anchor.overlay.size="
    return 1
}

# usage: anchor_overlay__root BASE LOWER NEWROOT
# Mounts the root, and over it an overlay for each writable directory.
anchor_overlay__root() {
    local dir error number=0 done=,
    case ",$anchor_overlay_write," in
        *,/,*)
            anchor_overlay__mount "$1" '' "$2" "$3"
            return
            ;;
    esac
    if ! error=$(mount -o bind,ro "$2" "$3" 2>&1); then
        anchor_fail "cannot mount the image on $3: $error"
        return 1
    fi
    set -- "$1" "$2" "$3" "$anchor_overlay_write,"
    while [ -n "$4" ]; do
        dir=${4%%,*}
        set -- "$1" "$2" "$3" "${4#*,}"
        anchor_overlay__covered "$dir" && continue
        case $done in
            *",$dir,"*) continue ;;
        esac
        done="$done$dir,"
        number=$((number + 1))
        anchor_overlay__check "$2" "$dir" &&
            anchor_overlay__mount "$1" "/$number" "$2$dir" "$3$dir" || return 1
    done
}

# usage: anchor_overlay__covered DIR
# Whether the list also has a directory above DIR, which makes DIR writable anyway.
anchor_overlay__covered() {
    local above="$1"
    while :; do
        above=${above%/*}
        [ -n "$above" ] || return 1
        case ",$anchor_overlay_write," in
            *",$above,"*) return 0 ;;
        esac
    done
}

# usage: anchor_overlay__check LOWER DIR
# Refuses what the image does not have, and symbolic links: an absolute one would lead out of the image.
anchor_overlay__check() {
    local path="$1" rest="${2#/}/"
    while [ -n "$rest" ]; do
        path="$path/${rest%%/*}"
        rest=${rest#*/}
        if [ -L "$path" ]; then
            anchor_fail "cannot make $2 writable: ${path#"$1"} is a symbolic link in the image" \
                "name the directory it leads to in rd.anchor.overlay.write="
            return 1
        elif [ ! -d "$path" ]; then
            anchor_fail "cannot make $2 writable: the image has no directory ${path#"$1"}" \
                "create it in the image, or correct rd.anchor.overlay.write="
            return 1
        fi
    done
}

# usage: anchor_overlay__mount BASE NAME LOWER TARGET
# Mounts an overlay of LOWER on TARGET; what is written goes to BASE/upper NAME. The lower directory is named "." because
# mount(8) and overlayfs would read commas, colons, quotes and backslashes of its real name as their own.
anchor_overlay__mount() {
    local upper="$1/upper$2" work="$1/work$2" owner error
    # The root of an overlay has the mode and owner of the upper directory, not of the lower one.
    # shellcheck disable=SC2174 # upper alone, or 1 in it: who may look above is decided at BASE
    if ! error=$({
        owner=$(stat -c '%a %u:%g' "$3") && mkdir -p -m "${owner% *}" "$upper" "$work" &&
            { [ "${owner#* }" = 0:0 ] || chown "${owner#* }" "$upper"; }
    } 2>&1); then
        anchor_fail "cannot prepare the writable layer: $error" "rd.anchor.overlay.size= may be too small"
        return 1
    fi
    error=$(cd "$3" && mount -t overlay -o "lowerdir=.,upperdir=$upper,workdir=$work" anchor "$4" 2>&1) && return 0
    anchor_fail "cannot mount the overlay on $4: $error" "does this kernel have overlayfs (the overlay module)?"
    return 1
}

# usage: anchor_overlay__show BASE LOWER NEWROOT
# Shows what the node has written, read-only, as /mnt/overlay_writable of the booted root. Not having it is no failure.
anchor_overlay__show() {
    local target="$3/mnt/overlay_writable"
    [ -d "$2/mnt" ] && [ ! -L "$2/mnt" ] || return 0
    if [ ! -d "$target" ] && ! mkdir "$target" 2>/dev/null; then
        # /mnt is read-only: an overlay without an upper layer adds the one directory.
        mkdir -p "$1/mnt/overlay_writable" &&
            mount -t overlay -o "ro,lowerdir=$1/mnt:$2/mnt" anchor "$3/mnt"
    fi
    mount -o bind,ro "$1/upper" "$target" || anchor_warn "cannot show the writable layer as /mnt/overlay_writable"
    return 0
}
