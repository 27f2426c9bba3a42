#!/bin/sh
# A download that goes into a program instead of a file, for what is larger than memory. It is anchor_fetch's own: the
# same mirrors, attempts, limits and digest. Only FILE, to which a transport appends, is a named pipe here. What comes
# through it is counted and goes on, through the digest, to a sink: a function that reads it all on its stdin. An attempt
# that breaks off leaves the sink waiting, and the next one goes on with the byte that it has not seen; a download that
# has to start from zero starts the sink again. A sink that is slower than the network slows the network down.
#
# A sink is called without arguments, in a process of its own; after a mirror that sent something else it is called
# again, and begins anew. Where it fails, anchor_fail has said why. Status 0: it has what it needs, and what it left is
# read all the same, for the digest; 1: it cannot use what comes (with a digest the rest is read, too, as that tells whether
# it was the right file; without one another mirror may have that); 2: it can take nothing, whatever comes.
# Whether the bytes were the right ones is known when anchor_fetch_stream returns, and no sooner.
# Needs anchor-fetch.sh, whose locals these functions share, and the programs dd and tee.

ANCHOR_STREAM_PIECE=16777216 # bytes, after which it may be said how far the download is

# usage: anchor_fetch_stream "URL..." NAME SHA256 SIZE SINK
# Fetches as anchor_fetch does, into the function SINK. Keeps its state in the directory NAME.fetch, which needs a few
# kilobytes. SHA256 and SIZE may be empty; without SIZE it reads anchor_fetch_limit, the most bytes that may come, and
# anchor_fetch_limit_why. Status 0 when SINK took everything and the digest is right, else 1.
anchor_fetch_stream() {
    local sink="$5"
    anchor_fetch__download "$1" "$2" "$3" "$4"
}

# usage: anchor_stream_size PIPE
# Sets anchor_fetch_size: how many bytes have come through; not while somebody writes. The reader counts when all writers
# have gone, and it may have seen that before the last of them came: so the second count from now on is the one.
anchor_stream_size() {
    local dir="${1%/*}" from='' session=''
    anchor_fetch_size=0
    while [ -p "$1" ]; do
        read -r session anchor_fetch_size 2>/dev/null <"$dir/taken" || session=
        from=${from:-$session}
        [ $((${session:-0} - ${from:-0})) -lt 2 ] || return 0
        # To open and close it is what lets the reader go round.
        true 2>/dev/null >"$1"
        sleep 0.01
    done
    read -r session anchor_fetch_size 2>/dev/null <"$dir/taken" || anchor_fetch_size=0
}

# usage: anchor_stream__open
# Begins the stream. Sets digester.
anchor_stream__open() {
    rm -rf "${file:?}" "$work/copy" "$work/taken" "$work/excess" "$work/sink" "$work/sink-error" "$work/sink-hint"
    if ! mkfifo -m 600 "$file" "$work/copy" || ! printf '0 0\n' >"$work/taken"; then
        anchor_fail "cannot write to $work" "is its file system full?"
        return 1
    fi
    (
        anchor_fetch_digest <"$work/copy" >"$work/sha256" &
        anchor_stream__pump | tee "$work/copy" | anchor_stream__sink
        wait "$!"
    ) &
    digester=$!
}

# usage: anchor_stream__close
# Ends the stream, and waits until the sink has done what it does with it.
anchor_stream__close() {
    while [ -p "$file" ]; do
        true 2>/dev/null >"$file"
        sleep 0.01
    done
}

# usage: anchor_stream__pump >PIPE
# Copies what comes through the named pipe, from one writer after the other, until the file end is there or the sink has
# gone, or more came than may come: who sends that finds nobody who reads it, and the file excess tells. It has the pipe
# open all the time, or a writer that comes between two readers would find nobody. At last there is a directory in the
# pipe's place: nobody can write to that, or wait for a reader.
anchor_stream__pump() {
    local session=0 total=0 bytes rest most="$anchor_fetch_max" count had=0 at
    anchor_uptime_ms
    at=$anchor_uptime_ms
    # shellcheck disable=SC2094 # a pipe: open for both, it waits for nobody, and so does the reader after it
    exec 8<>"$file" 9<"$file" 8<&-
    until [ -e "$work/end" ]; do
        count=$((most + 1 - total))
        [ "$count" -le "$ANCHOR_STREAM_PIECE" ] || count=$ANCHOR_STREAM_PIECE
        # It opens the pipe anew, which waits for a writer, and ends when there is none any more.
        dd if="$file" bs=64K count="$count" iflag=fullblock,count_bytes 9<&- 2>"$work/pumped" || break
        while read -r bytes rest; do
            case $rest in
                byte*) break ;;
            esac
        done <"$work/pumped"
        total=$((total + ${bytes:-0}))
        # A whole piece says nothing of the writers.
        if [ "${bytes:-0}" -eq "$count" ] && [ "$total" -le "$most" ]; then
            anchor_uptime_ms
            [ $((anchor_uptime_ms - at)) -ge 2000 ] || continue
            anchor_fetch_size=$total
            anchor_fetch__progress "$had" "$at" >&2
            had=$total at=$anchor_uptime_ms
            continue
        fi
        session=$((session + 1))
        printf '%s %s\n' "$session" "$total" >"$work/taken"
        [ "$total" -le "$most" ] || {
            : >"$work/excess"
            break
        }
    done
    rm -f "$file"
    mkdir "$file"
}

# usage: anchor_stream__sink <PIPE
# Runs the sink; keeps its status in the file sink, and what it said of a failure in sink-error and sink-hint.
anchor_stream__sink() {
    (
        # What the sink says must not be taken for the transport's words.
        # shellcheck disable=SC2317 # the sink calls it
        anchor_fail() {
            anchor_keep "$work/sink-error" "$1"
            anchor_keep "$work/sink-hint" "${2:-}"
            return 1
        }
        "$sink"
    )
    set -- "$?"
    case $1:$want in
        0:* | 1:?*) cat >/dev/null ;;
    esac
    printf '%s\n' "$1" >"$work/sink"
}

# usage: anchor_stream__broke
# Whether the sink has ended before the stream did, and not because too much came.
anchor_stream__broke() {
    [ -s "$work/sink" ] && [ ! -e "$work/excess" ]
}

# usage: anchor_stream__verdict
# What the sink came to: its status, 2 with anchor_fail. Sets anchor_stream_why and anchor_stream_hint.
anchor_stream__verdict() {
    local status
    anchor_stream_why="it was not wanted to its end"
    anchor_recall "$work/sink-hint"
    anchor_stream_hint=$anchor_recall
    anchor_recall "$work/sink"
    status=${anchor_recall:-2}
    [ "$status" != 0 ] || return 0
    anchor_recall "$work/sink-error"
    anchor_stream_why=${anchor_recall:-what takes the download ended with status $status}
    [ "$status" != 1 ] || return 1
    anchor_fail "$anchor_stream_why" "$anchor_stream_hint"
    return 2
}
