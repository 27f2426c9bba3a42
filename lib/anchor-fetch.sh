#!/bin/sh
# The one download path: mirrors and attempts until a deadline, resuming what is there; the digest taken while the file
# grows; and never more than fits into memory. What carries the bytes is a transport stage.
#
# A transport's anchor_<transport>_run URL FILE MAX_BYTES makes one attempt: it appends to FILE (never rewrites it: its
# digest is taken as it grows) and may keep state in FILE.<transport>; both lie in a private directory that goes away
# with the download. MAX_BYTES is how large FILE may become in all. It reads anchor_fetch_connect_timeout,
# anchor_fetch_stall, anchor_fetch_left (whole seconds until the deadline), anchor_fetch_room (why MAX_BYTES is what
# it is) and anchor_fetch_verified, and answers:
#   0  FILE is whole
#   1  permanent failure; anchor_fail has said why
#   2  try again: sets anchor_fetch_error (one line) and may set anchor_fetch_hint (what to do about it) and
#      anchor_fetch_retry_after (seconds that the server asked for)
#   3  as 2, but what is in FILE cannot be resumed: start from zero
# anchor_fetch_verified is 1 when the digest of the whole file is known. Then FILE may be continued at its present size,
# whoever wrote it and without a validator of its version: the digest decides. It is empty otherwise. One FILE may be
# asked for at several URLs in turn, so state that belongs to one URL (validator, size) has to be kept by URL.
# A transport may have anchor_<transport>__total FILE, which sets anchor_fetch_total to the size that FILE will have,
# or to nothing while that is not known. It is called in another process while the attempt runs.
# A transport that reaches files where they are may have anchor_<transport>_place URL, which sets anchor_fetch_placed to
# a local path of the whole file and copies nothing. Statuses 0, 1 and 2 as above.

ANCHOR_FETCH_MAX_WAIT=120

# usage: anchor_fetch URL DEST [SHA256]
# Downloads URL to DEST, which appears only when it is whole (and its digest is SHA256, where one is given).
# Works in DEST.fetch, beside it: DEST's directory should be a file system that can hold the file.
# Reads the parameters anchor_fetch_{timeout,connect_timeout,stall,attempts,reserve}. Notes url, attempts, bytes and
# sha256. Status 0 or 1.
anchor_fetch() {
    local url="$1" dest="$2" want="${3:-}" work="$2.fetch" file="$2.fetch/data" digester='' start deadline
    anchor_fetch_plain "$url"
    anchor_fetch__admit || return 1
    anchor_note url "$anchor_fetch_url"
    # Another run may have been cut off here, and an older image would take memory from the new one.
    if ! rm -rf "${work:?}" || ! rm -f "$dest" || ! mkdir -m 700 "$work"; then
        anchor_fail "cannot write beside $dest" "is its file system mounted and writable?"
        return 1
    fi
    anchor_uptime_ms
    start=$anchor_uptime_ms
    deadline=$((start + anchor_fetch_timeout * 1000))
    (
        LC_ALL=C
        export LC_ALL
        trap 'anchor_fetch__unfollow; rm -rf "${work:?}"' EXIT
        trap 'exit 143' HUP INT TERM
        anchor_fetch__follow && anchor_fetch__try && anchor_fetch__accept
    )
}

# usage: anchor_fetch_plain URL
# Sets anchor_fetch_url: URL without what may be secret in it (user, password, query, fragment), fit for a log.
anchor_fetch_plain() {
    local rest="${1#*://}" authority
    rest=${rest%%[?#]*}
    authority=${rest%%/*}
    anchor_fetch_url="${1%%://*}://${authority##*@}${rest#"$authority"}"
}

# usage: anchor_fetch_amount BYTES
# Sets anchor_fetch_amount: BYTES for people ("80.1 MiB").
anchor_fetch_amount() {
    if [ "$1" -lt 1048576 ]; then
        anchor_fetch_amount="$1 bytes"
    else
        anchor_fetch_amount="$(($1 / 1048576)).$(($1 % 1048576 * 10 / 1048576)) MiB"
    fi
}

# usage: anchor_fetch_size FILE
# Sets anchor_fetch_size: its size in bytes, 0 where there is no file.
anchor_fetch_size() {
    anchor_fetch_size=$(stat -c %s "$1" 2>/dev/null) || anchor_fetch_size=0
}

# usage: anchor_fetch__admit
# Decides before any connection whether the URL may be fetched. Reads url, dest and want; sets anchor_transport.
anchor_fetch__admit() {
    local LC_ALL=C
    case $url in
        *[!!-~]* | *[\"\\]*)
            anchor_fail "the URL has a character that no URL has" "write it as % and two hexadecimal digits"
            return 1
            ;;
        [A-Za-z]*://?*) ;;
        *)
            anchor_fail "the URL does not start with a scheme" "write it as https://HOST/PATH"
            return 1
            ;;
    esac
    if ! anchor_stage_for_scheme "${url%%://*}"; then
        anchor_fail "nothing in this initramfs can fetch ${url%%://*}:// URLs" \
            "build it with a transport for them: anchor-build stages lists the transports and their schemes"
        return 1
    fi
    if [ -z "$want" ] && [ "$anchor_transport_needs_digest" = 1 ]; then
        anchor_fail "refused to fetch $anchor_fetch_url without a digest: nothing protects ${url%%://*}://" \
            "add the image's SHA-256 digest (rd.anchor.<image>.sha256=) or use https://"
        return 1
    fi
    case $want in
        *[!0-9a-f]*) ;;
        *) [ -z "$want" ] || [ ${#want} -eq 64 ] && return 0 ;;
    esac
    anchor_fail "the digest for $anchor_fetch_url is not SHA-256" "give 64 hexadecimal digits"
}

# usage: anchor_fetch__try
# Makes attempts until one is whole. Reads url, file, start and deadline.
anchor_fetch__try() {
    local attempt=1 status
    while :; do
        anchor_fetch__budget || return 1
        anchor_uptime_ms
        anchor_fetch_left=$(((deadline - anchor_uptime_ms + 999) / 1000))
        [ "$anchor_fetch_left" -gt 0 ] || anchor_fetch_left=1
        anchor_fetch_error=
        anchor_fetch_hint=
        anchor_fetch_retry_after=
        "anchor_${anchor_transport}_run" "$url" "$file" "$anchor_fetch_max"
        status=$?
        anchor_note_number attempts "$attempt"
        case $status in
            0) return 0 ;;
            2) ;;
            3) anchor_fetch__unfollow && anchor_fetch__follow || return 1 ;;
            *) return 1 ;;
        esac
        if [ "$attempt" -ge "$anchor_fetch_attempts" ] || ! anchor_fetch__pause "$attempt"; then
            anchor_uptime_ms
            anchor_fail "gave up on $anchor_fetch_url after attempt $attempt of $anchor_fetch_attempts and \
$(((anchor_uptime_ms - start + 500) / 1000)) s of $anchor_fetch_timeout s: $anchor_fetch_error" \
                "${anchor_fetch_hint:-see to the server and the network between it and this node}"
            return 1
        fi
        attempt=$((attempt + 1))
    done
}

# usage: anchor_fetch__budget
# Sets anchor_fetch_max: how many bytes file may have in all, and anchor_fetch_room: the numbers behind it.
anchor_fetch__budget() {
    local key value rest free='' available=''
    if [ -r "${ANCHOR_ROOT:-}/proc/meminfo" ]; then
        while read -r key value rest; do
            [ "$key" != MemAvailable: ] || available=$((value * 1024))
        done <"${ANCHOR_ROOT:-}/proc/meminfo"
    fi
    free=$(stat -f -c '%a %S' "$work") || free='0 0'
    anchor_fetch_max=$((${free% *} * ${free#* }))
    anchor_fetch_amount "$anchor_fetch_max"
    anchor_fetch_room="$anchor_fetch_amount free in ${dest%/*}"
    if [ -n "$available" ] && [ $((available - anchor_fetch_reserve)) -lt "$anchor_fetch_max" ]; then
        anchor_fetch_max=$((available - anchor_fetch_reserve))
        anchor_fetch_amount "$available"
        anchor_fetch_room="$anchor_fetch_amount of memory available"
        anchor_fetch_amount "$anchor_fetch_reserve"
        anchor_fetch_room="$anchor_fetch_room, of which $anchor_fetch_amount stay free"
    fi
    # What an earlier attempt left is part of the file, and no longer part of what is free.
    anchor_fetch_size "$file"
    anchor_fetch_max=$((anchor_fetch_max + anchor_fetch_size))
    [ "$anchor_fetch_max" -gt 0 ] ||
        anchor_fail "no room for $anchor_fetch_url: $anchor_fetch_room" \
            "give the node more memory, or lower rd.anchor.fetch.reserve"
}

# usage: anchor_fetch__pause ATTEMPT
# Waits a random part of a window that doubles with each attempt, after as long as the server asked for, but never
# more than half of the time left: another attempt has to fit in. Status 1 if there is no time left.
anchor_fetch__pause() {
    local window=60 asked="${anchor_fetch_retry_after:-0}" wait left random
    [ "$1" -gt 6 ] || window=$((1 << ($1 - 1)))
    [ "$asked" -le "$ANCHOR_FETCH_MAX_WAIT" ] || asked=$ANCHOR_FETCH_MAX_WAIT
    random=$(od -An -N4 -tu4 /dev/urandom) || random=0
    wait=$((asked * 1000 + random % (window * 1000 + 1)))
    anchor_uptime_ms
    left=$((deadline - anchor_uptime_ms))
    [ "$left" -gt 100 ] || return 1
    [ "$wait" -le $((left / 2)) ] || wait=$((left / 2))
    wait=$((wait / 1000)).$((wait % 1000 / 100))
    anchor_warn "fetching ${anchor_fetch_url##*/}: attempt $1 of $anchor_fetch_attempts: $anchor_fetch_error; next in $wait s"
    sleep "$wait"
}

# usage: anchor_fetch__follow
# Begins an empty file and takes its digest in the background. Sets digester.
anchor_fetch__follow() {
    rm -f "$work/end" "$work/feeder" "$file"
    if ! (umask 077 && : >"$file"); then
        anchor_fail "cannot write to $work" "is its file system full?"
        return 1
    fi
    # shellcheck disable=SC2094 # one process appends to the file while this one reads it
    anchor_fetch__feed <"$file" 3>"$work/feeder" | sha256sum >"$work/sha256" &
    digester=$!
}

# usage: anchor_fetch__unfollow
# Ends the digest at the present end of the file; anchor_fetch__follow's processes are gone afterwards.
anchor_fetch__unfollow() {
    local feeder=''
    [ -n "$digester" ] || return 0
    : >"$work/end"
    # An empty feeder file means that it has yet to look for the end file.
    [ ! -s "$work/feeder" ] || read -r feeder <"$work/feeder"
    [ -z "$feeder" ] || kill -TERM "$feeder" 2>/dev/null
    wait "$digester" 2>/dev/null
    digester=
    return 0
}

# usage: anchor_fetch__feed <FILE >PIPE 3>PID-FILE
# Copies the file as it grows: each cat goes on where the one before it stopped. SIGTERM cuts a wait short, so that
# the end is seen at once.
anchor_fetch__feed() {
    local pid rest said=0 had=0 at
    trap : TERM
    read -r pid rest </proc/self/stat
    printf '%s\n' "$pid" >&3
    at=$start
    said=$start
    until [ -e "$work/end" ]; do
        cat || return 1
        # The shell that began the download may have been killed.
        kill -0 "$$" 2>/dev/null || return 1
        anchor_uptime_ms
        if [ $((anchor_uptime_ms - said)) -ge 2000 ]; then
            said=$anchor_uptime_ms
            anchor_fetch__progress "$had" "$at" >&2
            had=$anchor_fetch_size
            at=$said
        fi
        [ -e "$work/end" ] || {
            sleep 0.5 &
            wait "$!" || kill "$!" 2>/dev/null
        }
    done
    cat
}

# usage: anchor_fetch__progress BYTES-BEFORE MS-BEFORE
# Says how far the download is, unless nothing came. Sets anchor_fetch_size.
anchor_fetch__progress() {
    local line
    anchor_fetch_size "$file"
    [ "$anchor_fetch_size" -gt "$1" ] || return 0
    anchor_fetch_total=
    if command -v "anchor_${anchor_transport}__total" >/dev/null; then
        "anchor_${anchor_transport}__total" "$file"
    fi
    anchor_fetch_amount "$anchor_fetch_size"
    line="fetching ${anchor_fetch_url##*/}: $anchor_fetch_amount"
    if [ "${anchor_fetch_total:-0}" -ge "$anchor_fetch_size" ]; then
        anchor_fetch_amount "$anchor_fetch_total"
        line="$line of $anchor_fetch_amount ($((anchor_fetch_size * 100 / anchor_fetch_total)) %)"
    fi
    anchor_fetch_amount $(((anchor_fetch_size - $1) * 1000 / (anchor_uptime_ms - $2)))
    anchor_info "$line, $anchor_fetch_amount/s"
}

# usage: anchor_fetch__accept
# Checks the digest of the whole file and moves it to dest. Reads want and start.
anchor_fetch__accept() {
    local sum='' rest took
    anchor_fetch__unfollow
    read -r sum rest <"$work/sha256"
    if [ ${#sum} -ne 64 ]; then
        anchor_fail "could not take the digest of $anchor_fetch_url" "is sha256sum in the initramfs?"
        return 1
    fi
    anchor_fetch_size "$file"
    anchor_note_number bytes "$anchor_fetch_size"
    anchor_note sha256 "$sum"
    if [ -n "$want" ] && [ "$sum" != "$want" ]; then
        anchor_fail "$anchor_fetch_url is not what it should be: its SHA-256 digest is $sum, expected $want" \
            "someone changed the file or the digest on the command line is of another version; the file was removed"
        return 1
    fi
    if ! mv -f "$file" "$dest"; then
        anchor_fail "cannot move the download to $dest"
        return 1
    fi
    anchor_uptime_ms
    took=$((anchor_uptime_ms - start + 1))
    anchor_fetch_amount "$anchor_fetch_size"
    rest="fetched ${anchor_fetch_url##*/}: $anchor_fetch_amount in $((took / 1000)).$((took % 1000 / 100)) s"
    anchor_fetch_amount $((anchor_fetch_size * 1000 / took))
    anchor_info "$rest ($anchor_fetch_amount/s), sha256 $sum"
}
