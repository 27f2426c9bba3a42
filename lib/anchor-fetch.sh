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
# A transport that has asked for the size of FILE when it answers (anchor_fetch_size FILE) may set anchor_fetch_sized to 1:
# then nobody asks again.
# A transport may have anchor_<transport>__total FILE, which sets anchor_fetch_total to the size that FILE will have,
# or to nothing while that is not known. It is called in another process while the attempt runs.
# FILE may be a named pipe (see anchor-stream.sh): anchor_fetch_size tells how many bytes it has had, too, and it cannot be
# opened for reading.
# A transport that reaches files where they are may have anchor_<transport>_place URL, which sets anchor_fetch_placed to
# a local path of the whole file and copies nothing. Statuses 0, 1 and 2 as above.

ANCHOR_FETCH_MAX_WAIT=120
# Bytes of memory without which the initramfs does not get to switch_root: for what carries and checks the file, and for the
# mounts. Where less was left, the kernel killed one of them (kernel 6.1, of whose available memory 6 MiB cannot be had).
ANCHOR_FETCH_WORK=14680064

# usage: anchor_fetch "URL..." DEST [SHA256 [SIZE [memory]]]
# Downloads the file to DEST, which appears only when it is whole (and its digest is SHA256, and its bytes are SIZE,
# where they are given). Several URLs, separated by blanks, are mirrors of the same file, of whatever schemes. They are
# asked in an order that is random on each node and in each round; one that fails for good is dropped; when none is left,
# the download has failed. With SHA256 a change of mirror goes on with what is there, and without it starts from zero.
# SIZE is compared with the memory before any connection.
# Works in DEST.fetch, beside it: DEST's directory should be a file system that can hold the file. memory: it may use all of
# the node's memory, so that only this limits the file, and nobody need ask how much is free in it; where the file would
# not fit, the initramfs makes room (anchor_memory_shed).
# Reads the parameters anchor_fetch_{timeout,connect_timeout,stall,attempts,reserve}; attempts is the number of rounds.
# Notes url (which served the end), attempts, bytes and sha256. Status 0, with anchor_fetch_size set to the bytes, or 1.
anchor_fetch() {
    local sink=''
    anchor_fetch__download "$@"
}

# usage: anchor_fetch__download "URL..." DEST [SHA256 [SIZE]]
# What anchor_fetch and anchor_fetch_stream share. Reads sink, a function that takes the bytes; without it they go to DEST.
anchor_fetch__download() {
    local urls="$1" dest="$2" want="${3:-}" expected="${4:-}" unbounded="${5:-}" work="$2.fetch" file="$2.fetch/data"
    local digester='' start deadline status
    # Another run may have been cut off here, and an older image would take memory from the new one.
    if { [ -d "$work" ] && ! rm -rf "${work:?}"; } || ! anchor_remove "$work" "$dest" || ! mkdir -m 700 "$work"; then
        anchor_fail "cannot write beside $dest" "is its file system mounted and writable?"
        return 1
    fi
    anchor_uptime_ms
    start=$anchor_uptime_ms
    deadline=$((start + anchor_fetch_timeout * 1000))
    (
        LC_ALL=C
        export LC_ALL
        trap 'anchor_fetch__unfollow; rm -rf "${work:?}"; exit 143' HUP INT TERM
        # What is said of one mirror is not yet the end of the download.
        anchor_fail() {
            anchor_keep "$work/error" "$1"
            anchor_keep "$work/hint" "${2:-}"
            return 1
        }
        anchor_fetch__all
        status=$?
        anchor_fetch__unfollow
        exit "$status"
    )
    status=$?
    if [ "$status" -ne 0 ] && [ -d "$work" ]; then
        anchor_recall "$work/hint"
        set -- "$anchor_recall"
        anchor_recall "$work/error"
        anchor_fail "${anchor_recall:-the download to $dest was cut off}" "$1"
    fi
    anchor_recall "$work/bytes"
    anchor_fetch_size=${anchor_recall:-0}
    rm -rf "${work:?}"
    [ "$status" -eq 0 ]
}

# usage: anchor_fetch_place URL [SHA256]
# Finds the file where it is, without a copy. Sets anchor_fetch_placed to its path. Reads and notes what anchor_fetch does;
# the digest is taken, and noted, only where SHA256 is given: a file on a server need not come over to be mounted.
# Status 0, 1, or 2 when no transport can reach this URL in place.
anchor_fetch_place() {
    local url="$1" want="${2:-}" expected='' round=1 sum start deadline
    anchor_fetch_placed=
    anchor_fetch_plain "$url"
    anchor_stage_for_scheme "${url%%://*}" && command -v "anchor_${anchor_transport}_place" >/dev/null || return 2
    anchor_fetch__admissible && anchor_fetch__expectable "$anchor_fetch_url" || return 1
    anchor_note url "$anchor_fetch_url"
    anchor_uptime_ms
    start=$anchor_uptime_ms
    deadline=$((start + anchor_fetch_timeout * 1000))
    while :; do
        anchor_fetch__prepare
        anchor_note_number attempts "$round"
        "anchor_${anchor_transport}_place" "$url"
        case $? in
            0) break ;;
            2) ;;
            *) return 1 ;;
        esac
        if ! anchor_fetch__again "$round" "${anchor_fetch_retry_after:-0}" "$anchor_fetch_error"; then
            anchor_fetch__took
            anchor_fail "gave up on $anchor_fetch_url after attempt $round of $anchor_fetch_attempts and \
$anchor_fetch_took: $anchor_fetch_error" "$anchor_fetch_hint"
            return 1
        fi
        round=$((round + 1))
    done
    if [ ! -f "$anchor_fetch_placed" ] || [ ! -r "$anchor_fetch_placed" ]; then
        anchor_fail "$anchor_fetch_url is not a file that can be read: $anchor_fetch_placed" "check the path in the URL"
        return 1
    fi
    anchor_fetch_size "$anchor_fetch_placed"
    anchor_note_number bytes "$anchor_fetch_size"
    [ -n "$want" ] || return 0
    sum=$(anchor_fetch__digest <"$anchor_fetch_placed")
    sum=${sum%% *}
    anchor_note sha256 "$sum"
    [ "$sum" != "$want" ] || return 0
    anchor_fetch_placed=
    anchor_fail "$anchor_fetch_url is not what it should be: its SHA-256 digest is ${sum:-unknown}, expected $want" \
        "someone changed the file, or the digest is of another version"
}

# usage: anchor_fetch_mirrors URL LIST
# Sets anchor_fetch_urls: what a stage was given as the place of a file and as its mirrors (with commas between), with
# blanks between, as anchor_fetch takes them. Either may be empty.
anchor_fetch_mirrors() {
    local rest="$2"
    anchor_fetch_urls=$1
    while [ -n "$rest" ]; do
        anchor_fetch_urls="$anchor_fetch_urls${anchor_fetch_urls:+ }${rest%%,*}"
        case $rest in
            *,*) rest=${rest#*,} ;;
            *) rest='' ;;
        esac
    done
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
# Sets anchor_fetch_size: its size in bytes, 0 where there is no file. Of a stream, how many bytes have gone through; only
# while nobody writes to it.
anchor_fetch_size() {
    if [ -p "$1" ] || [ -d "$1" ]; then
        anchor_stream_size "$1"
        return
    fi
    anchor_fetch_size=0
    [ ! -s "$1" ] || anchor_fetch_size=$(stat -c %s "$1" 2>/dev/null) || anchor_fetch_size=0
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

# usage: anchor_fetch__all
# Asks one mirror after the other, in rounds, until the file is whole. Keeps of each, by its number, in work: url, error
# and hint (of its last failure), and until (the uptime in ms before which it does not want to be asked).
# The helpers share these locals: mirrors, those that are left; queue, those still to be asked in this round; later,
# those of the next one; first, the one to begin it with; n and url, the present one; pieces, how many attempts
# file has its bytes from, sources, which mirrors, and owner, the last of them; grew and useless, whether in this round
# file grew, and whether somebody could not go on from it; idle, how many rounds brought nothing since one that did;
# alone, 1 once the parts of several attempts were wrong.
anchor_fetch__all() {
    local count=0 mirrors='' queue later='' first='' n url round=1 attempts=0
    local pieces=0 sources='' owner='' grew='' useless='' alone='' idle=0
    anchor_fetch__expectable "$dest" && anchor_fetch__admit || return 1
    queue=$mirrors
    while :; do
        if anchor_fetch__choose; then
            anchor_fetch__budget || return 1
            anchor_fetch__attempt
            case $? in
                0) return 0 ;;
                1) return 1 ;;
            esac
            if [ -z "$mirrors" ]; then
                anchor_fetch__sum_up
                [ "$count" -eq 1 ] || anchor_fetch_told="none of the $count mirrors has the file: $anchor_fetch_told"
                anchor_fail "$anchor_fetch_told" "$anchor_fetch_hint"
                return 1
            fi
        fi
        [ -n "$queue" ] || anchor_fetch__next_round || return 1
    done
}

# usage: anchor_fetch__expectable WHAT
# Whether want and expected are a digest and a size, or nothing; says of WHAT they are otherwise.
anchor_fetch__expectable() {
    case ${expected:-1} in
        *[!0-9]* | 0* | ????????????????*)
            anchor_fail "the size for $1 is not a size" "give its bytes, as a decimal number"
            return 1
            ;;
    esac
    case ${#want}:$want in
        *:*[!0-9a-f]*) ;;
        0: | 64:*) return 0 ;;
    esac
    anchor_fail "the digest for $1 is not SHA-256" "give 64 hexadecimal digits"
}

# usage: anchor_fetch__admit
# Numbers the mirrors in urls, and drops those that may not be asked. Status 1 if none is left.
anchor_fetch__admit() {
    local rest="$urls" seen=' '
    while :; do
        rest=${rest#"${rest%%[! 	]*}"}
        [ -n "$rest" ] || break
        url=${rest%%[ 	]*}
        rest=${rest#"$url"}
        case $seen in
            *" $url "*) continue ;;
        esac
        seen="$seen$url "
        count=$((count + 1))
        n=$count
        mirrors="$mirrors $n"
        (umask 077 && printf '%s\n' "$url" >"$work/$n.url") || return 1
        anchor_fetch_plain "$url"
        anchor_fetch__admissible || anchor_fetch__drop
    done
    [ -z "$mirrors" ] || return 0
    anchor_fetch__sum_up
    anchor_fail "${anchor_fetch_told:-there is no URL to fetch the file from}" "$anchor_fetch_hint"
}

# usage: anchor_fetch__admissible
# Decides before any connection whether url may be fetched. Reads url, anchor_fetch_url and want; sets anchor_transport.
anchor_fetch__admissible() {
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
    # A manifest has its signature instead of a digest.
    if [ -z "$want" ] && [ "$anchor_transport_needs_digest" = 1 ] && [ "${anchor_fetch_signed:-}" != 1 ]; then
        anchor_fail "refused to fetch $anchor_fetch_url without a digest: nothing protects ${url%%://*}://" \
            "add the image's SHA-256 digest (rd.anchor.<image>.sha256=) or use https://"
        return 1
    fi
}

# usage: anchor_fetch__choose
# Takes a mirror out of queue, at random among those that may be asked now. Sets n, url, anchor_fetch_url and
# anchor_transport. Status 1 when others were asked and these are not to be: they want to be left alone for a while yet,
# or the time is up. Then they are left for the next round.
anchor_fetch__choose() {
    local each ready='' random
    anchor_uptime_ms
    for each in $queue; do
        anchor_recall "$work/$each.until"
        # A wait is cut to tenths of a second.
        [ "${anchor_recall:-0}" -gt $((anchor_uptime_ms + 200)) ] || [ "$anchor_uptime_ms" -ge "$deadline" ] ||
            ready="$ready $each"
    done
    if [ -z "$ready" ]; then
        if [ -n "$later" ]; then
            later="$later $queue"
            queue=
            return 1
        fi
        ready=$queue
    fi
    # shellcheck disable=SC2086 # numbers
    set -- $ready
    case " $* " in
        *" ${first:-none} "*) n=$first ;;
        *)
            if [ $# -gt 1 ]; then
                random=$(od -An -N4 -tu4 /dev/urandom) || random=0
                shift $((random % $#))
            fi
            n=$1
            ;;
    esac
    first=
    anchor_fetch__without "$n" "$queue"
    queue=$anchor_fetch_rest
    IFS= read -r url <"$work/$n.url"
    anchor_fetch_plain "$url"
    anchor_stage_for_scheme "${url%%://*}"
}

# usage: anchor_fetch__without NUMBER NUMBERS
# Sets anchor_fetch_rest to NUMBERS without NUMBER.
anchor_fetch__without() {
    local each
    anchor_fetch_rest=
    for each in $2; do
        [ "$each" = "$1" ] || anchor_fetch_rest="$anchor_fetch_rest $each"
    done
}

# usage: anchor_fetch__attempt
# Lets the mirror n bring what is missing. Status: 0 the file is in place, 1 it will never be, 2 see queue and mirrors.
anchor_fetch__attempt() {
    local before status=0
    anchor_keep "$work/transport" "$anchor_transport"
    if [ -z "$digester" ]; then
        anchor_fetch__follow || return 1
    elif [ -z "$want" ] || [ -n "$alone" ]; then
        [ "${owner:-$n}" = "$n" ] || anchor_fetch__from_zero || return 1
    fi
    anchor_fetch_size "$file"
    before=$anchor_fetch_size
    anchor_fetch__prepare
    [ -n "$alone" ] || anchor_fetch_verified=${want:+1}
    # What one mirror brings slowly, another may finish: it gets half of the time only.
    [ -z "$anchor_fetch_verified" ] || [ "$mirrors" = " $n" ] || anchor_fetch_left=$(((anchor_fetch_left + 1) / 2))
    attempts=$((attempts + 1))
    anchor_note_number attempts "$attempts"
    anchor_note url "$anchor_fetch_url"
    [ ! -e "$work/error" ] || rm -f "$work/error" "$work/hint"
    if [ -z "$expected" ] || [ "$before" != "$expected" ]; then
        anchor_fetch_sized=
        "anchor_${anchor_transport}_run" "$url" "$file" "$anchor_fetch_max"
        status=$?
        [ -n "$anchor_fetch_sized" ] || anchor_fetch_size "$file"
    fi
    if [ "$anchor_fetch_size" -gt "$before" ]; then
        pieces=$((pieces + 1))
        owner=$n
        grew=1
        case " $sources " in
            *" $n "*) ;;
            *) sources="$sources $n" ;;
        esac
    fi
    if [ -n "$sink" ] && anchor_stream__broke; then
        anchor_fetch__accept broken
        return
    fi
    case $status in
        0)
            anchor_fetch__accept
            return
            ;;
        2 | 3) anchor_fetch__failed "$status" $((anchor_fetch_size - before)) || return 1 ;;
        *)
            if [ -n "$anchor_fetch_needs" ] && anchor_fetch__make_room "$anchor_fetch_needs"; then
                first=$n
                queue="$n $queue"
            else
                anchor_fetch__drop
            fi
            # Nothing is known of what it brought, and too much of it may be there.
            [ "$anchor_fetch_size" -eq "$before" ] || anchor_fetch__from_zero || return 1
            ;;
    esac
    return 2
}

# usage: anchor_fetch__prepare
# Sets what a transport reads, and empties what it may set.
anchor_fetch__prepare() {
    anchor_uptime_ms
    anchor_fetch_left=$(((deadline - anchor_uptime_ms + 999) / 1000))
    [ "$anchor_fetch_left" -gt 0 ] || anchor_fetch_left=1
    anchor_fetch_verified=
    anchor_fetch_needs=
    anchor_fetch_error=
    anchor_fetch_hint=
    anchor_fetch_retry_after=
}

# usage: anchor_fetch__failed STATUS BYTES
# The mirror n failed for now, with the transport's STATUS, after BYTES. Status 1 if file cannot be written any more.
anchor_fetch__failed() {
    anchor_keep "$work/$n.error" "$anchor_fetch_error"
    anchor_keep "$work/$n.hint" "$anchor_fetch_hint"
    [ "${anchor_fetch_retry_after:-0}" -le "$ANCHOR_FETCH_MAX_WAIT" ] || anchor_fetch_retry_after=$ANCHOR_FETCH_MAX_WAIT
    anchor_uptime_ms
    anchor_keep "$work/$n.until" $((anchor_uptime_ms + ${anchor_fetch_retry_after:-0} * 1000))
    if [ "$1" -eq 3 ]; then
        if [ "$2" -eq 0 ] && [ -n "$anchor_fetch_verified" ]; then
            # Another mirror may be able to go on from what is there.
            useless=1
        else
            anchor_fetch__from_zero || return 1
        fi
    elif [ "$2" -gt 0 ] && [ -z "$anchor_fetch_verified" ]; then
        # No other mirror may go on from what this one began.
        first=$n
        later="$later $queue"
        queue=
    fi
    later="$later $n"
    [ -n "$queue" ] || return 0
    anchor_fetch__tell "$n"
    anchor_warn "fetching ${anchor_fetch_url##*/}: $anchor_fetch_told; trying another mirror"
}

# usage: anchor_fetch__drop
# Takes the mirror n out, for the reason that anchor_fail was given.
anchor_fetch__drop() {
    [ -e "$work/error" ] || anchor_fail "$anchor_fetch_url failed without saying why"
    mv -f "$work/error" "$work/$n.error"
    mv -f "$work/hint" "$work/$n.hint"
    anchor_fetch__without "$n" "$mirrors"
    mirrors=$anchor_fetch_rest
    [ -n "$mirrors" ] && [ "$count" -gt 1 ] || return 0
    anchor_fetch__tell "$n"
    anchor_warn "not from this mirror: $anchor_fetch_told"
}

# usage: anchor_fetch__tell NUMBER
# Sets anchor_fetch_told to why this mirror failed, with its URL where there are several.
anchor_fetch__tell() {
    local error
    anchor_recall "$work/$1.error"
    error=$anchor_recall
    anchor_recall "$work/$1.url"
    set -- "$anchor_fetch_url"
    anchor_fetch_plain "$anchor_recall"
    case $count:$error in
        1:* | *"$anchor_fetch_url"*) anchor_fetch_told=$error ;;
        *) anchor_fetch_told="$anchor_fetch_url: $error" ;;
    esac
    anchor_fetch_url=$1
}

# usage: anchor_fetch__sum_up
# Sets anchor_fetch_told to why each mirror failed, and anchor_fetch_hint to what to do about the last one.
anchor_fetch__sum_up() {
    local each=1 all=''
    anchor_fetch_hint=
    while [ "$each" -le "$count" ]; do
        if [ -e "$work/$each.error" ]; then
            anchor_fetch__tell "$each"
            all="$all${all:+; }$anchor_fetch_told"
            anchor_recall "$work/$each.hint"
            anchor_fetch_hint=${anchor_recall:-$anchor_fetch_hint}
        fi
        each=$((each + 1))
    done
    anchor_fetch_told=$all
}

# usage: anchor_fetch__next_round
# Waits, and puts all mirrors that are left into the queue. Status 1, explained, when there is no next round.
anchor_fetch__next_round() {
    local each asked=''
    if [ -n "$useless" ] && [ -z "$grew" ]; then
        anchor_fetch__from_zero || return 1
    fi
    idle=$((idle + 1))
    [ -z "$grew" ] || idle=1
    useless=
    grew=
    queue=$later
    later=
    anchor_uptime_ms
    for each in $queue; do
        anchor_recall "$work/$each.until"
        anchor_recall=$(((${anchor_recall:-0} - anchor_uptime_ms + 999) / 1000))
        [ "$anchor_recall" -gt "${asked:-$anchor_recall}" ] || asked=$anchor_recall
    done
    [ "${asked:-0}" -ge 0 ] || asked=0
    anchor_fetch__tell "$n"
    if anchor_fetch__again "$idle" "${asked:-0}" "$anchor_fetch_told"; then
        round=$((round + 1))
        return 0
    fi
    anchor_fetch__sum_up
    anchor_fetch__took
    [ "$count" -eq 1 ] || anchor_fetch_url="all $count mirrors"
    anchor_fail "gave up on $anchor_fetch_url after attempt $round of $anchor_fetch_attempts and \
$anchor_fetch_took: $anchor_fetch_told" "${anchor_fetch_hint:-see to the server and the network between it and this node}"
}

# usage: anchor_fetch__took
# Sets anchor_fetch_took: how much of the time is gone.
anchor_fetch__took() {
    anchor_uptime_ms
    anchor_fetch_took="$(((anchor_uptime_ms - start + 500) / 1000)) s of $anchor_fetch_timeout s"
}

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
    local key value rest back=0 work=$ANCHOR_FETCH_WORK anchor_fetch_size
    anchor_fetch_available=
    anchor_fetch_fits=
    [ -r "${ANCHOR_ROOT:-}/proc/meminfo" ] || return 0
    while read -r key value rest; do
        case $key in
            MemAvailable:) anchor_fetch_available=$((value * 1024)) ;;
            # A ramfs cannot be evicted, and the initramfs is one; what else cannot is locked.
            Unevictable:) back=$((back + value * 1024)) ;;
            Mlocked:) back=$((back - value * 1024)) ;;
        esac
    done <"${ANCHOR_ROOT:-}/proc/meminfo"
    [ -n "$anchor_fetch_available" ] || return 0
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

# usage: anchor_fetch__again IDLE ASKED WHY
# Whether there is another round after round; waits for it as anchor_fetch_pause does.
anchor_fetch__again() {
    [ "$round" -lt "$anchor_fetch_attempts" ] && anchor_fetch_pause "$1" "$2" "$deadline" \
        "fetching ${anchor_fetch_url##*/}: attempt $round of $anchor_fetch_attempts: $3"
}

# usage: anchor_fetch_pause IDLE ASKED DEADLINE WHY
# Waits as long as the server ASKED for (seconds), and then a random part of a window. It doubles with each attempt that
# brought nothing, IDLE of them, and is no smaller than ASKED, because all nodes may have been asked for the same. But
# never more than half of the time until DEADLINE (uptime in ms): another attempt has to fit in. Status 1 if there is no
# time left. For whoever asks a server again, with or without anchor_fetch.
anchor_fetch_pause() {
    local window=60 wait left random
    [ "$1" -gt 6 ] || window=$((1 << ($1 - 1)))
    [ "$2" -le "$window" ] || window=$2
    random=$(od -An -N4 -tu4 /dev/urandom) || random=0
    wait=$(($2 * 1000 + random % (window * 1000 + 1)))
    anchor_uptime_ms
    left=$(($3 - anchor_uptime_ms))
    [ "$left" -gt 100 ] || return 1
    [ "$wait" -le $((left / 2)) ] || wait=$((left / 2))
    wait=$((wait / 1000)).$((wait % 1000 / 100))
    anchor_warn "$4; next in $wait s"
    sleep "$wait"
}

# usage: anchor_fetch__digest <FILE
# Prints its SHA-256 digest, and more after a blank. openssl has the processor's own instructions for it, sha256sum only
# where the distribution links it with openssl's library: up to five times as fast. Without such instructions openssl
# loses what it gains, because it reads 4 KiB at a time: each makes a pipe wake the one who writes.
anchor_fetch__digest() {
    anchor_fetch_processor
    if command -v openssl >/dev/null && { anchor_fetch_processor_has sha_ni sha2 || ! command -v sha256sum >/dev/null; }; then
        openssl dgst -sha256 -r
    else
        sha256sum
    fi
}

# usage: anchor_fetch_processor
# Looks what the first processor is. Sets anchor_fetch_features, the instructions that it has, as x86 (flags) and ARM
# (Features) name them, or nothing for another kind; and anchor_fetch_emulated, 1 where QEMU does its work without KVM.
anchor_fetch_processor() {
    local name colon rest
    anchor_fetch_features=
    anchor_fetch_emulated=
    while read -r name colon rest; do
        case "$name $colon $rest" in
            'model name : QEMU TCG'*) anchor_fetch_emulated=1 ;;
            'flags '* | 'Features '*)
                anchor_fetch_features=" $rest "
                return 0
                ;;
        esac
    done 2>/dev/null <"${ANCHOR_ROOT:-}/proc/cpuinfo"
}

# usage: anchor_fetch_processor_has X86 ARM
# Whether it has one of these; a processor that does not say is taken to have them. Needs anchor_fetch_processor.
anchor_fetch_processor_has() {
    case ${anchor_fetch_features:-" $1 "} in
        *" $1 "* | *" $2 "*) return 0 ;;
    esac
    return 1
}

# usage: anchor_fetch__from_zero
# Forgets the bytes that are there.
anchor_fetch__from_zero() {
    pieces=0
    sources=
    owner=
    anchor_fetch__unfollow || return 1
    # A sink that nobody will feed need not begin.
    [ -n "$mirrors" ] || [ -z "$sink" ] || return 0
    anchor_fetch__follow
}

# usage: anchor_fetch__follow
# Begins an empty file and takes its digest in the background. Sets digester.
anchor_fetch__follow() {
    anchor_remove "$work/end" "$work/feeder" || return 1
    if [ -n "$sink" ]; then
        anchor_stream__open
        return
    fi
    if ! anchor_remove "$file" || ! (umask 077 && : >"$file"); then
        anchor_fail "cannot write to $work" "is its file system full?"
        return 1
    fi
    # shellcheck disable=SC2094 # one process appends to the file while this one reads it
    anchor_fetch__feed <"$file" 3>"$work/feeder" | anchor_fetch__digest >"$work/sha256" &
    digester=$!
}

# usage: anchor_fetch__unfollow
# Ends the digest at the present end of the file; anchor_fetch__follow's processes are gone afterwards.
anchor_fetch__unfollow() {
    local feeder=''
    [ -n "$digester" ] || return 0
    : >"$work/end"
    [ -z "$sink" ] || anchor_stream__close
    # An empty feeder file means that it has yet to look for the end file.
    [ ! -s "$work/feeder" ] || read -r feeder <"$work/feeder"
    [ -z "$feeder" ] || kill -TERM "$feeder" 2>/dev/null
    wait "$digester" 2>/dev/null
    digester=
    return 0
}

# usage: anchor_fetch__feed <FILE >PIPE 3>PID-FILE
# Copies the file as it grows: each cat goes on where the one before it stopped. SIGTERM cuts a wait short, so that
# the end is seen at once. A cat that took its time had much to copy: then the next look comes soon, so that little is
# left to do at the end; else, or where a cat takes long because the node is slow, looking would cost more than it gains.
anchor_fetch__feed() {
    local pid rest said=0 had=0 at nap=05
    trap : TERM
    read -r pid rest </proc/self/stat
    printf '%s\n' "$pid" >&3
    at=$start
    said=$start
    until [ -e "$work/end" ]; do
        anchor_uptime_ms
        rest=$anchor_uptime_ms
        cat || return 1
        # The shell that began the download may have been killed.
        kill -0 "$$" 2>/dev/null || return 1
        anchor_uptime_ms
        case $((anchor_uptime_ms - rest > 40)):$((anchor_uptime_ms - rest > 120)):$nap in
            1:1:*) nap=20 ;;
            1:*) nap=05 ;;
            0:*:05) nap=10 ;;
            0:*:10) nap=20 ;;
            *) nap=40 ;;
        esac
        if [ $((anchor_uptime_ms - said)) -ge 2000 ] && [ ! -e "$work/end" ]; then
            said=$anchor_uptime_ms
            anchor_fetch_size "$file"
            anchor_fetch__progress "$had" "$at" >&2
            had=$anchor_fetch_size
            at=$said
        fi
        [ -e "$work/end" ] || {
            sleep "0.$nap" &
            wait "$!" || kill "$!" 2>/dev/null
        }
    done
    cat
}

# usage: anchor_fetch__progress BYTES-BEFORE MS-BEFORE
# Says how far the download is, unless nothing came. Reads anchor_fetch_size and anchor_uptime_ms.
anchor_fetch__progress() {
    local line
    [ "$anchor_fetch_size" -gt "$1" ] || return 0
    anchor_fetch_total=
    # The transport may be another one by now than when this process began.
    anchor_recall "$work/transport"
    if command -v "anchor_${anchor_recall}__total" >/dev/null; then
        "anchor_${anchor_recall}__total" "$file"
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

# usage: anchor_fetch__accept [broken]
# Checks the digest of the whole file and moves it to dest. Status 0, 1 when that cannot be, or 2 when it is not the right
# file: then what it came from has been judged. broken: a sink has ended before the file did.
anchor_fetch__accept() {
    local sum='' rest took sunk=0
    anchor_fetch__unfollow
    if [ -n "$sink" ]; then
        anchor_stream__verdict
        sunk=$?
        [ "$sunk" -ne 2 ] || return 1
        if [ -n "${1:-}" ]; then
            anchor_fetch__reject "$anchor_stream_why" "$anchor_stream_hint"
            return
        fi
    fi
    read -r sum rest <"$work/sha256"
    if [ ${#sum} -ne 64 ]; then
        anchor_fail "could not take the digest of $anchor_fetch_url" "is sha256sum in the initramfs?"
        return 1
    fi
    anchor_note_number bytes "$anchor_fetch_size"
    anchor_note sha256 "$sum"
    if [ -n "$expected" ] && [ "$anchor_fetch_size" != "$expected" ]; then
        anchor_fetch__reject "it has $anchor_fetch_size bytes, expected $expected"
        return
    fi
    if [ -n "$want" ] && [ "$sum" != "$want" ]; then
        anchor_fetch__reject "its SHA-256 digest is $sum, expected $want"
        return
    fi
    if [ "$sunk" -ne 0 ] && [ -n "$want" ]; then
        anchor_fail "$anchor_stream_why" "$anchor_stream_hint"
        return 1
    elif [ "$sunk" -ne 0 ]; then
        anchor_fetch__reject "$anchor_stream_why" "$anchor_stream_hint"
        return
    fi
    anchor_keep "$work/bytes" "$anchor_fetch_size"
    if [ -z "$sink" ] && ! mv -f "$file" "$dest"; then
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

# usage: anchor_fetch__reject WHY [HINT]
# Forgets a file that is not the right one. Where it is known who sent it, that mirror is dropped; what came in several
# parts is fetched once more, all of it from one mirror. Status 2, or 1 if file cannot be written any more.
anchor_fetch__reject() {
    local each names=''
    if [ -n "$want" ] && [ "$pieces" -gt 1 ] && [ -z "$alone" ]; then
        alone=1
        for each in $sources; do
            IFS= read -r url <"$work/$each.url"
            anchor_fetch_plain "$url"
            names="$names${names:+ and }$anchor_fetch_url"
        done
        anchor_warn "the $pieces parts that came from $names are not the file: $1; starting again, from one mirror alone"
        queue="$queue $n"
    else
        anchor_fail "$anchor_fetch_url is not what it should be: $1" \
            "${2:-someone changed the file or the digest on the command line is of another version; it is not used}"
        anchor_fetch__drop
    fi
    anchor_fetch__from_zero || return 1
    return 2
}
