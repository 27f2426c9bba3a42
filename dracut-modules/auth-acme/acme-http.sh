#!/bin/sh
# Answers one HTTP request on stdin and stdout: the http-01 responder's program, started by socat for each connection.
#
# Serves only GET /.well-known/acme-challenge/TOKEN, and only tokens that lie in ANCHOR_ACME_DIR/tokens; anything else
# is 404. A token is [A-Za-z0-9_-]+, so no request can name another file. socat bounds the request's size, the number
# of requests at a time and their idle time; timeout(1) bounds the whole (see anchor_acme__respond_http).

LC_ALL=C
CR=$(printf '\r')

method='' path='' protocol='' header='' token='' body=''
read -r method path protocol
while IFS= read -r header && [ -n "${header%"$CR"}" ]; do :; done

status='404 Not Found'
case $path in
    /.well-known/acme-challenge/*) token=${path#/.well-known/acme-challenge/} ;;
esac
case $token in
    '' | *[!A-Za-z0-9_-]*) ;;
    *)
        if [ "$method" = GET ] && [ "${protocol#HTTP/1.}" != "$protocol" ] && [ -f "${ANCHOR_ACME_DIR:?}/tokens/$token" ]; then
            IFS= read -r body <"$ANCHOR_ACME_DIR/tokens/$token" && status='200 OK'
        fi
        ;;
esac

printf 'HTTP/1.1 %s\r\nContent-Type: application/octet-stream\r\nContent-Length: %s\r\nConnection: close\r\n\r\n%s' \
    "$status" "${#body}" "$body"
