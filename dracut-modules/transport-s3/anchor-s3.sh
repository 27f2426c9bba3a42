#!/bin/sh
# Signatures of S3 requests: AWS Signature Version 4 in an Authorization header, with sha256sum alone. curl can sign,
# too, but not before 7.75, and before 7.87 without what S3 asks for; and openssl takes a key as an argument only.
# https://docs.aws.amazon.com/AmazonS3/latest/API/sig-v4-header-based-auth.html

# The SHA-256 digest of nothing: a GET has no body.
ANCHOR_S3_EMPTY=e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855

# usage: anchor_s3_sign HOST PATH TIME [HEADER...]
# Signs a GET of PATH (in its canonical form) without a query. TIME is UTC as YYYYMMDDTHHMMSSZ. A HEADER is NAME:VALUE
# in lower case, in the order of names, all after "host". Reads anchor_s3__key, _secret and anchor_s3_region; sets
# anchor_s3_authorization, the value of that header. Printf and the like must be the shell's own: what is signed and
# what is secret goes through pipes only.
anchor_s3_sign() {
    local host="$1" path="$2" time="$3" day="${3%T*}" names=host header request scope
    shift 3
    request="GET
$path

host:$host
"
    for header; do
        names="$names;${header%%:*}"
        request="$request$header
"
    done
    request="$request
$names
$ANCHOR_S3_EMPTY"
    scope="$day/$anchor_s3_region/s3/aws4_request"
    anchor_s3__digest '' "$request"
    request="AWS4-HMAC-SHA256
$time
$scope
$anchor_s3__digest"
    anchor_s3__hex "AWS4$anchor_s3__secret"
    for header in "$day" "$anchor_s3_region" s3 aws4_request "$request"; do
        anchor_s3__hmac "$anchor_s3__hex" "$header" || return 1
        anchor_s3__hex=$anchor_s3__digest
    done
    anchor_s3_authorization="AWS4-HMAC-SHA256 Credential=$anchor_s3__key/$scope, SignedHeaders=$names, \
Signature=$anchor_s3__digest"
}

# usage: anchor_s3__hmac KEY TEXT
# Sets anchor_s3__digest to HMAC-SHA256 (RFC 2104); KEY and result are hexadecimal. Status 1 without a result.
anchor_s3__hmac() {
    local key="$1" inner
    if [ ${#key} -gt 128 ]; then
        anchor_s3__octal "$key" 0
        anchor_s3__digest "$anchor_s3__octal" ''
        key=$anchor_s3__digest
    fi
    while [ ${#key} -lt 128 ]; do
        key="${key}00"
    done
    anchor_s3__octal "$key" 54 # 0x36
    anchor_s3__digest "$anchor_s3__octal" "$2"
    anchor_s3__octal "$anchor_s3__digest" 0
    inner=$anchor_s3__octal
    anchor_s3__octal "$key" 92 # 0x5c
    anchor_s3__digest "$anchor_s3__octal$inner" ''
    [ ${#anchor_s3__digest} -eq 64 ]
}

# usage: anchor_s3__digest BYTES TEXT
# Sets anchor_s3__digest to the SHA-256 digest of BYTES, which are octal escapes, and TEXT after them.
anchor_s3__digest() {
    # shellcheck disable=SC2059 # nothing but escapes
    anchor_s3__digest=$({
        printf "$1"
        printf '%s' "$2"
    } | sha256sum)
    anchor_s3__digest=${anchor_s3__digest%% *}
}

# usage: anchor_s3__octal HEX MASK
# Sets anchor_s3__octal to the bytes of HEX, each xor MASK, as octal escapes for printf.
anchor_s3__octal() {
    local rest="$1" byte
    anchor_s3__octal=
    while [ -n "$rest" ]; do
        byte=$((0x${rest%"${rest#??}"} ^ $2))
        anchor_s3__octal="$anchor_s3__octal\\$((byte / 64))$((byte / 8 % 8))$((byte % 8))"
        rest=${rest#??}
    done
}

# usage: anchor_s3__hex TEXT
# Sets anchor_s3__hex to the bytes of TEXT in hexadecimal digits.
anchor_s3__hex() {
    local bytes
    bytes=$(printf '%s' "$1" | od -An -v -tx1)
    anchor_s3__hex=
    # shellcheck disable=SC2086 # these are hexadecimal numbers, to be joined
    set -- $bytes
    for bytes; do
        anchor_s3__hex=$anchor_s3__hex$bytes
    done
}

# usage: anchor_s3_path TEXT
# Sets anchor_s3_path to TEXT, the path of a URL, in the form that signatures are made of: every byte but letters,
# digits and -._~/ is written as % and two digits, and no other. Status 1 for a % that is not followed by two digits.
anchor_s3_path() {
    local rest="$1" byte LC_ALL=C
    anchor_s3_path=
    while [ -n "$rest" ]; do
        byte=${rest%"${rest#?}"}
        rest=${rest#?}
        case $byte in
            [A-Za-z0-9._~/-]) ;;
            %)
                byte=${rest%"${rest#??}"}
                rest=${rest#??}
                case $byte in
                    [0-9A-Fa-f][0-9A-Fa-f]) ;;
                    *) return 1 ;;
                esac
                anchor_s3__byte "$((0x$byte))"
                ;;
            # The quote makes printf give the character's number.
            *) anchor_s3__byte "$(printf '%d' "'$byte")" ;;
        esac
        anchor_s3_path=$anchor_s3_path$byte
    done
}

# usage: anchor_s3__byte CODE
# Sets byte to how a path has that byte.
anchor_s3__byte() {
    case $1 in
        4[5-9] | 5[0-7] | 6[5-9] | [78]? | 90 | 95 | 9[7-9] | 1[01]? | 12[0126])
            # shellcheck disable=SC2059 # one escape
            byte=$(printf "\\$(($1 / 64))$(($1 / 8 % 8))$(($1 % 8))")
            ;;
        *) byte=$(printf '%%%02X' "$1") ;;
    esac
}
