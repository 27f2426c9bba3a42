#!/bin/sh
# The rounds of a download: which mirror is asked next, what becomes of one that failed, and how long to wait before the next
# round. Part of anchor-fetch.sh.

ANCHOR_FETCH_MAX_WAIT=120 # seconds that a server may ask for

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

# usage: anchor_fetch__choose
# Takes a mirror out of queue, at random among those that may be asked now. Sets n, url, anchor_fetch_url and
# anchor_transport. Status 1 when others were asked and these are not to be: they want to be left alone for a while yet,
# or the time is up. Then they are left for the next round.
anchor_fetch__choose() {
    local each ready=''
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
            anchor_fetch_pick "$@"
            n=$anchor_fetch_picked
            ;;
    esac
    first=
    anchor_fetch_without "$n" "$queue"
    queue=$anchor_fetch_rest
    IFS= read -r url <"$work/$n.url"
    anchor_fetch_plain "$url"
    anchor_stage_for_scheme "${url%%://*}"
}

# usage: anchor_fetch_pick WORD...
# Sets anchor_fetch_picked to one of the words, at random.
anchor_fetch_pick() {
    local random
    if [ $# -gt 1 ]; then
        random=$(od -An -N4 -tu4 /dev/urandom) || random=0
        shift $((random % $#))
    fi
    anchor_fetch_picked=$1
}

# usage: anchor_fetch_without WORD WORDS
# Sets anchor_fetch_rest to WORDS without WORD.
anchor_fetch_without() {
    local each
    anchor_fetch_rest=
    for each in $2; do
        [ "$each" = "$1" ] || anchor_fetch_rest="$anchor_fetch_rest $each"
    done
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
    anchor_fetch_without "$n" "$mirrors"
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

# usage: anchor_fetch__again IDLE ASKED WHY
# Whether there is another round after round; waits for it as anchor_fetch_pause does.
anchor_fetch__again() {
    [ "$round" -lt "$anchor_fetch_attempts" ] && anchor_fetch_pause "$1" "$2" "$deadline" \
        "fetching ${anchor_fetch_url##*/}: attempt $round of $anchor_fetch_attempts: $3"
}

# usage: anchor_fetch__took
# Sets anchor_fetch_took: how much of the time is gone.
anchor_fetch__took() {
    anchor_uptime_ms
    anchor_fetch_took="$(((anchor_uptime_ms - start + 500) / 1000)) s of $anchor_fetch_timeout s"
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
