#!/bin/sh
# The digest of a download, taken while the file grows, so that hardly anything is left to read at its end. Part of
# anchor-fetch.sh; of a stream it is anchor-stream.sh that knows the bytes.

# usage: anchor_fetch_digest <FILE
# Prints its SHA-256 digest, and more after a blank. openssl has the processor's own instructions for it, sha256sum only
# where the distribution links it with openssl's library: up to five times as fast. Without such instructions openssl
# loses what it gains, because it reads 4 KiB at a time: each makes a pipe wake the one who writes.
anchor_fetch_digest() {
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
    anchor_fetch__feed <"$file" 3>"$work/feeder" | anchor_fetch_digest >"$work/sha256" &
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
    local rest said=0 had=0 at nap=05
    trap : TERM
    anchor_pid
    printf '%s\n' "$anchor_pid" >&3
    at=$start
    said=$start
    until [ -e "$work/end" ]; do
        anchor_uptime_ms
        rest=$anchor_uptime_ms
        cat || return 1
        # The shell that began the download may have been killed, or ended by an error in a transport.
        kill -0 "$$" 2>/dev/null && [ -d "$work" ] || return 1
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
