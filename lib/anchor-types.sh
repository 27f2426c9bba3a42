#!/bin/sh
# anchor-types.sh: one check per parameter type; the node's half of anchor_build/paramtypes.py.
#
#   anchor_type_<type> VALUE [OPTION...]
#
# Sets $anchor_value to the normalised VALUE and returns 0; or sets $anchor_reason to why VALUE is refused
# (a phrase that follows the parameter's name and never holds the value), empties $anchor_value and returns 1.
# VALUE is bytes, however hostile: nothing here starts a process, evaluates text, splits words or globs.
# An OPTION comes from stage.toml and is trusted. tests/vectors/types.json holds both halves to the same answers.
#
# Names with two underscores are helpers; they rely on their caller's LC_ALL=C, which makes ranges ranges of bytes.
# shellcheck disable=SC3043 # `local` is the one extension that dash, busybox and bash share

ANCHOR_TYPE_MAX_BYTES=4096
ANCHOR_TYPE_MAX_INTEGER=999999999999999999 # 18 digits: no shell overflows
ANCHOR_TYPE_HEX_PAIR='[0-9A-Fa-f][0-9A-Fa-f]'
ANCHOR_TYPE_LETTERS=AaBbCcDdEeFfGgHhIiJjKkLlMmNnOoPpQqRrSsTtUuVvWwXxYyZz

# anchor_type__refuse REASON: says no. Always returns 1.
anchor_type__refuse() {
    anchor_value=''
    anchor_reason=$1
    return 1
}

# anchor_type__text VALUE: what every type asks of its text first. Sets the result to VALUE itself.
anchor_type__text() {
    anchor_value=$1
    anchor_reason=''
    [ "${#1}" -le "$ANCHOR_TYPE_MAX_BYTES" ] ||
        anchor_type__refuse "is longer than $ANCHOR_TYPE_MAX_BYTES bytes" || return 1
    case $1 in
        *[[:cntrl:]]*) anchor_type__refuse "contains a control character" ;;
    esac
}

# anchor_type__lower TEXT: sets $anchor_value to TEXT with A-Z in lower case. For short texts: the time is quadratic.
anchor_type__lower() {
    local rest="$1" head letters
    anchor_value=''
    while [ -n "$rest" ]; do
        head=${rest%%[A-Z]*}
        anchor_value=$anchor_value$head
        rest=${rest#"$head"}
        [ -n "$rest" ] || return 0
        letters=${ANCHOR_TYPE_LETTERS#*"${rest%%"${rest#?}"}"}
        anchor_value=$anchor_value${letters%"${letters#?}"}
        rest=${rest#?}
    done
}

anchor_type_string() {
    local LC_ALL=C
    anchor_type__text "$1"
}

anchor_type_secret() {
    local LC_ALL=C
    anchor_type__text "$1" || return 1
    [ -n "$1" ] || anchor_type__refuse "is empty"
}

anchor_type_name() {
    local LC_ALL=C
    anchor_type__text "$1" || return 1
    case $1 in
        '' | [!A-Za-z0-9]* | *[!A-Za-z0-9._-]*) ;;
        *) [ "${#1}" -gt 64 ] || return 0 ;;
    esac
    anchor_type__refuse "is not a name of up to 64 letters, digits, dots, dashes and underscores"
}

anchor_type_bool() {
    local LC_ALL=C
    anchor_type__text "$1" || return 1
    case $1 in
        '' | 1 | [Yy][Ee][Ss] | [Tt][Rr][Uu][Ee] | [Oo][Nn]) anchor_value=1 ;;
        0 | [Nn][Oo] | [Ff][Aa][Ll][Ss][Ee] | [Oo][Ff][Ff]) anchor_value=0 ;;
        *) anchor_type__refuse "is not yes or no (1, 0, true, false, on, off)" ;;
    esac
}

# anchor_type__digits TEXT: sets $anchor_value to TEXT without leading zeros, so that no shell reads it as octal.
# Status 1 unless TEXT is 1 to 18 digits: what follows may then compute with it.
anchor_type__digits() {
    case $1 in
        '' | *[!0-9]*) return 1 ;;
    esac
    [ "${#1}" -le 18 ] || return 1
    anchor_value=${1#"${1%%[!0]*}"}
    anchor_value=${anchor_value:-0}
}

# anchor_type__scaled FACTOR: multiplies $anchor_value; status 1 instead of an overflow.
anchor_type__scaled() {
    [ "$anchor_value" -le $((ANCHOR_TYPE_MAX_INTEGER / $1)) ] || return 1
    anchor_value=$((anchor_value * $1))
}

# anchor_type__within MIN MAX: status 0 if $anchor_value lies between; an empty bound is none.
anchor_type__within() {
    { [ -z "$1" ] || [ "$anchor_value" -ge "$1" ]; } && { [ -z "$2" ] || [ "$anchor_value" -le "$2" ]; }
}

# anchor_type__refuse_number NOUN UNIT UNBOUNDED MIN MAX: says which numbers are wanted, or UNBOUNDED. Returns 1.
anchor_type__refuse_number() {
    local range="$3"
    case ${4:+min}${5:+max} in
        minmax) range="from $4 to $5$2" ;;
        min) range="of at least $4$2" ;;
        max) range="of at most $5$2" ;;
    esac
    anchor_type__refuse "is not a $1 $range"
}

# anchor_type_int VALUE [MIN [MAX]]
anchor_type_int() {
    local LC_ALL=C
    anchor_type__text "$1" || return 1
    if anchor_type__digits "${1#-}"; then
        case $1 in
            -*) anchor_value=$((-anchor_value)) ;;
        esac
        anchor_type__within "${2:-}" "${3:-}" && return 0
    fi
    anchor_type__refuse_number "whole number" "" "of at most 18 digits" "${2:-}" "${3:-}"
}

anchor_type_port() {
    local LC_ALL=C
    anchor_type__text "$1" || return 1
    anchor_type__digits "$1" && anchor_type__within 1 65535 && return 0
    anchor_type__refuse "is not a port number from 1 to 65535"
}

# anchor_type__bytes TEXT: sets $anchor_value to the number of bytes that TEXT (512, 64M, 2GiB) stands for.
anchor_type__bytes() {
    local number="${1%[Bb]}" factor=1
    case $number in
        *[KkMmGgTt][Ii]) number=${number%?} ;;
    esac
    case $number in
        *[Kk]) factor=1024 ;;
        *[Mm]) factor=1048576 ;;
        *[Gg]) factor=1073741824 ;;
        *[Tt]) factor=1099511627776 ;;
    esac
    anchor_type__digits "${number%[KkMmGgTt]}" && anchor_type__scaled "$factor"
}

# anchor_type_size VALUE [MIN [MAX]]: bounds in bytes
anchor_type_size() {
    local LC_ALL=C
    anchor_type__text "$1" || return 1
    anchor_type__bytes "$1" && anchor_type__within "${2:-}" "${3:-}" && return 0
    anchor_type__refuse_number size " bytes" "such as 512M or 2G" "${2:-}" "${3:-}"
}

anchor_type_size_or_percent() {
    local LC_ALL=C
    anchor_type__text "$1" || return 1
    case $1 in
        *%) anchor_type__digits "${1%\%}" && anchor_type__within 1 100 && anchor_value=$anchor_value% && return 0 ;;
        *) anchor_type__bytes "$1" && return 0 ;;
    esac
    anchor_type__refuse "is not a size or a percentage, such as 2G or 50%"
}

# anchor_type_duration VALUE [MIN [MAX]]: bounds in seconds
anchor_type_duration() {
    local LC_ALL=C factor=1
    anchor_type__text "$1" || return 1
    case $1 in
        *m) factor=60 ;;
        *h) factor=3600 ;;
        *d) factor=86400 ;;
    esac
    anchor_type__digits "${1%[smhd]}" && anchor_type__scaled "$factor" &&
        anchor_type__within "${2:-}" "${3:-}" && return 0
    anchor_type__refuse_number duration " seconds" "such as 90, 30s or 5m" "${2:-}" "${3:-}"
}

# anchor_type_choice VALUE "WORD WORD..."
anchor_type_choice() {
    local LC_ALL=C
    anchor_type__text "$1" || return 1
    case $1 in
        '' | *' '*) ;;
        *)
            case " $2 " in
                *" $1 "*) return 0 ;;
            esac
            ;;
    esac
    anchor_type__refuse "is not one of: $2"
}

# anchor_type__ipv4 TEXT: status 0 for four decimal parts without leading zeros (which some programs take as octal).
anchor_type__ipv4() {
    local rest="$1." part count=0
    while [ -n "$rest" ]; do
        part=${rest%%.*}
        rest=${rest#*.}
        case $part in
            '' | 0?* | ????* | *[!0-9]*) return 1 ;;
        esac
        [ "$part" -le 255 ] || return 1
        count=$((count + 1))
    done
    [ "$count" -eq 4 ]
}

# anchor_type__groups TEXT LAST: adds the groups of a piece of an IPv6 address to the caller's $groups.
# With LAST, the piece ends the address and may end in an IPv4 address. Status 1 if a group is not one.
anchor_type__groups() {
    local rest="${1:+$1:}" part
    while [ -n "$rest" ]; do
        part=${rest%%:*}
        rest=${rest#*:}
        groups=$((groups + 1))
        case $part in
            *.*)
                [ -n "$2" ] && [ -z "$rest" ] && anchor_type__ipv4 "$part" || return 1
                groups=$((groups + 1))
                ;;
            '' | ?????* | *[!0-9A-Fa-f]*) return 1 ;;
        esac
    done
}

# anchor_type__ipv6 TEXT: status 0 for an address without brackets and zone.
anchor_type__ipv6() {
    local groups=0
    case $1 in
        *::*)
            anchor_type__groups "${1%%::*}" "" && anchor_type__groups "${1#*::}" last && [ "$groups" -le 7 ]
            ;;
        *) anchor_type__groups "$1" last && [ "$groups" -eq 8 ] ;;
    esac
}

# anchor_type__dns_name TEXT: a last label of digits alone would be half an IPv4 address.
anchor_type__dns_name() {
    local rest="$1." label
    [ "${#1}" -le 253 ] || return 1
    while [ -n "$rest" ]; do
        label=${rest%%.*}
        rest=${rest#*.}
        case $label in
            '' | -* | *- | *[!A-Za-z0-9_-]*) return 1 ;;
        esac
        [ "${#label}" -le 63 ] || return 1
    done
    case $label in
        *[!0-9]*) return 0 ;;
    esac
    return 1
}

# anchor_type__host TEXT: sets $anchor_value to the host in lower case, without brackets.
anchor_type__host() {
    local host="$1"
    case $host in
        \[*\])
            host=${host#?}
            host=${host%?}
            anchor_type__ipv6 "$host"
            ;;
        *:*) anchor_type__ipv6 "$host" ;;
        *) anchor_type__ipv4 "$host" || anchor_type__dns_name "$host" ;;
    esac && anchor_type__lower "$host"
}

anchor_type_host() {
    local LC_ALL=C
    anchor_type__text "$1" || return 1
    anchor_type__host "$1" || anchor_type__refuse "is not a host name or an IP address"
}

anchor_type_email() {
    local LC_ALL=C user
    anchor_type__text "$1" || return 1
    user=${1%%@*}
    case $user in
        "$1" | '' | [.-]* | *. | *..* | *[!A-Za-z0-9._%+-]*) ;;
        *) [ "${#user}" -le 64 ] && anchor_type__dns_name "${1#*@}" && return 0 ;;
    esac
    anchor_type__refuse "is not an email address such as ops@example.org"
}

# anchor_type__authority TEXT: [user[:password]@]host[:port]; sets $anchor_value to it, host in lower case.
anchor_type__authority() {
    local host="$1" user='' port='' left='' right=''
    case $host in
        *@*) user=${host%%@*}@ ;;
    esac
    host=${host#"$user"}
    case $user in
        @ | *[!A-Za-z0-9._~:\!\$\&\(\)*+,\;=%@-]*) return 1 ;;
    esac
    case $host in
        \[*\]*)
            left='[' right=']'
            port=${host#*\]}
            host=${host%%\]*}]
            ;;
        *:*)
            port=:${host#*:}
            host=${host%%:*}
            ;;
    esac
    if [ -n "$port" ]; then
        anchor_type__digits "${port#:}" && anchor_type__within 1 65535 || return 1
        [ "$port" != "${port#:}" ] || return 1
        port=:$anchor_value
    fi
    anchor_type__host "$host" && anchor_value=$user$left$anchor_value$right$port
}

# anchor_type__bare TEXT SCHEMES BARE: sets $url, its caller's, to TEXT with the scheme that it lacks. Where any scheme will
# do, that of rsync's own forms HOST::MODULE/PATH and USER@HOST:/PATH, which cannot be a host with a port, and file:// for a
# path.
anchor_type__bare() {
    local host="${1%%:*}" rest="${1#*:}"
    url=${3:+"$3://"}$1
    [ -z "$2" ] && [ -n "$3" ] || return 0
    case $host in
        /*)
            url=file://$1
            return 0
            ;;
        '' | "$1" | *[/\[]*) return 0 ;;
    esac
    case $rest in
        :*) url=rsync://$host/${rest#:} ;;
        /*) url=rsync+ssh://$host$rest ;;
    esac
}

# anchor_type_url VALUE ["SCHEME SCHEME..." [BARE]]: BARE is the scheme of a VALUE that names none
anchor_type_url() {
    local LC_ALL=C url scheme rest authority example
    anchor_type__text "$1" || return 1
    example=${2:-https}
    example="is not a URL such as ${example%% *}://host/path"
    case $1 in
        *://*) url=$1 ;;
        *) anchor_type__bare "$1" "${2:-}" "${3:-}" ;;
    esac
    scheme=${url%%://*}
    case $scheme in
        "$url" | '' | [!A-Za-z]* | *[!A-Za-z0-9+.-]* | ?????????????????*) anchor_type__refuse "$example" || return 1 ;;
    esac
    anchor_type__lower "$scheme"
    scheme=$anchor_value
    [ -z "${2:-}" ] || anchor_type_choice "$scheme" "$2" ||
        anchor_type__refuse "is not a URL with one of the schemes: $2" || return 1
    rest=${url#*://}
    authority=${rest%%[/?]*}
    rest=${rest#"$authority"}
    case $rest in
        *[!A-Za-z0-9._~:/?@\!\$\&\(\)*+,\;=%-]*) ;;
        *)
            if [ "$scheme" = file ]; then
                # No host, and a path of this node.
                case $authority$rest in
                    /?*)
                        anchor_value=file://$rest
                        return 0
                        ;;
                esac
            elif anchor_type__authority "$authority"; then
                anchor_value=$scheme://$anchor_value$rest
                return 0
            fi
            ;;
    esac
    anchor_type__refuse "$example"
}

# anchor_type__path TEXT: sets $anchor_value to the absolute path without doubled and trailing slashes.
anchor_type__path() {
    local rest="${1#/}/" part
    [ "$1" != "${1#/}" ] || return 1
    anchor_value=''
    while [ -n "$rest" ]; do
        part=${rest%%/*}
        rest=${rest#*/}
        case $part in
            . | ..) return 1 ;;
            ?*) anchor_value=$anchor_value/$part ;;
        esac
    done
    anchor_value=${anchor_value:-/}
}

anchor_type_path() {
    local LC_ALL=C
    anchor_type__text "$1" || return 1
    anchor_type__path "$1" || anchor_type__refuse "is not an absolute path without . and .. in it"
}

anchor_type_nfs_export() {
    local LC_ALL=C rest host
    anchor_type__text "$1" || return 1
    rest=${1#*:}
    case $rest in
        \[*\]:*) host=${rest%%\]*}] ;;
        *) host=${rest%%:*} ;;
    esac
    rest=${rest#"$host"}
    case ${1%%:*}=$rest in
        *: | *:*:*[!A-Za-z0-9._=,:/@+-]*) ;;
        nfs=:/* | nfs4=:/*)
            rest=${rest#:}
            anchor_type__host "$host" && anchor_type__path "${rest%%:*}" && anchor_value=$1 && return 0
            ;;
    esac
    anchor_type__refuse "is not an NFS export such as nfs4:server:/path or nfs:server:/path:options"
}

anchor_type_sha256() {
    local LC_ALL=C digest
    anchor_type__text "$1" || return 1
    digest=${1#sha256:}
    case ${#digest}:$digest in
        64:*[!0-9A-Fa-f]*) ;;
        64:*) anchor_type__lower "$digest" && return 0 ;;
    esac
    anchor_type__refuse "is not a SHA-256 digest of 64 hexadecimal digits"
}

# anchor_type_mac VALUE: also in the form of BOOTIF, which puts the hardware type before the address
anchor_type_mac() {
    local LC_ALL=C mac x="$ANCHOR_TYPE_HEX_PAIR"
    anchor_type__text "$1" || return 1
    mac=$1
    # shellcheck disable=SC2254 # patterns on purpose: each $x is one pair of hexadecimal digits
    case $mac in
        01-$x-$x-$x-$x-$x-$x) mac=${mac#01-} ;;
        $x-$x-$x-$x-$x-$x | $x:$x:$x:$x:$x:$x) ;;
        *) anchor_type__refuse "is not a MAC address such as 52:54:00:12:34:56" || return 1 ;;
    esac
    anchor_type__lower "$mac"
    while [ "$anchor_value" != "${anchor_value#*-}" ]; do
        anchor_value=${anchor_value%%-*}:${anchor_value#*-}
    done
}

# anchor_type_disk VALUE: a device below /dev, what a disk is known by, or how to choose one
anchor_type_disk() {
    local LC_ALL=C
    anchor_type__text "$1" || return 1
    case $1 in
        'smallest' | 'largest' | 'only') return 0 ;;
        serial:*[!A-Za-z0-9._:+-]* | serial: | wwn:*[!A-Za-z0-9._:+-]* | wwn:) ;;
        serial:* | wwn:*)
            set -- "${1#*:}"
            [ "${#1}" -gt 64 ] || return 0
            ;;
        *[!A-Za-z0-9._:+@=/-]*) ;;
        *)
            ! anchor_type__path "$1" || case $anchor_value in
                /dev/?*) return 0 ;;
            esac
            ;;
    esac
    anchor_type__refuse "is not a disk such as /dev/sda, serial:S1A2B3, wwn:0x5000c500a1b2c3d4, smallest, largest or only"
}

anchor_type_tty() {
    local LC_ALL=C device
    anchor_type__text "$1" || return 1
    device=${1#/dev/}
    case $device in
        *[!A-Za-z0-9]* | *[0-9]*[A-Za-z]*) ;;
        tty*[0-9] | hvc*[0-9])
            anchor_value=$device
            return 0
            ;;
    esac
    anchor_type__refuse "is not a terminal device such as ttyS0 or hvc0"
}

# anchor_type_list VALUE TYPE [OPTION...]: elements of TYPE, which takes the OPTIONs, with commas between them
anchor_type_list() {
    local LC_ALL=C rest="$1," type="$2" element clean=''
    anchor_type__text "$1" || return 1
    shift 2
    while [ "$type" != "${type#*-}" ]; do
        type=${type%%-*}_${type#*-}
    done
    while [ -n "$rest" ]; do
        element=${rest%%,*}
        rest=${rest#*,}
        [ -n "$element" ] || anchor_type__refuse "has an empty element" || return 1
        "anchor_type_$type" "$element" "$@" ||
            anchor_type__refuse "has an element that $anchor_reason" || return 1
        clean=$clean,$anchor_value
    done
    anchor_value=${clean#,}
}
