#!/bin/sh
# An OCI registry as a transport of anchor_fetch, called `registry`: its requests need a token, and the answers to them an
# explanation (the token protocol of the Distribution project). anchor-oci.sh chooses it for what it fetches.
#
# Credentials for a registry are in /run/anchor/credentials/registry.json, if auth left that (containers-auth.json(5)),
# or else in the stage's variables anchor_registry_user and anchor_registry_password; these are for the image's own
# registry and for no mirror.
#
# Needs anchor-report.sh, anchor-fetch.sh, anchor-http.sh, what anchor_oci_open sets, and the programs jq, curl and base64.
# shellcheck disable=SC2154 # what these set

ANCHOR_REGISTRY_TOKEN_MAX=65536 # bytes of an answer with a token

# usage: anchor_registry_run URL FILE MAX_BYTES
# One attempt, as a transport's (see anchor-fetch.sh). A registry that wants to know who asks says so with 401: then the
# request is made once more, with what it asked for.
anchor_registry_run() {
    local base path status anchor_registry__authorization='' anchor_registry__challenge='' asked='' anchor_registry__what=registry
    anchor_registry__of "$1"
    while :; do
        anchor_recall "$anchor_oci_dir/authorization.$anchor_registry__number"
        anchor_registry__authorization=$anchor_recall
        anchor_http_get registry "$1" "$2" "$3" "${anchor_registry_proxy:-}"
        status=$?
        [ "$status" -eq 8 ] || return "$status"
        if [ -n "$asked" ]; then
            anchor_fetch_plain "$1"
            anchor_reject_credentials
            anchor_fail "the registry does not let this node have $anchor_fetch_url: it wants other credentials than $anchor_registry__who" \
                "see who may pull this image there, and doc/oci.md for where credentials go"
            return 1
        fi
        asked=1
        anchor_registry__login "$1" || return
    done
}

# usage: anchor_registry__total FILE
anchor_registry__total() {
    anchor_http_size registry "$1"
}

# usage: anchor_registry__of URL
# Sets anchor_registry__number: which of anchor_oci_bases it belongs to; base is that, and path what follows.
anchor_registry__of() {
    anchor_registry__number=0
    for base in $anchor_oci_bases; do
        case $1 in
            "$base"/*)
                path=${1#"$base"/}
                return 0
                ;;
        esac
        anchor_registry__number=$((anchor_registry__number + 1))
    done
}

# usage: anchor_registry__request
# Prints further lines of curl's configuration. curl sends this header to no other host that it is redirected to.
anchor_registry__request() {
    local type types=''
    [ -z "$anchor_registry__authorization" ] || printf 'header = "Authorization: %s"\n' "$anchor_registry__authorization"
    [ "$anchor_registry__what" = registry ] || return 0
    case $path in
        manifests/*)
            for type in $ANCHOR_OCI_MANIFEST_TYPES $ANCHOR_OCI_INDEX_TYPES; do
                types="$types${types:+, }$type"
            done
            printf 'header = "Accept: %s"\n' "$types"
            ;;
    esac
}

# usage: anchor_registry__refused
# Status 8 where the registry says how to ask; 9 leaves the answer to anchor-http.sh; 1 after anchor_fail.
anchor_registry__refused() {
    local line cr value bearer='' basic=''
    if [ "$anchor_registry__what" = token ]; then
        case $code in
            400 | 401 | 403 | 404)
                anchor_reject_credentials
                anchor_fail "$what: the token service gives no token to $anchor_registry__who" \
                    "see who may pull this image, and doc/oci.md for where credentials go"
                return 1
                ;;
        esac
        return 9
    fi
    case $code:$path in
        401:*) ;;
        404:manifests/*)
            anchor_fail "$what: the registry has no such image or tag" "check its name and tag, and that it was published"
            return 1
            ;;
        403:*)
            anchor_fail "$what: $anchor_registry__who may not have it" "see who may pull this image there"
            return 1
            ;;
        *) return 9 ;;
    esac
    cr=$(printf '\r')
    while IFS= read -r line; do
        line=${line%"$cr"}
        value=${line#*:}
        value=${value#"${value%%[! ]*}"}
        case $line in
            HTTP/*) bearer='' basic='' ;;
            [Ww][Ww][Ww]-[Aa][Uu][Tt][Hh][Ee][Nn][Tt][Ii][Cc][Aa][Tt][Ee]:*)
                case $value in
                    [Bb][Ee][Aa][Rr][Ee][Rr]\ *) bearer=$value ;;
                    [Bb][Aa][Ss][Ii][Cc]*) basic=$value ;;
                esac
                ;;
        esac
    done <"$state/headers"
    anchor_registry__challenge=${bearer:-$basic}
    [ -n "$anchor_registry__challenge" ] || return 9
    return 8
}

# usage: anchor_registry__login URL
# Gets what anchor_registry__challenge asks for, and keeps it for all further requests to this registry. Statuses of a
# transport.
anchor_registry__login() {
    local answer
    # Several downloads may ask at once, each in a process of its own.
    anchor_pid
    answer="$anchor_oci_dir/token.$anchor_pid.$anchor_registry__number"
    anchor_registry__credentials || return 1
    case $anchor_registry__challenge in
        [Bb][Ee]*) anchor_registry__token "$1" "$answer" || return ;;
        *)
            if [ -z "$anchor_registry__authorization" ]; then
                anchor_fetch_plain "$1"
                anchor_fail "the registry wants a user and a password for $anchor_fetch_url, and this node has none" \
                    "see doc/oci.md for where credentials go"
                return 1
            fi
            ;;
    esac
    (umask 077 && printf '%s\n' "$anchor_registry__authorization" >"$answer.new") &&
        mv -f "$answer.new" "$anchor_oci_dir/authorization.$anchor_registry__number" && return 0
    anchor_fail "cannot write to $anchor_oci_dir" "is /run full?"
}

# usage: anchor_registry__credentials
# Sets anchor_registry__authorization to the Basic one for the present registry, or to nothing; anchor_registry__who, for
# messages, names the user. They go over https:// only.
anchor_registry__credentials() {
    local file="${ANCHOR_ROOT:-}/run/anchor/credentials/registry.json" host="${base#*://}" basic='' LC_ALL=C
    anchor_registry__authorization=
    anchor_registry__who="a node without credentials"
    host=${host%%/*}
    case $base in
        https://*) ;;
        *) return 0 ;;
    esac
    if [ -e "$file" ]; then
        # shellcheck disable=SC2016 # $ are jq's
        if ! basic=$(jq -r --arg host "$host" '(.auths // {}) as $a
                | ($a[$host] // $a["https://" + $host] // {}) | .auth // empty | select(type == "string")' "$file" 2>/dev/null); then
            anchor_fail "$file is not JSON" "see what the auth step left there: the form is that of containers-auth.json(5)"
            return 1
        fi
    fi
    if [ -z "$basic" ] && [ "$anchor_registry__number" -eq 0 ] && [ -n "${anchor_registry_user:-}" ]; then
        basic=$(printf '%s:%s' "$anchor_registry_user" "${anchor_registry_password:-}" | base64 -w 0)
    fi
    [ -n "$basic" ] || return 0
    case $basic in
        *[!A-Za-z0-9+/=]*)
            anchor_fail "the credentials for the registry $host are not base64" "see what the auth step left in $file"
            return 1
            ;;
    esac
    anchor_registry__authorization="Basic $basic"
    anchor_registry__who=$(printf '%s' "$basic" | base64 -d 2>/dev/null)
    anchor_registry__who="the user ${anchor_registry__who%%:*}"
}

# usage: anchor_registry__token URL FILE
# Exchanges the credentials, or none, for a token at the service that the challenge names. Statuses of a transport.
anchor_registry__token() {
    local realm service scope query='' status token expected='' anchor_fetch_max="$ANCHOR_REGISTRY_TOKEN_MAX" LC_ALL=C
    local anchor_fetch_room="a token has no more than $ANCHOR_REGISTRY_TOKEN_MAX bytes" anchor_registry__what=token
    anchor_registry__parameter realm
    realm=$anchor_registry__parameter
    anchor_registry__parameter service
    service=$anchor_registry__parameter
    anchor_registry__parameter scope
    scope=${anchor_registry__parameter:-repository:${base#*://*/v2/}:pull}
    case $realm in
        https://?*[!!-~]* | https://*[@\"\\#]* | http://?*[!!-~]* | http://*[@\"\\#]*) realm= ;;
        https://?*) ;;
        http://?*) case $base in https:*) realm= ;; esac ;;
        *) realm= ;;
    esac
    if [ -z "$realm" ] || [ ${#realm} -gt 2000 ] || [ ${#service} -gt 2000 ] || [ ${#scope} -gt 2000 ]; then
        anchor_fetch_plain "$1"
        anchor_fail "${anchor_fetch_url%%/v2/*} names no token service that a node may ask" \
            "the realm in its WWW-Authenticate header has to be an https:// URL"
        return 1
    fi
    anchor_registry__quote "$scope"
    query="scope=$anchor_registry__quote"
    if [ -n "$service" ]; then
        anchor_registry__quote "$service"
        query="service=$anchor_registry__quote&$query"
    fi
    case $realm in
        *\?*) query="$realm&$query" ;;
        *) query="$realm?$query" ;;
    esac
    rm -rf "$2" "${2:?}.registry"
    anchor_http_get registry "$query" "$2" "$ANCHOR_REGISTRY_TOKEN_MAX" "${anchor_registry_proxy:-}"
    status=$?
    # That was another file than the one that is fetched.
    anchor_fetch_sized=
    token=
    [ "$status" -ne 0 ] || token=$(jq -r -s 'select(length < 2)[0] | objects | .token // .access_token | strings' "$2" 2>/dev/null)
    rm -rf "$2" "${2:?}.registry"
    [ "$status" -eq 0 ] || return "$status"
    case $token in
        '' | *[!A-Za-z0-9._~+/=-]*)
            anchor_fetch_plain "$realm"
            anchor_fail "$anchor_fetch_url gave no token" "is it the registry's token service?"
            return 1
            ;;
    esac
    anchor_registry__authorization="Bearer $token"
}

# usage: anchor_registry__parameter NAME
# Sets anchor_registry__parameter to a quoted parameter of the challenge, or to nothing.
anchor_registry__parameter() {
    anchor_registry__parameter=
    case $anchor_registry__challenge in
        *[\ ,]"$1"=\"*\"*)
            anchor_registry__parameter=${anchor_registry__challenge#*[ ,]"$1"=\"}
            anchor_registry__parameter=${anchor_registry__parameter%%\"*}
            ;;
    esac
}

# usage: anchor_registry__quote TEXT
# Sets anchor_registry__quote: TEXT as the value of a query.
anchor_registry__quote() {
    local rest="$1" plain LC_ALL=C
    anchor_registry__quote=
    while [ -n "$rest" ]; do
        plain=${rest%%[!A-Za-z0-9._~:/,-]*}
        anchor_registry__quote=$anchor_registry__quote$plain
        rest=${rest#"$plain"}
        [ -n "$rest" ] || return 0
        plain=${rest%"${rest#?}"}
        rest=${rest#?}
        anchor_registry__quote=$anchor_registry__quote$(printf '%%%02X' "'$plain")
    done
}
