#!/bin/sh
# Set the clock before the first TLS connection: certificates from the future fail, and a node without a battery
# wakes up in 1970. First the build time of this initramfs, which the clock cannot be before; then NTP.
#
# Needs anchor-report.sh and anchor-net.sh.
# shellcheck disable=SC2154 # anchor_recall is set by anchor_recall

# usage: anchor_clock_run
# Reads $anchor_clock_ntp (comma list of servers; empty means those that DHCP named) and $anchor_clock_timeout (seconds).
# Status 0 even when no time server answers: that is a warning, because the clock may well be right.
anchor_clock_run() {
    local servers
    anchor_clock__source=rtc
    anchor_clock__step=0
    anchor_clock__from_kernel || anchor_clock__now=
    anchor_clock__raise "$anchor_clock__now"
    servers=${anchor_clock_ntp:-}
    if [ -n "$servers" ]; then
        servers=$(
            IFS=,
            set -f
            # shellcheck disable=SC2086 # the list is meant to be split
            printf '%s\n' $servers
        )
    elif anchor_net_ntp; then
        servers=$anchor_net_ntp
    fi
    if [ -n "$servers" ]; then
        anchor_clock__ask "$servers" && anchor_clock__raise
    else
        anchor_info "no time server is known; rd.anchor.clock.ntp= or DHCP can name one"
    fi
    anchor_note source "$anchor_clock__source"
    anchor_note_number step_seconds "$anchor_clock__step"
    return 0
}

# usage: anchor_clock__raise [NOW]
# Sets the clock to the build time if it is earlier; NOW is what it is known to be. Adds to anchor_clock__step, sets
# anchor_clock__source.
anchor_clock__raise() {
    local now built
    anchor_recall "${ANCHOR_ROOT:-}/etc/anchor/build-time"
    built=$anchor_recall
    case $built in
        '' | *[!0-9]*)
            anchor_warn "/etc/anchor/build-time does not hold a time; the clock is not checked against it"
            return 0
            ;;
    esac
    [ -z "${1:-}" ] || [ "$1" -lt "$built" ] || return 0
    now=$(date -u +%s)
    [ "$now" -lt "$built" ] || return 0
    if ! date -u -s "@$built" >/dev/null; then
        anchor_warn "cannot set the clock to the time of the build"
        return 0
    fi
    anchor_clock__source=build-time
    anchor_clock__step=$((anchor_clock__step + built - now))
    anchor_info "the clock was $((built - now)) s before the build of this initramfs; raised it to that"
}

# usage: anchor_clock__from_kernel
# Sets anchor_clock__now to what the clock is, to a second: when the kernel started by it, and for how long it runs
# (proc(5)). Needs no program. The hardware's clock may be another: systemd does not believe one that is far ahead.
# Status 1 where the kernel does not say.
anchor_clock__from_kernel() {
    local key='' value=''
    anchor_clock__now=
    while read -r key value; do
        [ "$key" != btime ] || break
    done 2>/dev/null <"${ANCHOR_ROOT:-}/proc/stat"
    case $key:$value in
        btime:*[!0-9]* | btime: | [!b]*) return 1 ;;
    esac
    anchor_uptime_ms
    anchor_clock__now=$((value + anchor_uptime_ms / 1000))
}

# usage: anchor_clock__ask SERVERS
# Asks the servers, one per line, and steps the clock at once. Sets anchor_clock__source, adds to anchor_clock__step.
# Status 1 when no server answers in time or the kernel refuses the step.
# One sample is enough (0.2 s; chronyd's usual four take 4 s): TLS needs the minute, the booted system does the rest.
# An initramfs has no configuration file and no user for chronyd; a command socket would leave a /run/chrony behind
# that the booted system's own chronyd refuses, because it belongs to root.
anchor_clock__ask() {
    local servers="$1" server seconds="${anchor_clock_timeout:-8}" names='' answer wrong
    local pidfile="${ANCHOR_ROOT:-}/run/anchor/chronyd.pid"
    set --
    while read -r server; do
        set -- "$@" "server $server iburst maxsamples 1"
        names="$names $server"
    done <<EOT
$servers
EOT
    answer=$(timeout -k 1 $((seconds + 1)) chronyd -q -t "$seconds" -u root "$@" \
        'cmdport 0' 'bindcmdaddress /' "pidfile $pidfile" 2>&1)
    wrong=${answer##*System clock wrong by }
    wrong=${wrong%% *}
    case $answer in
        *'Could not step'* | *'System clock wrong by '[!0-9-]*) ;;
        *'System clock wrong by '*)
            anchor_clock__source=ntp
            anchor_clock__step=$((anchor_clock__step + ${wrong%%.*}))
            anchor_info "the clock was wrong by $wrong s; set from$names"
            return 0
            ;;
    esac
    case $answer in
        *'Could not step'*) answer='the kernel refused the new time' ;;
        *'Fatal error : '*) answer=${answer##*Fatal error : } ;;
        '' | *'chronyd version '*) answer="no usable answer within $seconds s" ;;
    esac
    anchor_warn "time servers$names: $answer; going on with the clock as it is"
    anchor_note ntp_error "$answer"
    return 1
}
