#!/bin/sh
# The one download path: mirrors and attempts until a deadline, resuming what is there; the digest taken while the file
# grows; and never more than fits into memory. What carries the bytes is a transport stage.
#
# Here is what stages call, one attempt, and whether what came is the file. Which mirror is asked when is in
# anchor-fetch-mirrors.sh, the digest in anchor-fetch-digest.sh, how large a file may become in anchor-fetch-room.sh: none of
# them works alone, and all share the locals of anchor_fetch__download. Needs anchor-report.sh and anchor-params.sh.
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
# a local path of the whole file and copies nothing. Statuses 0, 1 and 2 as above. One that has made sure of the file may set
# anchor_fetch_sized to 1 and anchor_fetch_size to its bytes: then nobody looks at it again. Where something has to be taken
# back that it did, anchor_<transport>_leave does that; it may be called at any time.

# usage: anchor_fetch "URL..." DEST [SHA256 [SIZE [memory]]]
# Downloads the file to DEST, which appears only when it is whole (and its digest is SHA256, and its bytes are SIZE,
# where they are given). Several URLs, separated by blanks, are mirrors of the same file, of whatever schemes. They are
# asked in an order that is random on each node and in each round; one that fails for good is dropped; when none is left,
# the download has failed. With SHA256 a change of mirror goes on with what is there, and without it starts from zero.
# SIZE is compared with the memory before any connection.
# Works in DEST.fetch, beside it: DEST's directory should be a file system that can hold the file. memory: it may use all of
# the node's memory, so that only this limits the file, and nobody need ask how much is free in it; where the file would
# not fit, the initramfs makes room (anchor_memory_shed).
# Where anchor_fetch_signed is 1, what has no SHA256 may come from anywhere: the caller checks it in another way.
# Reads the parameters anchor_fetch_{timeout,connect_timeout,stall,attempts,reserve}; attempts is the number of rounds.
# Notes url (which served the end), attempts, bytes and sha256. Status 0, with anchor_fetch_size set to the bytes, or 1.
anchor_fetch() {
    local sink=''
    anchor_fetch__download "$@"
}

# usage: anchor_fetch__download "URL..." DEST [SHA256 [SIZE [memory]]]
# What anchor_fetch and anchor_fetch_stream share. Reads sink, a function that takes the bytes; without it they go to DEST.
anchor_fetch__download() {
    local urls="$1" dest="$2" want="${3:-}" expected="${4:-}" unbounded="${5:-}" work="$2.fetch" file="$2.fetch/data"
    local digester='' start deadline status tries
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
        # shellcheck disable=SC2317 # what comes calls it
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
    # What takes the digest goes on as long as this directory is there. Where the end came early, it may be making a file in it
    # this moment, of which rm knows nothing yet.
    for tries in 1 2 3 4 5; do
        rm -rf "${work:?}" 2>/dev/null && break
        sleep 0.2
    done
    [ ! -d "$work" ] || anchor_warn "cannot remove $work, and the memory that it takes is not free"
    [ "$status" -eq 0 ]
}

# usage: anchor_fetch_place URL [SHA256 [ROOTHASH]]
# Finds the file where it is, without a copy. Sets anchor_fetch_placed to its path, and anchor_fetch_size to its bytes. Reads
# and notes what anchor_fetch does; the digest is taken, and noted, only where SHA256 is given: a file on a server need not
# come over to be mounted. With ROOTHASH, SHA256 is empty, and the caller checks each block when it is read. Without it,
# nothing is used in place that a transport brings for a digest only: such a file may change after its digest was taken.
# Status 0, 1, or 2 when no transport can reach this URL in place. anchor_fetch_leave takes back what it did.
anchor_fetch_place() {
    local url="$1" want="${2:-}" expected='' round=1 sum start deadline anchor_fetch_signed="${anchor_fetch_signed:-}"
    anchor_fetch_placed=
    anchor_fetch_plain "$url"
    anchor_fetch_placeable "$url" && [ "${3:-}:$anchor_transport_needs_digest" != :1 ] || return 2
    [ -z "${3:-}" ] || anchor_fetch_signed=1
    anchor_fetch__admissible && anchor_fetch__expectable "$anchor_fetch_url" || return 1
    anchor_note url "$anchor_fetch_url"
    anchor_uptime_ms
    start=$anchor_uptime_ms
    deadline=$((start + anchor_fetch_timeout * 1000))
    while :; do
        anchor_fetch__prepare
        anchor_note_number attempts "$round"
        anchor_fetch_sized=
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
    if [ -z "$anchor_fetch_sized" ]; then
        if [ ! -f "$anchor_fetch_placed" ] || [ ! -r "$anchor_fetch_placed" ]; then
            anchor_fail "$anchor_fetch_url is not a file that can be read: $anchor_fetch_placed" "check the path in the URL"
            return 1
        fi
        anchor_fetch_size "$anchor_fetch_placed"
    fi
    anchor_note_number bytes "$anchor_fetch_size"
    [ -n "$want" ] || return 0
    sum=$(anchor_fetch_digest <"$anchor_fetch_placed")
    sum=${sum%% *}
    anchor_note sha256 "$sum"
    [ "$sum" != "$want" ] || return 0
    anchor_fetch_placed=
    anchor_fail "$anchor_fetch_url is not what it should be: its SHA-256 digest is ${sum:-unknown}, expected $want" \
        "someone changed the file, or the digest is of another version"
}

# usage: anchor_fetch_placeable URL
# Whether a transport can reach URL in place. Sets what anchor_stage_for_scheme does.
anchor_fetch_placeable() {
    anchor_stage_for_scheme "${1%%://*}" && command -v "anchor_${anchor_transport}_place" >/dev/null
}

# usage: anchor_fetch_leave
# Takes back what transports did for a file in place, which is used no more. It may be called at any time.
anchor_fetch_leave() {
    local stage
    for stage in ${anchor_stages:-}; do
        case $stage in
            transport_*) ! command -v "anchor_${stage#transport_}_leave" >/dev/null || "anchor_${stage#transport_}_leave" ;;
        esac
    done
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
    # A manifest has its signature instead of a digest, and an image may have its root hash.
    if [ -z "$want" ] && [ "$anchor_transport_needs_digest" = 1 ] && [ "${anchor_fetch_signed:-}" != 1 ]; then
        anchor_fail "refused to fetch $anchor_fetch_url without a digest: nothing protects ${url%%://*}://" \
            "add the image's SHA-256 digest (rd.anchor.<image>.sha256=) or use https://"
        return 1
    fi
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
