#!/bin/sh
# Fetches over HTTPS, or over plain HTTP: lib/anchor-http.sh does it.

# usage: anchor_https_run URL FILE MAX_BYTES
# Reads the parameter anchor_https_proxy. Statuses of a transport (see anchor-fetch.sh).
anchor_https_run() {
    anchor_http_get https "$@" "$anchor_https_proxy"
}

# usage: anchor_https__total FILE
# Sets anchor_fetch_total to the size that FILE will have, or to nothing while no answer has come.
anchor_https__total() {
    anchor_http_size https "$1"
}
