#!/bin/sh
# Runs uacme for the acme stage, and says from its report why it failed and whether to try again.

# What of uacme's report matters. A shell reads a pipe byte by byte, and without this choice it would be far behind; nor does
# it get a line longer than anybody would read: the server may send one of any length.
ANCHOR_ACME_LINES='^uacme: acme_(get|post): (url=|return code [0-9]+)|^uacme: ([^a]|a[^c]|ac[^m]).{0,500}'
ANCHOR_ACME_LINES="$ANCHOR_ACME_LINES"'|^uacme: .*following error:|^[Rr]etry-[Aa]fter: [0-9]{1,20}|^    "(type|detail)": ".{0,500}'

# usage: anchor_acme__uacme ARGUMENT...
# Runs uacme once and reads its report as it comes: that tells a server that is away from one that says no, and cuts
# short uacme's own fixed waits, three times 5 s for a lost connection. Sets what anchor_acme__judge needs:
# anchor_acme__doing (the last step begun), _lost (curl's words when the connection failed), _code (the last HTTP
# status), _retry_after, _problem and _detail (the server's problem document), _last (uacme's last own message), _late.
# Half of the remaining time, but at least 30 s, is for one attempt, so a server that hangs is asked again.
anchor_acme__uacme() {
    local line client limit problem=''
    anchor_uptime_ms
    limit=$(((anchor_acme__deadline - anchor_uptime_ms) / 1000))
    if [ "$limit" -gt 60 ]; then
        limit=$((limit / 2))
    elif [ "$limit" -gt 30 ]; then
        limit=30
    elif [ "$limit" -lt 1 ]; then
        limit=1
    fi
    anchor_acme__doing='' anchor_acme__lost='' anchor_acme__code='' anchor_acme__retry_after=''
    anchor_acme__problem='' anchor_acme__detail='' anchor_acme__last='' anchor_acme__late=''
    anchor_acme__count
    anchor_acme__before=$anchor_acme__accepted
    # Opened for both ways first: an open that waits for the other end fails in busybox sh when a child ends meanwhile.
    exec 8<>"$ANCHOR_ACME_DIR/lines" || return 1
    set -- uacme -vvv -y -c "$ANCHOR_ACME_DIR/conf" -a "$anchor_acme_server" "$@"
    case " $* " in
        # Who stops it (anchor_acme__pause) has to come first, however busy the node is.
        *' -- issue '*) set -- nice -n 19 "$@" ;;
    esac
    # Since 1.7.6 uacme can be told its trust anchors; before, it reads the distribution's own file.
    UACME_CAINFO="${ANCHOR_ROOT:-}/etc/anchor/ca.pem" timeout -k 2 "$limit" "$@" </dev/null >"$ANCHOR_ACME_DIR/report" 2>&1 8>&- &
    client=$!
    grep --line-buffered -aoE "$ANCHOR_ACME_LINES" <"$ANCHOR_ACME_DIR/report" >&8 8>&- &
    exec 9<"$ANCHOR_ACME_DIR/lines" 8>&-
    while IFS= read -r line <&9; do
        case $line in
            "uacme: curl_"*" failed: "*)
                anchor_acme__lost=${line##* failed: }
                kill "$client" 2>/dev/null
                ;;
            "uacme: "*)
                problem=
                anchor_acme__uacme_says "${line#uacme: }"
                case $line in *"the server reported the following error:") problem=1 ;; esac
                ;;
            [Rr]etry-[Aa]fter:\ [0-9]*)
                anchor_acme__retry_after=${line#*: }
                anchor_acme__retry_after=${anchor_acme__retry_after%%[!0-9]*}
                ;;
            '    "type": "'*)
                [ -z "$problem" ] || anchor_acme__problem=${line#*: }
                ;;
            '    "detail": "'*)
                [ -z "$problem" ] || anchor_acme__detail=${line#*: }
                ;;
        esac
    done
    exec 9<&-
    wait "$client"
    case $? in
        0) return 0 ;;
        124 | 137) anchor_acme__late=$limit ;;
    esac
    return 1
}

# usage: anchor_acme__uacme_says MESSAGE
# Takes in one of uacme's own messages.
anchor_acme__uacme_says() {
    case $1 in
        "acme_get: url="* | "acme_post: url="*)
            anchor_acme__code='' anchor_acme__retry_after=''
            ;;
        "acme_"*": return code "*)
            anchor_acme__code=${1#*return code }
            anchor_acme__code=${anchor_acme__code%%[!0-9]*}
            ;;
        "fetching "* | "creating new "* | "retrieving "* | "starting "* | "polling "* | "finalizing "*)
            case $anchor_acme__doing/$1 in
                "starting challenge/polling challenge"*) anchor_acme__pause anchor_acme__answered ;;
                "finalizing order/polling order"*) anchor_acme__pause ;;
            esac
            anchor_acme__doing=${1%% at http*}
            ;;
        "acme_"* | "running "* | "hook "* | *" following error:" | "failed to authorize order"*) ;;
        *) anchor_acme__last=${1%% at http*} ;;
    esac
}

# usage: anchor_acme__pause [FUNCTION]
# Stops uacme before it first asks whether the server has done its part, until FUNCTION says so (at most about 2 s), six
# times in a row because servers come several times, and a moment more: an answer that comes too early is "not yet", and
# then uacme sleeps 5 s before it asks again. A server that comes from several places comes from three or more (CA/Browser
# Forum, Baseline Requirements, 3.2.2.9): where it came twice, there is one on its way, and a lost packet is sent again after a
# second.
anchor_acme__pause() {
    local left=30 quiet=0 since
    kill -STOP "-$client" 2>/dev/null || return 0
    anchor_uptime_ms
    since=$anchor_uptime_ms
    while [ -n "${1:-}" ] && [ "$left" -gt 0 ]; do
        sleep 0.05
        if "$1"; then quiet=$((quiet + 1)); else quiet=0; fi
        left=$((left - 1))
        anchor_uptime_ms
        [ "$quiet" -gt 0 ] || since=$anchor_uptime_ms
        [ "$quiet" -ge 6 ] || continue
        [ $((anchor_acme__accepted - anchor_acme__before)) -eq 2 ] || break
        [ $((anchor_uptime_ms - since)) -lt 1300 ] || break
    done
    sleep 0.1
    kill -CONT "-$client" 2>/dev/null
}

# usage: anchor_acme__answered
# Status 0 if the server has come for the answer since uacme was started, and nobody came, or is still there, since the
# look before.
anchor_acme__answered() {
    local file slot address peer state rest port=0050 had="$anchor_acme__accepted"
    [ "$anchor_acme_challenge" = http-01 ] || port=01BB
    anchor_acme__count
    [ "$anchor_acme__accepted" != "$anchor_acme__before" ] && [ "$anchor_acme__accepted" = "$had" ] || return 1
    for file in /proc/net/tcp /proc/net/tcp6; do
        while read -r slot address peer state rest; do
            # Under way is what is set up (03), established (01), or has more to send than the other side has taken (04);
            # later states may stay for seconds (include/net/tcp_states.h).
            case ${address##*:}/$state in
                "$port/0"[134]) return 1 ;;
            esac
        done 2>/dev/null <"$file"
    done
    return 0
}

# usage: anchor_acme__count
# Sets anchor_acme__accepted: how many connections this node has taken so far (PassiveOpens of /proc/net/snmp).
anchor_acme__count() {
    local name algorithm least most limit active passive rest
    anchor_acme__accepted=0
    while read -r name algorithm least most limit active passive rest; do
        case $name$passive in
            Tcp:[0-9]*) anchor_acme__accepted=$passive ;;
        esac
    done 2>/dev/null </proc/net/snmp
}

# usage: anchor_acme__final WHAT HINT
# usage: anchor_acme__again WHAT [HINT]
# What anchor_acme__judge found: no further attempt (status 1), or another may succeed (status 0).
anchor_acme__final() {
    anchor_acme__what=$1
    anchor_acme__hint=$2
    return 1
}
anchor_acme__again() {
    anchor_acme__what=$1
    anchor_acme__hint=${2:-"check the node's address, route and name server, and that the ACME server runs"}
}

# usage: anchor_acme__judge ATTEMPT
# Says why the attempt failed (anchor_acme__what, anchor_acme__hint). Status 0 if another may succeed.
anchor_acme__judge() {
    local doing="${anchor_acme__doing:-starting}" code="$anchor_acme__code" last="$anchor_acme__last"
    local directory="rd.anchor.acme.server= must be the ACME directory; many servers want a path, such as /directory"
    case $anchor_acme__lost in
        '') ;;
        *certificate* | *"CA cert"*)
            anchor_acme__final "its certificate is not trusted ($anchor_acme__lost)" \
                "the CA of $anchor_acme__host must be in the bundle given with --ca, and the node's clock must be right"
            return
            ;;
        *)
            anchor_acme__again "the connection failed while $doing: $anchor_acme__lost"
            return
            ;;
    esac
    if [ -n "$anchor_acme__problem" ]; then
        anchor_acme__judge_problem "$1"
        return
    fi
    case $anchor_acme__late/$code/$last in
        [0-9]*) anchor_acme__again "$doing did not end within $anchor_acme__late s" ;;
        *"timeout while polling"*) anchor_acme__again "$last" ;;
        *" URL in directory") anchor_acme__final "what it serves is not an ACME directory" "$directory" ;;
        *"requires external credentials"*)
            anchor_acme__final "the server wants an external account binding" \
                "get a key from the CA and set rd.anchor.acme.eab_kid= and rd.anchor.acme.eab_key="
            ;;
        *"no challenge completed")
            anchor_acme__final "the server offers no $anchor_acme_challenge challenge for this name" \
                "allow it on the server, or choose another rd.anchor.acme.challenge="
            ;;
        */5??/* | */429/* | */408/*) anchor_acme__again "HTTP status $code while $doing" ;;
        */[34]??/*) anchor_acme__final "HTTP status $code while $doing" "$directory" ;;
        *) anchor_acme__final "${last:-uacme ended without a reason} (while $doing)" "look at the ACME server's log" ;;
    esac
}

# usage: anchor_acme__judge_problem ATTEMPT
# The same for a problem document (RFC 8555, section 6.7). A challenge that the CA could not reach is tried three times,
# since a switch port may still be learning; more would only use up the CA's limits.
anchor_acme__judge_problem() {
    local kind="${anchor_acme__problem##*:}" detail="${anchor_acme__detail#\"}" port=80 what hint
    [ "$anchor_acme_challenge" = http-01 ] || port=443
    kind=${kind%%\"*}
    detail=${detail%,}
    detail=$(printf '%.300s' "${detail%\"}")
    what="$kind: ${detail:-no details} (while $anchor_acme__doing)"
    case $anchor_acme__doing/$kind/$anchor_acme__code in
        */rateLimited/* | */serverInternal/* | */badNonce/* | */orderNotReady/* | */429 | */5??)
            anchor_acme__again "$what" "the ACME server is busy or limits its clients: its log says more"
            return
            ;;
        *" challenge"*)
            what="the $anchor_acme_challenge challenge failed: $kind: $detail"
            hint="the CA must reach this node at $anchor_acme__name:$port: check the name in the CA's DNS, routes, firewalls"
            case $1/$kind in
                [12]/connection | [12]/dns | [12]/tls)
                    anchor_acme__again "$what" "$hint"
                    return
                    ;;
            esac
            ;;
        */externalAccountRequired/*) hint="get a key from the CA; set rd.anchor.acme.eab_kid= and rd.anchor.acme.eab_key=" ;;
        "creating new account"*)
            hint="check rd.anchor.acme.email="
            [ -z "${anchor_acme_eab_key:+set}" ] ||
                hint="check rd.anchor.acme.eab_kid= and eab_key=, and that the CA lets many nodes use them"
            ;;
        */badPublicKey/* | */badCSR/*) hint="choose another rd.anchor.acme.key_type=" ;;
        *) hint="allow the name in the CA's policy, or ask for another with rd.anchor.acme.domain=" ;;
    esac
    anchor_acme__final "$what" "$hint"
}
