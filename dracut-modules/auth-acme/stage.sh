#!/bin/sh
# Gets the node's certificate from an ACME server (RFC 8555) with uacme.
#
# The stage starts a responder for the challenge (socat on port 80, or ualpn on port 443), lets uacme make an account
# and an order (anchor-acme.sh), and ends the responder on every way out. Everything lies in /run/anchor/acme (0700)
# until it is whole, then moves to /run/anchor/credentials.

# usage: anchor_acme_run
# Reads the stage's parameters anchor_acme_*. Leaves client.crt, client.key and acme-account.key (0600; the booted
# system renews with it) in the credentials. Notes: name, server, challenge, attempts. Statuses 0 and 1.
anchor_acme_run() {
    local status
    # rd.debug traces every command with its values; the binding key must not get into a log.
    { set +x; } 2>/dev/null
    umask 077
    anchor_uptime_ms
    anchor_acme__start=$anchor_uptime_ms
    anchor_acme__deadline=$((anchor_uptime_ms + anchor_acme_timeout * 1000))
    anchor_acme__responder=
    anchor_acme__settings || return 1
    anchor_note name "$anchor_acme__name"
    anchor_note server "$anchor_acme__host"
    anchor_note challenge "$anchor_acme_challenge"
    export ANCHOR_ACME_DIR="${ANCHOR_ROOT:-}/run/anchor/acme" ANCHOR_ACME_CHALLENGE="$anchor_acme_challenge"
    [ ! -e "$ANCHOR_ACME_DIR" ] || rm -rf "${ANCHOR_ACME_DIR:?}"
    if ! mkdir -p "$ANCHOR_ACME_DIR/conf" || ! mkfifo "$ANCHOR_ACME_DIR/report" "$ANCHOR_ACME_DIR/lines"; then
        anchor_fail "cannot write to ${ANCHOR_ACME_DIR%/acme}" "is there memory left for /run?"
        return 1
    fi
    anchor_acme__respond && anchor_acme__attempts && anchor_acme__keep
    status=$?
    anchor_acme__responder_end
    rm -rf "${ANCHOR_ACME_DIR:?}"
    return "$status"
}

# usage: anchor_acme__settings
# Sets anchor_acme__name (whom the certificate is for), anchor_acme__host (the server, for messages), and refuses what
# uacme would refuse late or would put into its JSON as it is.
anchor_acme__settings() {
    anchor_acme__host=${anchor_acme_server#*://}
    anchor_acme__host=${anchor_acme__host%%[/?#]*}
    anchor_acme__host=${anchor_acme__host##*@}
    anchor_acme__name=$anchor_acme_domain
    [ -n "$anchor_acme__name" ] || anchor_acme__name=$(anchor_net_hostname) || anchor_acme__name=
    case $anchor_acme__name in
        '')
            anchor_fail "the node has no name to ask a certificate for" \
                "set rd.anchor.acme.domain=, or give the node a name by DHCP, ip= or systemd.hostname="
            return 1
            ;;
        *.* | *:*) ;;
        *)
            anchor_fail "the name $anchor_acme__name has no domain, so no ACME server can check it" \
                "set rd.anchor.acme.domain= to the full name, or give the node its domain by DHCP"
            return 1
            ;;
    esac
    case $anchor_acme_email in
        *[\"\\]*)
            anchor_fail "rd.anchor.acme.email is not a plain address" "it must not contain quotes or backslashes"
            return 1
            ;;
    esac
    anchor_acme__settings_eab
}

# usage: anchor_acme__settings_eab
# Checks the external account binding, and takes the padding off its key.
anchor_acme__settings_eab() {
    local hint="give both, as the CA issued them: the identifier, and the key as base64url"
    if [ -z "${anchor_acme_eab_kid:+set}${anchor_acme_eab_key:+set}" ]; then return 0; fi
    while [ "${anchor_acme_eab_key%=}" != "$anchor_acme_eab_key" ]; do
        anchor_acme_eab_key=${anchor_acme_eab_key%=}
    done
    case $anchor_acme_eab_kid in
        '' | *[:\"\\]*)
            anchor_fail "rd.anchor.acme.eab_kid is missing, or contains a colon, quote or backslash" "$hint"
            return 1
            ;;
    esac
    case $anchor_acme_eab_key in
        '' | *[!A-Za-z0-9_-]*)
            anchor_fail "rd.anchor.acme.eab_key is missing or is not base64url" "$hint"
            return 1
            ;;
    esac
}

# usage: anchor_acme__respond
# Starts the challenge's responder, which comes up while the account is made. timeout(1) makes sure that it ends even if
# this shell is killed.
anchor_acme__respond() {
    local port=80 user=''
    anchor_acme__hex=0050
    [ "$anchor_acme_challenge" = http-01 ] || port=443 anchor_acme__hex=01BB
    if anchor_acme__listening "$anchor_acme__hex"; then
        anchor_fail "port $port is already in use on the node: no way to answer the $anchor_acme_challenge challenge" \
            "end what listens there, or choose another rd.anchor.acme.challenge="
        return 1
    fi
    if [ "$port" = 80 ]; then
        anchor_acme__respond_http
        return
    fi
    # ualpn parses what strangers send: it gives up root where the initramfs has a user for that.
    while read -r user; do
        case $user in nobody:*) break ;; esac
    done 2>/dev/null <"${ANCHOR_ROOT:-}/etc/passwd"
    anchor_acme__respond_tls ${user:+-u nobody}
}

# usage: anchor_acme__responds
# Waits until the responder answers. Status 1, explained, if it does not.
anchor_acme__responds() {
    local port=80
    if [ "$anchor_acme_challenge" = http-01 ]; then
        anchor_acme__respond_wait 2 && return 0
    else
        port=443
        anchor_acme__respond_wait 3 && return 0
        anchor_acme__responder_end
        # As root then, if there is a user whom it cannot become.
        anchor_acme__respond_tls
        anchor_acme__respond_wait 3 && return 0
    fi
    anchor_fail "cannot listen on port $port to answer the $anchor_acme_challenge challenge" \
        "are socat, ualpn and the loopback network in the initramfs?"
}

# usage: anchor_acme__respond_http
# Gives the one answer there is to whoever connects and has asked something: what a stranger sends is read up to its
# first line and never looked at. (Answering before the request comes is an error to clients written in Go, as most CAs
# are.) sed does that without a shell around it: every program that starts delays the CA's answer. Before there is an
# answer, connections are closed. One socket for IPv6 and IPv4, or IPv4 alone where the kernel has no IPv6. A request is
# at most 4096 bytes and 5 s.
anchor_acme__respond_http() {
    local listen='TCP4-LISTEN:80'
    [ ! -e /proc/net/if_inet6 ] || listen='TCP6-LISTEN:80,ipv6-v6only=0'
    timeout -k 1 "$((anchor_acme_timeout + 5))" socat -T 5 -t 2 \
        "$listen,fork,reuseaddr,max-children=32,readbytes=4096" \
        "EXEC:sed -n -e 1r$ANCHOR_ACME_DIR/answer -e 1q" </dev/null >/dev/null 2>&1 &
    anchor_acme__responder=$!
}

# usage: anchor_acme__respond_tls [OPTION...]
# ualpn proxies what is no challenge to a backend and insists on having one: port 9 of loopback, where nothing listens.
anchor_acme__respond_tls() {
    timeout -k 1 "$((anchor_acme_timeout + 5))" ualpn -s "$ANCHOR_ACME_DIR/ualpn.sock" -p "$ANCHOR_ACME_DIR/ualpn.pid" \
        -n 1 -m 4 -P 0 -c 127.0.0.1@9 "$@" </dev/null >/dev/null 2>&1 &
    anchor_acme__responder=$!
}

# usage: anchor_acme__respond_wait PROCESSES
# Waits up to 5 s until the responder listens and has its processes: ualpn closes what comes before it has a worker,
# which it starts 0.1 s after it listens. Status 1 if the responder ended or is late.
anchor_acme__respond_wait() {
    local tries=100
    while [ "$tries" -gt 0 ] && kill -0 "$anchor_acme__responder" 2>/dev/null; do
        if anchor_acme__listening "$anchor_acme__hex" && anchor_acme__grown "$1"; then return 0; fi
        sleep 0.05
        tries=$((tries - 1))
    done
    return 1
}

# usage: anchor_acme__grown PROCESSES
# Status 0 if the responder's process group, which timeout(1) leads, has that many.
anchor_acme__grown() {
    local file pid name state parent group rest count=0
    for file in /proc/[0-9]*/stat; do
        { read -r pid name state parent group rest; } 2>/dev/null <"$file" || continue
        [ "$group" != "$anchor_acme__responder" ] || count=$((count + 1))
    done
    [ "$count" -ge "$1" ]
}

# usage: anchor_acme__listening PORT-IN-HEX
# Status 0 if something listens on the TCP port (state 0A), on whatever address.
anchor_acme__listening() {
    local file slot address peer state rest
    for file in /proc/net/tcp /proc/net/tcp6; do
        [ -r "$file" ] || continue
        while read -r slot address peer state rest; do
            case ${address##*:}/$state in "$1/0A") return 0 ;; esac
        done <"$file"
    done
    return 1
}

# usage: anchor_acme__responder_end
# Kills the whole process group, which timeout(1) leads: there is nothing to save, and ualpn 1.7.4 sometimes hangs when
# it and its worker are told to end at the same time.
anchor_acme__responder_end() {
    [ -n "$anchor_acme__responder" ] || return 0
    kill -KILL "-$anchor_acme__responder" 2>/dev/null || kill -KILL "$anchor_acme__responder" 2>/dev/null
    wait "$anchor_acme__responder" 2>/dev/null
    anchor_acme__responder=
}

# usage: anchor_acme__attempts
# Tries until there is a certificate, the server says no, or the time is up.
anchor_acme__attempts() {
    local attempt=0 wait failed="no certificate for $anchor_acme__name from $anchor_acme__host"
    anchor_acme__account=
    while :; do
        attempt=$((attempt + 1))
        anchor_note_number attempts "$attempt"
        anchor_acme__mute=
        anchor_acme__order && return 0
        # What cannot pass has been said.
        [ -z "$anchor_acme__mute" ] || return 1
        if ! anchor_acme__judge "$attempt"; then
            anchor_fail "$failed: $anchor_acme__what" "$anchor_acme__hint"
            return 1
        fi
        if ! anchor_acme__backoff "$attempt"; then
            anchor_fail "$failed (attempts: $attempt, seconds: $(((anchor_uptime_ms - anchor_acme__start) / 1000))\
 of $anchor_acme_timeout): $anchor_acme__what" "$anchor_acme__hint"
            return 1
        fi
        wait=$((anchor_acme__wait / 1000)).$((anchor_acme__wait % 1000 / 100))
        anchor_warn "$anchor_acme__host: $anchor_acme__what; trying again in $wait s"
        sleep "$wait"
    done
}

# usage: anchor_acme__backoff ATTEMPT
# Sets anchor_acme__wait in ms: full jitter, 0 to min(60, 2^ATTEMPT) s, on top of what the server asked for (at most
# 120 s). Status 1 if that leaves less than a second for the next attempt. The kernel's random uuid needs no program.
anchor_acme__backoff() {
    local most=60000 asked=0 left random
    [ "$1" -ge 6 ] || most=$((1000 << $1))
    case $anchor_acme__retry_after in
        '' | 0* | ?????*) ;;
        *) asked=$anchor_acme__retry_after ;;
    esac
    [ "$asked" -le 120 ] || asked=120
    anchor_uptime_ms
    left=$((anchor_acme__deadline - anchor_uptime_ms - asked * 1000 - 1000))
    [ "$left" -gt 0 ] || return 1
    [ "$most" -le "$left" ] || most=$left
    random=$(cat /proc/sys/kernel/random/uuid)
    anchor_acme__wait=$((asked * 1000 + 0x${random%%-*} % most))
}

# usage: anchor_acme__order
# One attempt: an account unless there is one, then an order for the name. The account's key is always EC P-256, which
# every server takes and a node makes at once; rd.anchor.acme.key_type is about the certificate's.
anchor_acme__order() {
    local bits="${anchor_acme_key_type#*-}" type=RSA
    [ "${anchor_acme_key_type%%-*}" != ec ] || type=EC
    if [ -z "$anchor_acme__account" ]; then
        anchor_acme__new_account || return 1
        anchor_acme__account=made
    fi
    if ! anchor_acme__responds; then
        anchor_acme__mute=1
        return 1
    fi
    anchor_acme__uacme -t "$type" -b "$bits" -h "${ANCHOR_ROOT:-}/usr/lib/anchor/acme-challenge" \
        -- issue "$anchor_acme__name"
}

# usage: anchor_acme__new_account
# uacme takes the binding key as an argument and in no other way. While it runs, /proc hides the arguments of root's
# processes from everybody else (hidepid=2); root can read the key's file anyway.
anchor_acme__new_account() {
    local status hidden=''
    set -- -t EC -b 256
    if [ -n "${anchor_acme_eab_key:+set}" ]; then
        set -- "$@" -e "$anchor_acme_eab_kid:$anchor_acme_eab_key"
        case $(cat /proc/mounts) in
            *hidepid=*) ;;
            *)
                if mount -o remount,nosuid,nodev,noexec,hidepid=2 /proc 2>/dev/null; then
                    hidden=1
                else
                    anchor_warn "cannot hide uacme's arguments: others on this node may see the binding key for a moment"
                fi
                ;;
        esac
    fi
    anchor_acme__uacme "$@" -- new ${anchor_acme_email:+"$anchor_acme_email"}
    status=$?
    [ -z "$hidden" ] || mount -o remount,nosuid,nodev,noexec,hidepid=0 /proc 2>/dev/null
    case $anchor_acme__last in
        # An earlier attempt was cut off after the server had made it.
        "Account already exists"*) return 0 ;;
    esac
    return "$status"
}

# usage: anchor_acme__keep
# Moves the finished files into the credentials: the certificate last, so where it is, its key is too.
anchor_acme__keep() {
    local conf="$ANCHOR_ACME_DIR/conf" to="${ANCHOR_ROOT:-}/run/anchor/credentials" name="$anchor_acme__name"
    anchor_acme__text "$conf/$name/cert.pem"
    case $anchor_acme__text in
        *"-----BEGIN CERTIFICATE-----"*"-----END CERTIFICATE-----"*) ;;
        *)
            anchor_fail "what $anchor_acme__host issued for $name is not a certificate in PEM form" "look at the CA's log"
            return 1
            ;;
    esac
    # The umask makes it 0700.
    if { [ -d "$to" ] || mkdir -p "$to"; } &&
        anchor_remove "$to/client.crt" "$to/client.key" "$to/acme-account.key" &&
        anchor_acme__put "$conf/private/key.pem" "$to/acme-account.key" &&
        anchor_acme__put "$conf/private/$name/key.pem" "$to/client.key" &&
        anchor_acme__put "$conf/$name/cert.pem" "$to/client.crt"; then
        anchor_info "certificate for $name from $anchor_acme__host"
        return 0
    fi
    anchor_fail "cannot write the certificate to $to" "is there memory left for /run?"
}

# usage: anchor_acme__put FROM TO
# Copies some lines of text, without a program; the umask is 077. What was written is read again, because /run may be full.
anchor_acme__put() {
    local text
    anchor_acme__text "$1"
    text=$anchor_acme__text
    printf '%s' "$text" >"$2" || return 1
    anchor_acme__text "$2"
    [ -n "$text" ] && [ "$anchor_acme__text" = "$text" ]
}

# usage: anchor_acme__text FILE
# Sets anchor_acme__text to the lines of the file, each ended; to nothing where they are too many.
anchor_acme__text() {
    local line
    anchor_acme__text=
    [ -r "$1" ] || return 0
    # A chain of certificates is a tenth of this; a shell would take very long for much more.
    while [ "${#anchor_acme__text}" -le 102400 ] && { IFS= read -r line || [ -n "$line" ]; }; do
        anchor_acme__text="$anchor_acme__text$line
"
    done <"$1"
    [ "${#anchor_acme__text}" -le 102400 ] || anchor_acme__text=
}
