#!/bin/sh
# One attempt to copy a file from an NFS server. An export is mounted for the attempt alone, and what it holds is a
# server's word over an unprotected network: so this transport is for what has a digest. Where each block is checked when it
# is read, the file can be used where it is; then the export stays mounted.
# shellcheck disable=SC2154 # anchor_nfs_options is this stage's parameter, the others are anchor_fetch's

# usage: anchor_nfs_run URL FILE MAX_BYTES
# Status: 0 whole, 1 permanent failure, 2 try again, 3 start from zero (see anchor-fetch.sh). Keeps in FILE.nfs which
# version of which URL was begun. The work is done in a subshell, whose end unmounts the export whatever ends it.
anchor_nfs_run() {
    local url="$1" file="$2" max="$3" state="$2.nfs"
    anchor_nfs__begin || return 1
    (
        trap anchor_nfs_umount EXIT
        trap 'exit 143' HUP INT TERM
        anchor_nfs__attempt
    )
    anchor_nfs__end $?
}

# usage: anchor_nfs_place URL
# Mounts the file's directory to stay. Sets anchor_fetch_placed to the file's path there, and anchor_fetch_size to its bytes.
# Statuses 0, 1 and 2 as above; anchor_nfs_leave unmounts it.
anchor_nfs_place() {
    local url="$1" state="$ANCHOR_NFS_STAY.state" name anchor_nfs_dir="$ANCHOR_NFS_STAY" anchor_nfs_wait=hard
    anchor_nfs__begin || return 1
    anchor_nfs__mount
    anchor_nfs__end $? || {
        set -- $?
        anchor_nfs_umount
        return "$1"
    }
    # shellcheck disable=SC2034 # for anchor_fetch
    anchor_fetch_placed=$anchor_nfs_file anchor_fetch_size=$anchor_nfs_size anchor_fetch_sized=1
}

# usage: anchor_nfs_leave
# Unmounts what anchor_nfs_place has mounted: lazily where it is in use. What waits for the server then fails, each time that
# an unmount is forced; a loop device asks again at once for its next block.
anchor_nfs_leave() {
    local anchor_nfs_dir="$ANCHOR_NFS_STAY" anchor_nfs_force='-icf -icf -icf -icf -icf -icf -icf -icf -icf -icf'
    anchor_nfs_umount || anchor_warn "$anchor_nfs_dir cannot be unmounted"
}

# usage: anchor_nfs__begin
# Makes the directory state, for what a subshell finds out. Reads url.
anchor_nfs__begin() {
    anchor_fetch_plain "$url"
    if ! [ -d "$state" ] && ! mkdir -m 700 "$state"; then
        anchor_fail "cannot write beside ${state%.*}" "is its file system full?"
        return 1
    fi
    rm -f "$state/error" "$state/hint"
}

# usage: anchor_nfs__end STATUS
# Says what state tells of an attempt that ended with STATUS, which it returns.
anchor_nfs__end() {
    anchor_recall "$state/error"
    anchor_fetch_error=${anchor_recall:-the attempt was broken off}
    anchor_recall "$state/hint"
    anchor_fetch_hint=$anchor_recall
    case $1 in
        0 | 2 | 3) return "$1" ;;
        1) [ ! -s "$state/error" ] || anchor_fail "$anchor_fetch_error" "$anchor_fetch_hint" ;;
        *) return 2 ;;
    esac
    return 1
}

# usage: anchor_nfs__mount [EXTRA]
# Mounts the file's directory, with EXTRA options, and finds the file in it. Sets name. Statuses 0, 1 and 2.
anchor_nfs__mount() {
    local limit="$anchor_fetch_connect_timeout"
    anchor_nfs__parse || return 1
    [ "$limit" -le "$anchor_fetch_left" ] || limit=$anchor_fetch_left
    anchor_nfs_mount "$limit" "${1:-}" && anchor_nfs_file "$name" && return 0
    anchor_nfs__tell
    # The file may yet be put there, but most often its path is wrong.
    case $anchor_nfs_final:$anchor_nfs_error in
        1:* | *' is not there') return 1 ;;
    esac
    return 2
}

# usage: anchor_nfs__total FILE
# Sets anchor_fetch_total to the size that FILE will have, or to nothing while that is not known.
anchor_nfs__total() {
    anchor_recall "$1.nfs/size"
    anchor_fetch_total=$anchor_recall
}

# usage: anchor_nfs__attempt
# Mounts the file's directory and appends what is missing. Reads url, file, max and state of anchor_nfs_run, whose
# statuses it has.
anchor_nfs__attempt() {
    local name offset before
    anchor_nfs__mount "$(anchor_nfs__patience)" || return
    anchor_fetch_size "$file"
    offset=$anchor_fetch_size
    before=$anchor_nfs_identity
    anchor_nfs__continue || return 3
    if [ "$anchor_nfs_size" -gt "$max" ]; then
        anchor_fetch_too_large "$anchor_nfs_size"
        return 1
    fi
    printf '%s\n' "$anchor_nfs_size" >"$state/size"
    printf '%s\n%s\n' "$before" "$url" >"$state/version"
    if [ "$offset" -lt "$anchor_nfs_size" ]; then
        anchor_nfs_copy "$file" "$offset" "$((anchor_nfs_size - offset))" "$anchor_fetch_left" \
            "$anchor_fetch_stall" || {
            anchor_nfs__tell
            return $((2 - anchor_nfs_final))
        }
    fi
    anchor_nfs__whole
}

# usage: anchor_nfs__parse
# Takes the URL apart: sets anchor_nfs_server, anchor_nfs_path (the file's directory) and name. RFC 2224 counts the path
# from the server's public file handle, which NFS 4 has not: here it counts from the server's root.
anchor_nfs__parse() {
    local rest="${url#*://}" port=''
    anchor_nfs_type=nfs
    anchor_nfs_server=${rest%%/*}
    [ "$rest" != "$anchor_nfs_server" ] || rest=$rest/
    case /$rest/ in
        *[%?#]* | */./* | */../*)
            printf 'the path in %s has a character or a part that nfs:// URLs may not have\n' "$anchor_fetch_url" >"$state/error"
            printf 'leave out %%, ?, # and ..; rename the file on the server if need be\n' >"$state/hint"
            return 1
            ;;
    esac
    case $rest in
        *@* | */ | /*)
            printf '%s is not the URL of a file on an NFS server\n' "$anchor_fetch_url" >"$state/error"
            printf 'write nfs://SERVER/EXPORT/PATH/TO/FILE, without a user\n' >"$state/hint"
            return 1
            ;;
    esac
    anchor_nfs_path=/${rest#*/}
    name=${anchor_nfs_path##*/}
    anchor_nfs_path=${anchor_nfs_path%/*}
    anchor_nfs_path=${anchor_nfs_path:-/}
    while [ "$anchor_nfs_path" != "${anchor_nfs_path#//}" ]; do
        anchor_nfs_path=${anchor_nfs_path#/}
    done
    case $anchor_nfs_server in
        \[*\]:*) port=${anchor_nfs_server##*\]:} ;;
        \[*\]) ;;
        *:*) port=${anchor_nfs_server##*:} ;;
    esac
    [ -z "$port" ] || anchor_nfs_server=${anchor_nfs_server%:*}
    anchor_nfs_options "${port:+port=$port,}$anchor_nfs_options" || {
        anchor_nfs__tell
        return 1
    }
}

# usage: anchor_nfs__patience
# Prints the mount options that make a read fail when the server has been silent for anchor_fetch_stall seconds: an RPC is
# sent three times, and waits once, twice and three times timeo (tenths of a second).
anchor_nfs__patience() {
    local timeo=$((anchor_fetch_stall * 10 / 6))
    [ "$timeo" -ge 5 ] || timeo=5
    [ "$timeo" -le 600 ] || timeo=600
    printf 'timeo=%s\n' "$timeo"
}

# usage: anchor_nfs__continue
# Whether what is in the file is the beginning of this version: known because this transport began it, or because the
# digest of the whole is known and will tell.
anchor_nfs__continue() {
    local identity='' from=''
    [ "$offset" -gt 0 ] || return 0
    if [ "$offset" -le "$anchor_nfs_size" ]; then
        [ "${anchor_fetch_verified:-0}" != 1 ] || return 0
        [ ! -r "$state/version" ] || {
            IFS= read -r identity
            IFS= read -r from
        } <"$state/version"
        [ "$identity" != "$before" ] || [ "$from" != "$url" ] || return 0
    fi
    printf 'the file on the server is not the one that was begun\n' >"$state/error"
    return 1
}

# usage: anchor_nfs__whole
# Whether all bytes are there, and are of one version.
anchor_nfs__whole() {
    local size="$anchor_nfs_size"
    if ! anchor_nfs_file "$name"; then
        anchor_nfs__tell
        return 2
    elif [ "$anchor_nfs_identity" != "$before" ]; then
        printf 'the file changed on the server while it was read\n' >"$state/error"
        printf 'put a new version beside the old one and rename it when it is whole\n' >"$state/hint"
        return 3
    fi
    anchor_fetch_size "$file"
    [ "$anchor_fetch_size" -ne "$size" ] || return 0
    printf 'got %s of %s bytes\n' "$anchor_fetch_size" "$size" >"$state/error"
    [ "$anchor_fetch_size" -lt "$size" ] && return 2
    return 3
}

# usage: anchor_nfs__tell
# Leaves what the library says for the shell that waits.
anchor_nfs__tell() {
    anchor_keep "$state/error" "$anchor_nfs_error"
    anchor_keep "$state/hint" "$anchor_nfs_hint"
}
