#!/bin/sh
# Posts the node's events to rd.anchor.report=, so that a site sees where each of its nodes is.
#
# The boot never waits for this: anchor_event queues each event with shell builtins alone (anchor-report.sh), and one
# process in the background, woken through a FIFO, posts what is queued as JSON lines, one request at a time. What has
# not been taken at switch_root stays in /run/anchor/report for the booted system's unit (anchor-ready.sh), so an event
# may come twice: machine, boot_id and seq tell.
#
#   next, sent   the number of the next event, and of the first one that has not been taken
#   0, 1, ...    a ring: the event with that number modulo ANCHOR_REPORT_RING, below its number
#   wake, stop   the sender's FIFO, and the file that ends it
#   request      the URL, which may hold a password: for curl's eyes only
#   error        why the last request failed; empty after a success
#   took         how long the last success took, in milliseconds
#
# Needs anchor-report.sh. curl from 7.61 on.
# shellcheck disable=SC2153 # ANCHOR_REPORT is the directory, anchor_report the URL

ANCHOR_POST_SECONDS=5 # for one request

# usage: anchor_post_open
# Begins the queue where rd.anchor.report= names a URL. Always returns 0: who watches is no reason to fail.
anchor_post_open() {
    anchor_untraced anchor_post__open
}

# usage: anchor_post__open
# The same, traced: the URL may hold a password.
anchor_post__open() {
    local LC_ALL=C
    if [ -n "${anchor_report:-}" ] && [ ! -p "$ANCHOR_REPORT/wake" ]; then
        case $anchor_report in
            *[!!-~]* | *[\"\\]*) anchor_warn "rd.anchor.report has a character that no URL has: nothing is reported" ;;
            *) anchor_post__make || anchor_warn "cannot write to $ANCHOR_REPORT: nothing is reported" ;;
        esac
    fi
    return 0
}

# usage: anchor_post__make
# The FIFO comes last: where it is, the queue is whole. An empty proxy keeps curl from the environment's.
anchor_post__make() {
    { [ -d "$ANCHOR_REPORT" ] || mkdir -m 700 "$ANCHOR_REPORT"; } &&
        (umask 077 && printf 'url = "%s"\nproxy = ""\nnoproxy = ""\n' "$anchor_report" >"$ANCHOR_REPORT/request") &&
        mkfifo -m 600 "$ANCHOR_REPORT/wake"
}

# usage: anchor_post_start
# Starts the sender unless it runs. To be called once there is a network and a clock that TLS can work with.
anchor_post_start() {
    [ -p "$ANCHOR_REPORT/wake" ] || return 0
    [ -z "${anchor_post__pid:-}" ] || ! kill -0 "$anchor_post__pid" 2>/dev/null || return 0
    [ -e "$ANCHOR_REPORT/sent" ] || printf '0\n' >"$ANCHOR_REPORT/sent"
    # Opened for both, a FIFO makes nobody wait for its other end.
    anchor_post__send <>"$ANCHOR_REPORT/wake" >/dev/null 2>&1 &
    anchor_post__pid=$!
}

# usage: anchor_post_wait MILLISECONDS
# Waits until all is taken, but no longer than that, and not at all where the last request failed or nobody sends. Where
# requests take their time it waits for three of them, if that is more, because one may be under way and the next one has
# the rest; but no longer than one may take. For the moments after which the sender is gone.
anchor_post_wait() {
    local end next most="$1"
    [ -p "$ANCHOR_REPORT/wake" ] && [ -e "$ANCHOR_REPORT/sent" ] || return 0
    anchor_recall "$ANCHOR_REPORT/took"
    anchor_recall=$((${anchor_recall:-0} * 3))
    [ "$anchor_recall" -le $((ANCHOR_POST_SECONDS * 1000)) ] || anchor_recall=$((ANCHOR_POST_SECONDS * 1000))
    [ "$anchor_recall" -le "$most" ] || most=$anchor_recall
    anchor_uptime_ms
    end=$((anchor_uptime_ms + most))
    while [ "$anchor_uptime_ms" -lt "$end" ]; do
        anchor_recall "$ANCHOR_REPORT/next"
        next=$anchor_recall
        anchor_recall "$ANCHOR_REPORT/sent"
        [ "$anchor_recall" != "$next" ] || return 0
        anchor_recall "$ANCHOR_REPORT/error"
        [ -z "$anchor_recall" ] || break
        sleep 0.05
        anchor_uptime_ms
    done
    anchor_recall "$ANCHOR_REPORT/error"
    anchor_warn "not all reports were taken${anchor_recall:+: $anchor_recall}"
}

# usage: anchor_post_end
# Ends the sender once it has nothing more to do at once.
anchor_post_end() {
    [ -p "$ANCHOR_REPORT/wake" ] || return 0
    : >"$ANCHOR_REPORT/stop"
    printf '\n' 1<>"$ANCHOR_REPORT/wake"
}

# usage: anchor_post__send <>FIFO
# The sender: posts, then sleeps until there is more; after a failure it waits a random part of a window that doubles.
anchor_post__send() {
    local window=1 random line
    while :; do
        if anchor_post_once; then
            window=1
            [ ! -e "$ANCHOR_REPORT/stop" ] || return 0
            # As many lines as there were events: those that are taken already find nothing to do.
            IFS= read -r line || return 0
        else
            [ ! -e "$ANCHOR_REPORT/stop" ] || return 0
            random=$(od -An -N2 -tu2 /dev/urandom) || random=0
            random=$((${random##* } % (window * 1000)))
            sleep $((window / 2 + random / 1000)).$((random % 1000 / 100))
            # The booted system has its own network by now, and posts what is left.
            [ ! -e "$ANCHOR_REPORT/stop" ] || return 0
            [ "$window" -ge 16 ] || window=$((window * 2))
        fi
    done
}

# usage: anchor_post_once
# Posts what is queued, in one request. Status 1 when it was not taken.
anchor_post_once() {
    local n next seq line
    anchor_recall "$ANCHOR_REPORT/next"
    next=${anchor_recall:-0}
    anchor_recall "$ANCHOR_REPORT/sent"
    n=${anchor_recall:-0}
    [ "$n" -lt "$next" ] || return 0
    [ $((next - n)) -le "$ANCHOR_REPORT_RING" ] || n=$((next - ANCHOR_REPORT_RING))
    anchor_post__identity
    while [ "$n" -lt "$next" ]; do
        seq=
        # The slot may be written at this very moment, if the ring is full.
        { IFS= read -r seq && IFS= read -r line; } <"$ANCHOR_REPORT/$((n % ANCHOR_REPORT_RING))" &&
            [ "$seq" = "$n" ] && printf '{%s,"seq":%d,%s\n' "$anchor_post__identity" "$n" "${line#?}"
        n=$((n + 1))
    done 2>/dev/null >"$ANCHOR_REPORT/batch" || return 1
    [ ! -s "$ANCHOR_REPORT/batch" ] || anchor_post__curl || return 1
    printf '%s\n' "$n" >"$ANCHOR_REPORT/sent"
    : >"$ANCHOR_REPORT/error"
}

# usage: anchor_post__identity
# Sets anchor_post__identity: which node this is, and which of its boots, as members of a JSON object.
anchor_post__identity() {
    if [ -z "${anchor_post__machine:-}" ]; then
        anchor_post__boot=$(cat /proc/sys/kernel/random/boot_id)
        anchor_post__machine
    fi
    anchor_recall "$ANCHOR_RUN/steps/node"
    anchor_json "$anchor_recall"
    anchor_post__identity="\"node\":$anchor_json"
    anchor_json "$anchor_post__machine"
    anchor_post__identity="$anchor_post__identity,\"machine\":$anchor_json,\"boot_id\":\"$anchor_post__boot\""
}

# usage: anchor_post__machine
# Sets anchor_post__machine to what stays when the node's name changes: the UUID that the firmware gives, or the address
# of the first network card. Firmware without a UUID shows text, or the same digit everywhere.
anchor_post__machine() {
    local file digits
    anchor_recall "${ANCHOR_ROOT:-}/sys/class/dmi/id/product_uuid"
    digits=$anchor_recall
    case $digits in
        *[!0-9A-Fa-f-]* | 00000000-0000-0000-0000-000000000000 | [Ff][Ff][Ff][Ff][Ff][Ff][Ff][Ff]-[Ff][Ff][Ff][Ff]-*) ;;
        ????????-????-????-????-????????????)
            anchor_post__machine=$digits
            return 0
            ;;
    esac
    for file in "${ANCHOR_ROOT:-}"/sys/class/net/*/address; do
        # Only what is made of something has this link: no lo, no bridge.
        [ -e "${file%/*}/device" ] || continue
        anchor_recall "$file"
        anchor_post__machine=$anchor_recall
        return 0
    done
    anchor_post__machine=unknown
}

# usage: anchor_post__curl
# Makes one request with the batch, with the client certificate once there is one. Status 0 when the server took it;
# else why it did not is in error.
anchor_post__curl() {
    local began ca="$ANCHOR_REPORT/ca.pem" code text='' credentials="$ANCHOR_RUN/credentials"
    # In the booted system there is only the copy.
    [ -e "$ca" ] || ca="${ANCHOR_ROOT:-}/etc/anchor/ca.pem"
    set -- --silent --show-error --globoff --http1.1 --tlsv1.2 --proto '=https,http' \
        --connect-timeout "$ANCHOR_POST_SECONDS" --max-time "$ANCHOR_POST_SECONDS" \
        --header 'Content-Type: application/x-ndjson' --header 'Expect:' --data-binary "@$ANCHOR_REPORT/batch" \
        --cacert "$ca" --capath "$ANCHOR_REPORT/no-other-authorities" \
        --output /dev/null --write-out '%{http_code}' --config "$ANCHOR_REPORT/request"
    if [ -s "$credentials/client.crt" ] && [ -s "$credentials/client.key" ]; then
        set -- "$@" --cert "$credentials/client.crt" --key "$credentials/client.key"
    fi
    anchor_uptime_ms
    began=$anchor_uptime_ms
    code=$(curl --disable "$@" </dev/null 2>"$ANCHOR_REPORT/curl")
    case $?:$code in
        0:2??)
            anchor_uptime_ms
            anchor_keep "$ANCHOR_REPORT/took" $((anchor_uptime_ms - began))
            return 0
            ;;
        0:*) text="the server answered with status $code" ;;
        127:*) text="curl is missing" ;;
        *) IFS= read -r text <"$ANCHOR_REPORT/curl" ;;
    esac
    anchor_keep "$ANCHOR_REPORT/error" "${text:-curl failed}"
    return 1
}
