#!/bin/sh
# usage: acme-challenge begin|done|failed TYPE IDENTIFIER TOKEN AUTHORIZATION
#
# uacme's hook: hands the answer to a challenge to the responder that the stage started below ANCHOR_ACME_DIR, and
# takes it back afterwards. For http-01 that is the whole HTTP response, which socat copies to whoever connects. Declines (status 1) every challenge but ANCHOR_ACME_CHALLENGE, so uacme offers the next.
# All words but the first come from the ACME server.

LC_ALL=C

# usage: tell_ualpn LINE
# Sends one command to the running ualpn. Its exit status means nothing before 1.7.5, so the answer decides.
tell_ualpn() {
    case $(printf '%s\n' "$1" | timeout 5 ualpn -s "${ANCHOR_ACME_DIR:?}/ualpn.sock" 2>&1) in
        OK*) return 0 ;;
    esac
    return 1
}

# usage: http_answer AUTHORIZATION
# Puts the response in place; the server comes for it when this has ended. The authorization is no secret: the server asks
# for it in clear over HTTP.
http_answer() {
    printf 'HTTP/1.1 200 OK\r\nContent-Type: application/octet-stream\r\nContent-Length: %s\r\nConnection: close\r\n\r\n%s' \
        "${#1}" "$1" >"$ANCHOR_ACME_DIR/answer"
}

[ -n "${ANCHOR_ACME_DIR:-}" ] && [ "$#" -eq 5 ] && [ "$2" = "${ANCHOR_ACME_CHALLENGE:-}" ] || exit 1
case $3 in '' | *[!A-Za-z0-9.:_-]*) exit 1 ;; esac
case $4 in '' | *[!A-Za-z0-9_-]*) exit 1 ;; esac
case $5 in '' | *[!A-Za-z0-9._-]*) exit 1 ;; esac

case $2/$1 in
    http-01/begin) http_answer "$5" ;;
    http-01/*) : >"$ANCHOR_ACME_DIR/answer" ;; # gives nothing, as no file would, and needs no program
    tls-alpn-01/begin) tell_ualpn "auth $3 $5" ;;
    tls-alpn-01/*) tell_ualpn "unauth $3" ;;
    *) exit 1 ;;
esac
