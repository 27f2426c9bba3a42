#!/bin/sh
# Exchanges a one-time join token for the node's certificate: makes a key and a request for it, posts the request to the
# token server with the token, and keeps the certificate that comes back. doc/token.md has the protocol. The key never
# leaves the node. Everything lies in /run/anchor/token (0700) until it is whole.

# The largest answer: a chain of certificates, and credentials for S3.
ANCHOR_TOKEN_ANSWER_MAX=102400

# usage: anchor_token_run
# Reads the stage's parameters anchor_token_*. Leaves client.crt and client.key in the credentials, and s3 where the
# server gave credentials for it. Notes: from, server, attempts. Statuses 0 and 1.
anchor_token_run() {
    local status
    # rd.debug traces every command with its values; the token must not get into a log.
    { set +x; } 2>/dev/null
    umask 077
    anchor_uptime_ms
    anchor_token__deadline=$((anchor_uptime_ms + anchor_token_timeout * 1000))
    anchor_token__dir="${ANCHOR_ROOT:-}/run/anchor/token"
    rm -rf "${anchor_token__dir:?}"
    if ! mkdir -p "$anchor_token__dir"; then
        anchor_fail "cannot write to ${anchor_token__dir%/token}" "is there memory left for /run?"
        return 1
    fi
    anchor_token__find && anchor_token__join
    status=$?
    rm -rf "${anchor_token__dir:?}"
    return "$status"
}

# usage: anchor_token__join
# Everything after the token has been found.
anchor_token__join() {
    local dir="$anchor_token__dir" file="${ANCHOR_ROOT:-}$anchor_token_file" anchor_token__sends=1 rest
    rest=${anchor_token_server#*://}
    rest=${rest%%[/?]*}
    anchor_note from "$anchor_token__from"
    anchor_note server "${rest##*@}"
    anchor_info "join token: $anchor_token__from"
    anchor_token__request_file || return 1
    anchor_token__until_answered "$anchor_token_server" "$dir/answer" "$ANCHOR_TOKEN_ANSWER_MAX" "$anchor_token_proxy" ||
        return 1
    anchor_token__take_apart || return 1
    if ! anchor_credentials_whole "$dir/client.crt" cert || ! anchor_credentials_pair "$dir/client.crt" "$dir/client.key"; then
        anchor_fail "the token server's answer is of no use: $anchor_credentials_error" \
            "it must be the node's certificate with its chain, as PEM; see the token server"
        return 1
    fi
    if ! anchor_credentials_keep "$dir/client.crt" "$dir/client.key" || ! anchor_token__keep_s3; then
        anchor_fail "${anchor_credentials_error:-cannot write the S3 credentials}" "$anchor_credentials_hint"
        return 1
    fi
    # It has been used, and is of no use to anybody any more.
    [ "$anchor_token__from" != file ] || rm -f "$file" || anchor_warn "cannot remove the used token: $file"
}

# usage: anchor_token__request_file
# Makes the key and the request (PKCS #10). Its name is a wish: what counts is what the server knows of the token.
anchor_token__request_file() {
    local name="$anchor_token_name" config="$anchor_token__dir/openssl.cnf"
    [ -n "$name" ] || name=$(anchor_net_hostname) || name=
    case $name in
        *[!A-Za-z0-9.:_-]*) name= ;;
    esac
    case $anchor_token_key_type in
        ec-*) set -- -algorithm EC -pkeyopt "ec_paramgen_curve:P-${anchor_token_key_type#ec-}" -pkeyopt ec_param_enc:named_curve ;;
        *) set -- -algorithm RSA -pkeyopt "rsa_keygen_bits:${anchor_token_key_type#rsa-}" ;;
    esac
    # An initramfs has no openssl.cnf.
    if printf '[req]\ndistinguished_name = subject\n[subject]\n' >"$config" &&
        OPENSSL_CONF="$config" timeout 60 openssl genpkey "$@" -out "$anchor_token__dir/client.key" \
            </dev/null 2>"$anchor_token__dir/error" >&2 &&
        OPENSSL_CONF="$config" timeout 20 openssl req -new -config "$config" -subj "/${name:+CN=$name}" \
            -key "$anchor_token__dir/client.key" -out "$anchor_token__dir/request.pem" \
            </dev/null 2>"$anchor_token__dir/error" >&2; then
        return 0
    fi
    anchor_recall "$anchor_token__dir/error"
    anchor_fail "cannot make a key and a request for a certificate: ${anchor_recall:-openssl failed}" \
        "is openssl in the initramfs, and is there memory left for /run?"
}

# usage: anchor_token__until_answered URL FILE MAX_BYTES [PROXY]
# Asks until there is an answer or the time is over. lib/anchor-http.sh does one attempt and says why it failed; it calls
# anchor_token__request and anchor_token__refused.
anchor_token__until_answered() {
    local url="$1" file="$2" max="$3" proxy="${4:-}" expected='' attempt=1 answered left
    anchor_fetch_max=$max
    anchor_fetch_room="an answer has no more than $max bytes"
    while :; do
        anchor_uptime_ms
        left=$(((anchor_token__deadline - anchor_uptime_ms + 999) / 1000))
        [ "$left" -gt 0 ] || left=1
        # Half of the time is for one attempt, so that a server that hangs is asked again.
        [ "$left" -lt 20 ] || left=$((left / 2))
        anchor_fetch_left=$left
        anchor_fetch_error='' anchor_fetch_hint='' anchor_fetch_retry_after=''
        rm -rf "$file" "${file:?}.token"
        anchor_http_get token "$url" "$file" "$max" "$proxy"
        answered=$?
        anchor_note_number attempts "$attempt"
        case $answered in
            0) return 0 ;;
            2 | 3) ;;
            *) return 1 ;;
        esac
        if ! anchor_fetch_pause "$attempt" "${anchor_fetch_retry_after:-0}" "$anchor_token__deadline" \
            "$anchor_fetch_url: $anchor_fetch_error"; then
            anchor_fail "no answer from $anchor_fetch_url after $attempt attempts and $anchor_token_timeout s: $anchor_fetch_error" \
                "${anchor_fetch_hint:-see to the server and the network between it and this node}"
            return 1
        fi
        attempt=$((attempt + 1))
    done
}

# usage: anchor_token__request
# Prints further lines of curl's configuration: the token is no argument.
anchor_token__request() {
    [ -n "$anchor_token__sends" ] || return 0
    printf 'data-binary = "@%s"\n' "$anchor_token__dir/request.pem"
    printf 'header = "Content-Type: application/pkcs10"\nheader = "Accept: application/pem-certificate-chain"\n'
    printf 'header = "Authorization: Bearer %s"\n' "$anchor_token__token"
}

# usage: anchor_token__refused
# What the token server's statuses mean (doc/token.md). Status 1 after anchor_fail, 2 to try again, 9 for what
# anchor-http.sh says of the status.
anchor_token__refused() {
    local what="the token server answered with status $code"
    [ -n "$anchor_token__sends" ] || return 9
    case $code in
        400) anchor_fail "$what: it does not accept the request" "is rd.anchor.token.key_type one that the site's CA signs?" ;;
        401) anchor_fail "$what: it does not know this token" "was it made there, and is rd.anchor.token.server= the right one?" ;;
        403) anchor_fail "$what: this token may not be used from here or for this" "see the token server's log" ;;
        404 | 405) anchor_fail "$what: there is no token server at this URL" "check the path in rd.anchor.token.server=" ;;
        409)
            anchor_fail "$what: this token has been used before" \
                "a token is for one boot: give the node a new one. If no node of yours used it, somebody else has"
            ;;
        410) anchor_fail "$what: this token is too old" "give the node a new one" ;;
        408 | 425 | 429 | 5??)
            [ "$code" != 501 ] && [ "$code" != 505 ] || return 9
            anchor_fetch_error=$what
            anchor_fetch_hint="see the token server's own log, and how many nodes boot at once"
            anchor_fetch_retry_after=$anchor_http_retry
            return 2
            ;;
        3??) anchor_fail "$what instead of a certificate" "give the URL that it leads to in rd.anchor.token.server=" ;;
        *) return 9 ;;
    esac
}

# usage: anchor_token__take_apart
# Splits the answer: lines access_key=, secret_key= and session_token= go to the file s3, and what begins with the first
# certificate to client.crt. Nothing else may stand there.
anchor_token__take_apart() {
    local dir="$anchor_token__dir" line cr begun='' wrong=''
    cr=$(printf '\r')
    while IFS= read -r line || [ -n "$line" ]; do
        line=${line%"$cr"}
        case $begun:$line in
            :) ;;
            1:*) printf '%s\n' "$line" >&3 ;;
            ":-----BEGIN CERTIFICATE-----")
                begun=1
                printf '%s\n' "$line" >&3
                ;;
            :access_key=* | :secret_key=* | :session_token=*) printf '%s\n' "$line" >&4 ;;
            *)
                wrong=1
                break
                ;;
        esac
    done <"$dir/answer" 3>"$dir/client.crt" 4>"$dir/s3"
    [ -z "$wrong" ] && [ -n "$begun" ] && return 0
    anchor_fail "the token server's answer is no certificate" \
        "is $anchor_fetch_url a token server? Its answer must be PEM, beginning with the node's certificate"
}

# usage: anchor_token__keep_s3
# Puts the S3 credentials where the s3 transport looks for them; old ones go.
anchor_token__keep_s3() {
    local to="${ANCHOR_ROOT:-}/run/anchor/credentials/s3"
    rm -f "$to"
    [ -s "$anchor_token__dir/s3" ] || return 0
    chmod 0600 "$anchor_token__dir/s3" && mv -f "$anchor_token__dir/s3" "$to"
}
