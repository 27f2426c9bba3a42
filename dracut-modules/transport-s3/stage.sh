#!/bin/sh
# Fetches s3://BUCKET/KEY: signs a request for the object (anchor-s3.sh), lets lib/anchor-http.sh make it, and explains
# what S3 answers. Credentials are what auth left in /run/anchor/credentials/s3, or else baked in.

# usage: anchor_s3_run URL FILE MAX_BYTES
# Reads the stage's parameters anchor_s3_*. Statuses of a transport (see anchor-fetch.sh). The helpers below share these
# locals; anchor_http_get calls anchor_s3__request and anchor_s3__refused.
anchor_s3_run() {
    anchor_untraced anchor_s3__attempt "$@"
}

# usage: anchor_s3__attempt URL FILE MAX_BYTES
# The same, traced.
anchor_s3__attempt() {
    local file="$2" max="$3" host='' path='' scheme='' time
    local anchor_s3__key='' anchor_s3__secret='' anchor_s3__token=''
    anchor_s3__place "$1" && anchor_s3__credentials || return 1
    if [ -n "$anchor_s3__key" ]; then
        time=$(date -u +%Y%m%dT%H%M%SZ)
        set -- "$@" "x-amz-content-sha256:$ANCHOR_S3_EMPTY" "x-amz-date:$time"
        [ -z "$anchor_s3__token" ] || set -- "$@" "x-amz-security-token:$anchor_s3__token"
        shift 3
        if ! anchor_s3_sign "$host" "$path" "$time" "$@"; then
            anchor_fail "cannot sign the request for $anchor_fetch_url" "is sha256sum in the initramfs?"
            return 1
        fi
    fi
    # The token is in a header that would go wherever the service says; and a signature is for this host alone.
    local anchor_http_stay="$anchor_s3__token"
    anchor_http_get s3 "$scheme://$host$path" "$file" "$max" "$anchor_s3_proxy"
}

# usage: anchor_s3__total FILE
# Sets anchor_fetch_total to the size that FILE will have, or to nothing while no answer has come.
anchor_s3__total() {
    anchor_http_size s3 "$1"
}

# usage: anchor_s3__place URL
# Sets scheme, host (as it stands in the Host header) and path of the object.
anchor_s3__place() {
    local endpoint="$anchor_s3_endpoint" style="$anchor_s3_style" bucket="${1#*://}" key LC_ALL=C
    key=${bucket#*/}
    bucket=${bucket%%/*}
    anchor_fetch_plain "$1"
    case $1 in
        *[?#]*) bucket= ;;
        *://*/?*) ;;
        *) bucket= ;;
    esac
    case $bucket in
        '' | *[!a-z0-9._-]*)
            anchor_fail "$anchor_fetch_url is no object of S3" \
                "write s3://BUCKET/KEY; a ? in the key is written %3F, and a presigned URL is an https:// URL"
            return 1
            ;;
    esac
    if ! anchor_s3_path "/$key"; then
        anchor_fail "$anchor_fetch_url has a % without two hexadecimal digits" "write a % in the key as %25"
        return 1
    fi
    if [ -z "$endpoint" ]; then
        endpoint=https://s3.$anchor_s3_region.amazonaws.com
        case $anchor_s3_region in cn-*) endpoint=$endpoint.cn ;; esac
        # The wildcard of the certificate covers one label.
        case $bucket in *.*) ;; *) style=${style:-virtual} ;; esac
    fi
    scheme=${endpoint%%://*}
    host=${endpoint#*://}
    host=${host%/}
    case $scheme/$host in
        http/*:80 | https/*:443) host=${host%:*} ;;
        */*[/?@]*)
            anchor_fail "rd.anchor.s3.endpoint has more than a host and a port" "write it as https://HOST or https://HOST:PORT"
            return 1
            ;;
    esac
    # want is the digest that anchor_fetch was given: it counts also where nothing may be continued.
    if [ "$scheme" = http ] && [ -z "${anchor_fetch_verified:-}${want:-}" ] && [ "${anchor_fetch_signed:-}" != 1 ]; then
        anchor_fail "refused to fetch $anchor_fetch_url without a digest: nothing protects what comes from an http:// endpoint" \
            "add the image's SHA-256 digest (rd.anchor.<image>.sha256=), or an endpoint with https://"
        return 1
    fi
    case $style in
        virtual)
            host=$bucket.$host
            path=$anchor_s3_path
            ;;
        *) path=/$bucket$anchor_s3_path ;;
    esac
}

# usage: anchor_s3__credentials
# Sets anchor_s3__key, _secret and _token: all empty where neither auth nor the build left any.
anchor_s3__credentials() {
    local file="${ANCHOR_ROOT:-}/run/anchor/credentials/s3" line
    if [ -e "$file" ]; then
        while IFS= read -r line || [ -n "$line" ]; do
            case $line in
                access_key=*) anchor_s3__key=${line#*=} ;;
                secret_key=*) anchor_s3__secret=${line#*=} ;;
                session_token=*) anchor_s3__token=${line#*=} ;;
                '') ;;
                *)
                    anchor_fail "$file has a line that is neither access_key=, secret_key= nor session_token=" \
                        "see what the auth step left there"
                    return 1
                    ;;
            esac
        done <"$file"
    else
        file="what was built in"
        anchor_s3__key=$anchor_s3_access_key
        anchor_s3__secret=$anchor_s3_secret_key
        anchor_s3__token=$anchor_s3_session_token
    fi
    [ -n "$anchor_s3__key$anchor_s3__secret$anchor_s3__token" ] || [ "$file" != "what was built in" ] || return 0
    case $anchor_s3__token in
        *[!A-Za-z0-9._~@+=/:-]*) ;;
        *)
            case $anchor_s3__key in
                '' | *[!A-Za-z0-9._~@+=:-]*) ;;
                *) [ -z "$anchor_s3__secret" ] || return 0 ;;
            esac
            ;;
    esac
    anchor_fail "the credentials for S3 are not whole ($file)" \
        "access_key and secret_key belong together, as text without blanks; session_token where the service gave one"
}

# usage: anchor_s3__request
# Prints further lines of curl's configuration: what of them is secret must not be an argument.
anchor_s3__request() {
    printf 'path-as-is\n'
    [ -n "$anchor_s3__key" ] || return 0
    printf 'header = "x-amz-content-sha256: %s"\nheader = "x-amz-date: %s"\n' "$ANCHOR_S3_EMPTY" "$time"
    [ -z "$anchor_s3__token" ] || printf 'header = "x-amz-security-token: %s"\n' "$anchor_s3__token"
    printf 'header = "Authorization: %s"\n' "$anchor_s3_authorization"
}

# usage: anchor_s3__refused
# Explains an answer by S3's error document. Status 1 after anchor_fail, 9 where there is nothing to say beyond what
# anchor-http.sh says of the status.
anchor_s3__refused() {
    local error message what who="this node has no access key" now
    case $code in
        3?? | 400 | 403 | 404) ;;
        *) return 9 ;;
    esac
    anchor_http_error_body
    anchor_s3__element Code
    error=$anchor_s3__element
    anchor_s3__element Message
    message=${anchor_s3__element:+: $anchor_s3__element}
    [ -z "$anchor_s3__key" ] || who="the access key is $anchor_s3__key"
    what="$anchor_fetch_url answered with status $code, $error$message"
    case $code:$error in
        *:SignatureDoesNotMatch | *:InvalidAccessKeyId | *:ExpiredToken | *:InvalidToken | *:TokenRefreshRequired | 403:)
            # What is built in stays what it is.
            [ ! -e "${ANCHOR_ROOT:-}/run/anchor/credentials/s3" ] || anchor_reject_credentials
            ;;
    esac
    case $error in
        '' | *[!A-Za-z0-9.]*)
            what="$anchor_fetch_url answered with status $code"
            [ "$code" != 301 ] || anchor_s3__elsewhere "$what" || return 1
            [ -z "$anchor_s3__key" ] && [ "$code" != 404 ] || return 9
            anchor_fail "$what" "$who: auth leaves one in /run/anchor/credentials/s3, or build rd.anchor.s3.access_key= and .secret_key= in"
            ;;
        PermanentRedirect | TemporaryRedirect | AuthorizationHeaderMalformed | IllegalLocationConstraintException)
            anchor_s3__elsewhere "$what" || return 1
            anchor_fail "$what" "check rd.anchor.s3.region and rd.anchor.s3.endpoint"
            ;;
        RequestTimeTooSkewed | RequestExpired)
            now=$(date -u '+%Y-%m-%d %H:%M:%S UTC')
            anchor_fail "$what: this node's clock says $now, the server's ${anchor_http_date:-something else}" \
                "set the clock: rd.anchor.clock.ntp=, or the node's hardware clock"
            ;;
        SignatureDoesNotMatch)
            anchor_fail "$what" "$who: is the secret key the one that belongs to it? A proxy that changes path or host breaks signatures, too"
            ;;
        InvalidAccessKeyId) anchor_fail "$what" "$who: check it, and whether the service still knows it" ;;
        ExpiredToken | InvalidToken | TokenRefreshRequired)
            anchor_fail "$what" "the session token is too old or is not of this service: see what gives it"
            ;;
        AccessDenied | AllAccessDisabled | AccountProblem | Forbidden)
            anchor_fail "$what" "$who: may it read this object? Where it may not list the bucket, a missing object looks the same"
            ;;
        InvalidObjectState) anchor_fail "$what" "the object is archived: restore it, or store it in a class that can be read at once" ;;
        NoSuchBucket) anchor_fail "$what" "check the bucket in the URL, and rd.anchor.s3.endpoint" ;;
        NoSuchKey) anchor_fail "$what" "check the key in the URL, and that the image was published" ;;
        RequestTimeout | SlowDown) return 9 ;;
        *) anchor_fail "$what" "$who; see the log of the S3 service" ;;
    esac
}

# usage: anchor_s3__elsewhere WHAT
# Says where the bucket is, as far as the answer tells (status 1), or nothing (status 0).
anchor_s3__elsewhere() {
    local name value region='' cr
    cr=$(printf '\r')
    while IFS=': ' read -r name value; do
        case $name in
            [Xx]-[Aa][Mm][Zz]-[Bb]ucket-[Rr]egion) region=${value%"$cr"} ;;
        esac
    done <"$state/headers"
    anchor_s3__element Region
    region=${region:-$anchor_s3__element}
    case $region in
        '' | "$anchor_s3_region" | *[!a-z0-9-]*) ;;
        *)
            anchor_fail "$1" "the bucket is in the region $region: set rd.anchor.s3.region=$region"
            return 1
            ;;
    esac
    anchor_s3__element Endpoint
    case $anchor_s3__element in
        '' | *[!A-Za-z0-9.:-]*) return 0 ;;
    esac
    anchor_fail "$1" "the service names another host for this bucket, $anchor_s3__element: see rd.anchor.s3.endpoint"
}

# usage: anchor_s3__element NAME
# Sets anchor_s3__element to the text of the first such element in the error document, at most 300 characters.
anchor_s3__element() {
    anchor_s3__element=${anchor_http_body#*"<$1>"}
    if [ "$anchor_s3__element" = "$anchor_http_body" ]; then
        anchor_s3__element=
        return 0
    fi
    anchor_s3__element=${anchor_s3__element%%"</"*}
    anchor_s3__element=$(printf '%.300s' "$anchor_s3__element")
}
