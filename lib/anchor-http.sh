#!/bin/sh
# One attempt to fetch over HTTP or HTTPS with curl, from 7.61 on: what the transports that speak HTTP share. The node
# proves itself with the certificate that auth left, if any, and believes servers by /etc/anchor/ca.pem alone. URL,
# proxy and headers may hold secrets, so they reach curl in a file that only root can read, and what is said about them
# leaves out users, passwords and queries.

ANCHOR_HTTP_REDIRECTS=5
# How many seconds a refusal may take to be explained.
ANCHOR_HTTP_BODY_LIMIT=10
ANCHOR_HTTP_HEADERS=307200 # bytes of one answer's, and of those that led to it; curl's own limit, from 8.3 on

# usage: anchor_http_get STAGE URL FILE MAX_BYTES [PROXY]
# The attempt of the transport STAGE, whose parameters messages name. Status: 0 whole, 1 permanent failure, 2 try again,
# 3 start from zero (see anchor-fetch.sh). Keeps in FILE.STAGE what a later attempt at this URL needs to go on: the
# file's size, and its ETag or date as the validator of its version. The helpers below share these locals. A transport
# may have anchor_STAGE__request, which prints further lines of curl's configuration, and anchor_STAGE__refused, which
# explains the HTTP status in code: it answers as a transport does, or 9 to leave it to what is here.
# With anchor_http_stay, which a transport may set, no redirect is followed: of headers, curl keeps only Authorization and
# Cookie from other hosts.
anchor_http_get() {
    local stage="$1" url="$2" file="$3" max="$4" proxy="${5:-}" state="$3.$1"
    local credentials="${ANCHOR_ROOT:-}/run/anchor/credentials"
    local offset size='' validator='' code status text=''
    anchor_fetch_plain "$url"
    anchor_fetch_size "$file"
    offset=$anchor_fetch_size
    if ! anchor_http__ready; then
        anchor_fail "cannot prepare the request for $anchor_fetch_url" \
            "the URL and rd.anchor.$stage.proxy may have no blanks, quotes or backslashes"
        return 1
    fi
    if [ "$offset" -gt 0 ]; then
        anchor_http__recall
        [ "$size" != "$offset" ] || return 0
        anchor_fetch_error="what is here cannot be resumed"
        [ -n "$validator$anchor_fetch_verified" ] || return 3
    fi
    if [ "$offset" -ge "$max" ]; then
        anchor_fetch_too_large ''
        return 1
    fi
    anchor_http__curl
    status=$?
    anchor_http__answer "$state/headers"
    [ ! -s "$state/error" ] || IFS= read -r text <"$state/error"
    text=${text#"curl: ("*") "}
    anchor_fetch_size "$file"
    anchor_fetch_sized=1
    anchor_http__judge
}

# usage: anchor_http_size STAGE FILE
# Sets anchor_fetch_total to the size that FILE will have, or to nothing while no answer has come.
anchor_http_size() {
    anchor_http__answer "$2.$1/headers"
    anchor_fetch_total=$anchor_http_total
}

# usage: anchor_http__ready
# Makes the state directory; refuses what would not stay one value in curl's configuration.
anchor_http__ready() {
    local LC_ALL=C
    case $url$proxy in
        *[!!-~]* | *[\"\\]*) return 1 ;;
    esac
    [ -d "$state" ] || mkdir -m 700 "$state"
}

# usage: anchor_http__recall
# Sets size and validator to what anchor_http__remember kept, if it was of this URL: each mirror names versions its own
# way.
anchor_http__recall() {
    local of=''
    [ -r "$state/version" ] || return 0
    {
        IFS= read -r of
        IFS= read -r size
        IFS= read -r validator
    } <"$state/version"
    [ "$of" != "$url" ] || return 0
    size=
    validator=
}

# usage: anchor_http__remember
# Keeps which version of the file the answer was, for later attempts. The state directory is private: a URL may be secret.
anchor_http__remember() {
    size=$anchor_http_total
    validator=$anchor_http_validator
    printf '%s\n%s\n%s\n' "$url" "$size" "$validator" >"$state/version"
}

# usage: anchor_http__request
# Prints the part of curl's configuration that may hold secrets. An empty proxy keeps curl from the environment's:
# unknown words of the kernel command line end up there.
anchor_http__request() {
    local tag
    printf 'url = "%s"\nproxy = "%s"\nnoproxy = ""\n' "$url" "$proxy"
    case $validator in
        '') ;;
        \"*)
            tag=${validator#\"}
            printf 'header = "If-Range: \\"%s\\""\n' "${tag%\"}"
            ;;
        *) printf 'header = "If-Range: %s"\n' "$validator" ;;
    esac
    ! command -v "anchor_${stage}__request" >/dev/null || "anchor_${stage}__request"
}

# usage: anchor_http__curl
# Runs curl. Sets code to the HTTP status ("000" without one); headers and messages are in the state directory.
# Status: curl's.
anchor_http__curl() {
    local redirects=$ANCHOR_HTTP_REDIRECTS
    anchor_remove "$state/headers" "$state/error" || return 23
    (umask 077 && anchor_http__request >"$state/request") || return 23
    [ -z "${anchor_http_stay:-}" ] || redirects=0
    set -- --fail --output "$file" --dump-header - \
        --location --max-redirs "$redirects" --max-time "$anchor_fetch_left" \
        --speed-limit 1024 --speed-time "$anchor_fetch_stall" --max-filesize $((max - offset)) --write-out '\n%{http_code}'
    [ "$offset" -eq 0 ] || set -- "$@" --continue-at "$offset"
    # curl before 8.4 counts only announced sizes against --max-filesize: the kernel has to stop the others.
    code=$(
        {
            (
                trap '' XFSZ
                ulimit -f $(((max + 511) / 512)) 2>/dev/null
                anchor_pid
                anchor_keep "$state/pid" "$anchor_pid"
                anchor_http__exec "$@" 2>"$state/error"
            )
            printf ' %s' "$?"
        } 2>/dev/null | anchor_http__heed "$state"
    )
    status=${code##* }
    code=${code%% *}
    case $status:$redirects in
        # A redirect is then an answer like any other; with --location, curl has kept nothing of it.
        47:0) status=0 ;;
        :* | *[!0-9:]*)
            status=56
            printf 'who read its headers was killed\n' >"$state/error"
            ;;
    esac
    if [ "$code" = excess ]; then
        code=000
        printf 'more than %s bytes of headers\n' "$ANCHOR_HTTP_HEADERS" >"$state/error"
    fi
    return "$status"
}

# usage: anchor_http__heed DIR <PIPE
# Keeps header lines in DIR/headers as they come, and prints what comes last and is no line: the HTTP status and curl's own;
# or "excess 56" where there are too many. curl 7.88 limits no trailers of a chunked answer, and older ones no headers: all
# would be in memory, there and with curl. That goes on though nobody reads, so the process in DIR/pid is ended.
anchor_http__heed() {
    local LC_ALL=C line='' size=0
    while IFS= read -r line; do
        size=$((size + ${#line} + 1))
        [ "$size" -le "$ANCHOR_HTTP_HEADERS" ] || break
        printf '%s\n' "$line"
    done >"$1/headers"
    if [ "$size" -gt "$ANCHOR_HTTP_HEADERS" ]; then
        anchor_recall "$1/pid"
        [ -z "$anchor_recall" ] || kill "$anchor_recall" 2>/dev/null
        line='excess 56'
    fi
    printf '%s' "$line"
}

# usage: anchor_http__ciphers
# Sets anchor_http_ciphers: TLS 1.3's, the cheapest first, since an image is large. AES-256 costs a fifth more than AES-128,
# and without instructions for AES both cost more than ChaCha20. Where these instructions are emulated, as all that work
# on several numbers at once, they are the slowest of all: OpenSSL is told to do without (SSSE3, AVX and AVX2; see
# OPENSSL_ia32cap(3)), and then ChaCha20 takes a fourth of the time.
anchor_http__ciphers() {
    local aes=TLS_AES_128_GCM_SHA256 chacha=TLS_CHACHA20_POLY1305_SHA256
    anchor_fetch_processor
    if [ -n "$anchor_fetch_emulated" ]; then
        export OPENSSL_ia32cap='~0x1000020000000000:~0x20'
    fi
    if [ -z "$anchor_fetch_emulated" ] && anchor_fetch_processor_has aes aes; then
        anchor_http_ciphers=$aes:$chacha
    else
        anchor_http_ciphers=$chacha:$aes
    fi
    anchor_http_ciphers=$anchor_http_ciphers:TLS_AES_256_GCM_SHA384
}

# usage: anchor_http__exec OPTION...
# Becomes curl, with what every request has and the OPTIONs.
anchor_http__exec() {
    local protocols='=https'
    case $url in
        [Hh][Tt][Tt][Pp]:*) protocols='=http,https' ;;
    esac
    anchor_http__ciphers
    set -- --silent --show-error --globoff --http1.1 --tlsv1.2 --tls13-ciphers "$anchor_http_ciphers" --write-out '%{http_code}' \
        --config "$state/request" --proto "$protocols" --proto-redir "$protocols" \
        --connect-timeout "$anchor_fetch_connect_timeout" \
        --cacert "${ANCHOR_ROOT:-}/etc/anchor/ca.pem" --capath "$state/no-other-authorities" "$@"
    if [ -s "$credentials/client.crt" ] && [ -s "$credentials/client.key" ]; then
        set -- "$@" --cert "$credentials/client.crt" --key "$credentials/client.key"
    fi
    exec curl --disable "$@"
}

# usage: anchor_http_error_body
# For a transport's __refused: asks once more for what was refused, for the text of the answer, which --fail leaves out.
# Sets anchor_http_body to it, or to nothing where it is larger than 64 KiB or there is another answer now.
anchor_http_error_body() {
    local body="$state/body" again line
    anchor_http_body=
    rm -f "$body"
    again=$(
        trap '' XFSZ
        ulimit -f 128 2>/dev/null
        # Headers without an end. curl takes a fifth of this.
        # shellcheck disable=SC3045 # dash, bash and busybox sh have it
        ulimit -v 131072 2>/dev/null
        anchor_http__exec --output "$body" --max-time "$ANCHOR_HTTP_BODY_LIMIT" --max-filesize 65536 --range 0-65535 2>/dev/null
    )
    [ "$?:$again" = "0:$code" ] && [ -r "$body" ] || return 0
    # What explains comes first, and 64 KiB of empty lines would take a shell many seconds.
    while [ "${#anchor_http_body}" -lt 16384 ] && { IFS= read -r line || [ -n "$line" ]; }; do
        anchor_http_body="$anchor_http_body$line "
    done <"$body"
}

# usage: anchor_http__answer FILE
# Reads the headers of the last answer in FILE. Sets anchor_http_total (the whole file's size), anchor_http_validator
# (for If-Range), anchor_http_retry (seconds), anchor_http_date (the server's clock), anchor_http_framed (1 if the answer
# says where it ends) and anchor_http_encoding. What is absent, or not what it should be, is empty.
anchor_http__answer() {
    local line value cr etag='' date='' retry=''
    cr=$(printf '\r')
    anchor_http_total=
    anchor_http_framed=
    anchor_http_encoding=
    anchor_http_date=
    if [ -r "$1" ]; then
        while IFS= read -r line; do
            line=${line%"$cr"}
            value=${line#*:}
            value=${value#"${value%%[! ]*}"}
            case $line in
                # Answers of proxies and redirects come first.
                HTTP/*) anchor_http_total='' anchor_http_framed='' anchor_http_encoding='' etag='' date='' retry='' ;;
                [Cc]ontent-[Ll]ength:*)
                    anchor_http_framed=1
                    anchor_http_total=${anchor_http_total:-$value}
                    ;;
                [Cc]ontent-[Rr]ange:*/*) anchor_http_total=${value##*/} ;;
                [Tt]ransfer-[Ee]ncoding:*) anchor_http_framed=1 ;;
                [Cc]ontent-[Ee]ncoding:*) [ "$value" = identity ] || anchor_http_encoding=$value ;;
                [Ee][Tt]ag:*) etag=$value ;;
                [Ll]ast-[Mm]odified:*) date=$value ;;
                [Rr]etry-[Aa]fter:*) retry=$value ;;
                [Dd]ate:*) anchor_http_date=$value ;;
            esac
        done <"$1"
    fi
    anchor_http__number "$anchor_http_total"
    anchor_http_total=$anchor_http_number
    anchor_http__validator "$etag" "$date"
    anchor_http__retry "$retry"
}

# usage: anchor_http__number TEXT
# Sets anchor_http_number: TEXT as a decimal number without leading zeros, or nothing where it is none below 10^15.
anchor_http__number() {
    anchor_http_number=${1#"${1%%[!0]*}"}
    case $anchor_http_number in
        *[!0-9]* | ????????????????*) anchor_http_number= ;;
        '') anchor_http_number=${1:+0} ;;
    esac
}

# usage: anchor_http__validator ETAG DATE
# Sets anchor_http_validator: the strong ETag, else the date, else nothing. Neither may break out of a header.
anchor_http__validator() {
    local tag="${1#\"}" LC_ALL=C
    tag=${tag%\"}
    anchor_http_validator=
    case $tag in
        '' | *[!!-~]* | *[\"\\]*) ;;
        *) [ "$1" != "\"$tag\"" ] || anchor_http_validator=$1 ;;
    esac
    case $2 in
        *[!A-Za-z0-9,:\ ]*) ;;
        *) anchor_http_validator=${anchor_http_validator:-$2} ;;
    esac
}

# usage: anchor_http__retry VALUE
# Sets anchor_http_retry: the seconds that a Retry-After header asks for; it may be a number or a date.
anchor_http__retry() {
    local at
    anchor_http__number "$1"
    anchor_http_retry=$anchor_http_number
    case $1 in
        *[!A-Za-z0-9,:\ ]*) ;;
        *[A-Z]*:*)
            at=$(date -u -d "$1" +%s 2>/dev/null) || return 0
            anchor_http_retry=$((at - $(date -u +%s)))
            [ "$anchor_http_retry" -ge 0 ] || anchor_http_retry=0
            ;;
    esac
}

# usage: anchor_http__judge
# Decides what the attempt came to, from code, status and the answer. Statuses of anchor_http_get.
anchor_http__judge() {
    case $code:$status in
        200:* | 206:*) anchor_http__received ;;
        416:*)
            # Where the first answer named no size, only this one tells that nothing was missing.
            [ "$anchor_http_total" = "$offset" ] ||
                anchor_http__again "the file on the server is shorter than what is here"
            ;;
        [45]??:* | 3??:0) anchor_http__refused ;;
        000:0) anchor_http__again "$anchor_fetch_url answered with something that is not HTTP" "is the port right?" ;;
        *:0) anchor_fail "$anchor_fetch_url answered with status $code instead of the file" "check the URL" ;;
        *) anchor_http__broken ;;
    esac
}

# usage: anchor_http__received
# At least some of the file came.
anchor_http__received() {
    if [ "$code:$offset" = 200:0 ]; then
        anchor_http__remember
    elif ! anchor_http__same_version; then
        anchor_http__again "the file changed on the server, or the server cannot resume"
        return
    elif [ -z "$validator" ]; then
        anchor_http__remember
    fi
    [ -z "$anchor_http_encoding" ] ||
        anchor_warn "$anchor_fetch_url comes in an encoding ($anchor_http_encoding): the server should send the file as it is"
    if [ "$status" -eq 0 ] && [ -z "$size" ]; then
        [ -n "$anchor_http_framed" ] ||
            anchor_warn "the server did not say how long $anchor_fetch_url is: only a digest can tell that it is whole"
    elif [ "$anchor_fetch_size" != "$size" ]; then
        anchor_http__broken
    fi
}

# usage: anchor_http__same_version
# Whether the answer goes on with the version of the file that the first one began; where another mirror began it, the
# digest will tell.
anchor_http__same_version() {
    [ "$code" = 206 ] && [ "$offset" -gt 0 ] || return 1
    if [ -n "$validator" ]; then
        [ "$anchor_http_validator" = "$validator" ] || return 1
    elif [ -z "$anchor_fetch_verified" ]; then
        return 1
    fi
    size=${size:-$anchor_http_total}
    [ "${anchor_http_total:-$size}" = "$size" ]
}

# usage: anchor_http__again ERROR [HINT]
# A failure that may pass. Status 2, or 3 when no later attempt can go on from what FILE has.
anchor_http__again() {
    anchor_fetch_error=$1
    anchor_fetch_hint=${2:-}
    anchor_fetch_retry_after=$anchor_http_retry
    [ "$anchor_fetch_size" -gt 0 ] || return 2
    case $code in
        200) [ "$offset" -eq 0 ] && [ -n "$validator$anchor_fetch_verified" ] || return 3 ;;
        206) anchor_http__same_version || return 3 ;;
        416) return 3 ;;
        *) [ "$anchor_fetch_size" -eq "$offset" ] || return 3 ;;
    esac
    return 2
}

# usage: anchor_http__refused
# An HTTP error. 408, 425, 429 and the server's own troubles may pass; what says that the request is wrong will not.
anchor_http__refused() {
    local what="$anchor_fetch_url answered with status $code" said=9
    if command -v "anchor_${stage}__refused" >/dev/null; then
        "anchor_${stage}__refused"
        said=$?
    fi
    [ "$said" -eq 9 ] || return "$said"
    case $code in
        408 | 425 | 429) anchor_http__again "$what" "the image store is busy: see how many nodes boot at once" ;;
        501 | 505) anchor_fail "$what" "the image store cannot serve this request: check what the URL leads to" ;;
        5??) anchor_http__again "$what" "see the image store's own log" ;;
        400 | 401 | 403)
            # 400 is what nginx says of a client certificate that is missing or not trusted.
            anchor_http__identity
            anchor_fail "$what: this node may not have it" "$anchor_http_identity; see which ones the image store allows"
            ;;
        3??) anchor_fail "$what instead of the file" "check the URL" ;;
        404 | 410) anchor_fail "$what: it is not there" "check the path in the URL, and that the image was published" ;;
        407) anchor_fail "$what: the proxy wants a password" "build it in: rd.anchor.$stage.proxy=http://USER:PASSWORD@HOST:PORT" ;;
        *) anchor_fail "$what" "check the URL, and what serves it" ;;
    esac
}

# usage: anchor_http__broken
# curl's own failures. Names, connections and broken transfers may pass; certificates and settings will not by trying.
anchor_http__broken() {
    local host="${anchor_fetch_url#*://}"
    host=${host%%/*}
    case $status:$text in
        0:*) anchor_http__again "$host sent less of the file than it announced" ;;
        23:* | 63:*)
            if [ "$status" = 63 ] || [ "$anchor_fetch_size" -ge "$max" ]; then
                anchor_fetch_too_large "${size:-$anchor_http_total}"
            else
                anchor_fail "cannot write the download: $text" "is ${file%/*} full? $anchor_fetch_room"
            fi
            ;;
        5:*) anchor_http__again "the proxy's name is not known: $text" "check rd.anchor.$stage.proxy and the name servers" ;;
        6:*) anchor_http__again "the name is not known: $text" "check the host in the URL, and what name servers DHCP gave" ;;
        7:*) anchor_http__again "no connection: $text" "does the server run, and does a firewall let this node through?" ;;
        28:*)
            anchor_http__again "$host is too slow or silent: $text" \
                "check the network; rd.anchor.fetch.connect_timeout, .stall and .timeout are the limits"
            ;;
        35:*alert*certificate* | 35:*alert*unknown?ca* | 56:*alert*certificate* | 56:*alert*unknown?ca* | 98:*)
            anchor_http__identity
            anchor_fail "$host does not accept this node's certificate: $text" "$anchor_http_identity"
            ;;
        35:*) anchor_http__again "no TLS with $host: $text" "does this port speak HTTPS?" ;;
        8:* | 16:* | 18:* | 52:* | 55:* | 56:* | 92:* | 95:* | 96:* | 97:* | *HTTP/0.9*)
            anchor_http__again "the transfer from $host broke: $text"
            ;;
        51:* | 60:*) anchor_http__untrusted ;;
        58:*)
            anchor_reject_credentials
            anchor_fail "the client certificate cannot be used: $text" "see the auth step, and $credentials"
            ;;
        77:*) anchor_fail "the CA file cannot be used: $text" "build the initramfs with the site's CA (/etc/anchor/ca.pem)" ;;
        47:*) anchor_fail "$anchor_fetch_url redirects more than $ANCHOR_HTTP_REDIRECTS times" "check the URL" ;;
        1:*) anchor_fail "$anchor_fetch_url redirects to a protocol that is not allowed: $text" "https:// may lead to https:// only" ;;
        127:*) anchor_fail "curl is not in the initramfs" "build it anew: the $stage transport brings curl" ;;
        *) anchor_fail "$anchor_fetch_url cannot be fetched: ${text:-curl ended with status $status}" "check the URL" ;;
    esac
}

# usage: anchor_http__untrusted
# Says what is wrong with the server's certificate. The clock is part of every such message: it is often the cause.
anchor_http__untrusted() {
    local now
    now=$(date -u '+%Y-%m-%d %H:%M:%S UTC')
    case $text in
        *"not yet valid"*)
            anchor_fail "the certificate of $host is not yet valid: the clock says $now" \
                "set the clock: rd.anchor.clock.ntp=, or the node's hardware clock"
            ;;
        *expired*)
            anchor_fail "the certificate of $host has expired: the clock says $now" \
                "renew it if the clock is right, or set the clock (rd.anchor.clock.ntp=)"
            ;;
        *"subject name"* | *"host name"* | *hostname*)
            anchor_fail "the certificate of $host is for another name: $text" "use a name in the URL that is in the certificate"
            ;;
        *)
            anchor_fail "the certificate of $host is not trusted: $text" \
                "its CA must be in /etc/anchor/ca.pem, from which the initramfs was built; the clock says $now"
            ;;
    esac
}

# usage: anchor_http__identity
# Sets anchor_http_identity: a sentence on what this node showed of itself, which a server has just refused.
anchor_http__identity() {
    if [ ! -s "$credentials/client.crt" ] || [ ! -s "$credentials/client.key" ]; then
        anchor_http_identity="this node has no client certificate: an auth stage gets one"
        return 0
    fi
    case $url in
        [Hh][Tt][Tt][Pp]:*)
            # Whoever answers in clear has not seen the certificate: a new one would change nothing.
            anchor_http_identity="over http:// a node does not show its certificate"
            return 0
            ;;
    esac
    anchor_reject_credentials
    anchor_http__subject
    anchor_http_identity="this node showed the certificate of ${anchor_http_subject:-unknown name}"
}

# usage: anchor_http__subject
# Sets anchor_http_subject: the common name in client.crt, else its first other name, else nothing.
anchor_http__subject() {
    local line
    anchor_http_subject=
    while IFS= read -r line; do
        case $line in
            *commonName*" = "*)
                anchor_http_subject=${line#*" = "}
                return 0
                ;;
            *DNS:* | *"IP Address:"*)
                anchor_http_subject=${line#*:}
                anchor_http_subject=${anchor_http_subject%%,*}
                ;;
        esac
    done <<END
$(openssl x509 -in "$credentials/client.crt" -noout -ext subjectAltName -subject -nameopt multiline 2>/dev/null </dev/null)
END
}
