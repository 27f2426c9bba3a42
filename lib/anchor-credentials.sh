#!/bin/sh
# What auth stages do with a certificate and a key that somebody else made: see that each file is whole, that the two
# belong together, and put both where the transports look for them. openssl, which every initramfs has, compares the two
# before the first connection does.
#
# What is wrong is left in anchor_credentials_error and anchor_credentials_hint instead of being said at once, because
# files that are still being copied are wrong for a while: the caller passes both to anchor_fail when it gives up.

# 20 certificates of 4096-bit RSA keys are half of this.
ANCHOR_CREDENTIALS_MAX=102400

# usage: anchor_credentials_place PATH
# Sets anchor_credentials_name to the name among the credentials of a file that is meant for PATH. Status 1, with an empty
# name, for any other place: Anchor 0.1.5 wrote to all, which lets the command line, or whoever answers for a server,
# replace the CA, the manifest's key or a program.
anchor_credentials_place() {
    anchor_credentials_name=
    case $1 in
        /client.cert | /client.crt | /run/anchor/credentials/client.cert) anchor_credentials_name=client.crt ;;
        /client.key) anchor_credentials_name=client.key ;;
        /run/anchor/credentials/*)
            case ${1#/run/anchor/credentials/} in
                '' | [!A-Za-z0-9]* | *[!A-Za-z0-9._-]*) return 1 ;;
            esac
            anchor_credentials_name=${1#/run/anchor/credentials/}
            ;;
        *) return 1 ;;
    esac
}

# usage: anchor_credentials_whole FILE KIND
# Whether FILE is a complete PEM file of KIND: cert (certificates only), key (one private key that needs no password), pem
# (any blocks) or any (whatever it holds; without a PEM line at all nothing but an empty file is refused). Text may stand
# before a block, but nothing may follow the last one: that is what is left of a longer file when a shorter one is written
# over it. Status 1 with anchor_credentials_error otherwise.
anchor_credentials_whole() {
    local file="$1" kind="$2" line='' size label='' cert=0 key=0 other=0 lines=0 rest='' cr LC_ALL=C
    anchor_credentials_error=
    anchor_credentials_hint="put the complete file there: PEM text, made elsewhere and moved into place when it is whole"
    if [ ! -f "$file" ] || ! size=$(stat -L -c %s "$file" 2>/dev/null) || [ "$size" -eq 0 ]; then
        anchor_credentials__wrong "$file" "is missing or empty"
        return 1
    fi
    if [ "$size" -gt "$ANCHOR_CREDENTIALS_MAX" ]; then
        anchor_credentials__wrong "$file" "is larger than any certificate or key ($size bytes)"
        return 1
    fi
    cr=$(printf '\r')
    while IFS= read -r line || [ -n "$line" ]; do
        anchor_credentials__line "${line%"$cr"}" || return 1
        line=
    done <"$file"
    anchor_credentials__judge
}

# usage: anchor_credentials_pair CERT KEY
# Whether KEY is the key of the first certificate in CERT; both are complete PEM files. Status 1 with
# anchor_credentials_error and anchor_credentials_hint otherwise. Their contents stay out of arguments and messages.
anchor_credentials_pair() {
    local of_cert of_key
    anchor_credentials_error=
    anchor_credentials_hint="put a certificate and the key that it was issued for there, both as PEM"
    # An empty password: without one, openssl would ask the console for that of an encrypted key.
    if ! of_cert=$(timeout 20 openssl x509 -in "$1" -noout -pubkey 2>/dev/null </dev/null); then
        anchor_credentials__wrong "$1" "holds no certificate that openssl can read"
    elif ! of_key=$(timeout 20 openssl pkey -in "$2" -passin pass: -pubout 2>/dev/null </dev/null); then
        anchor_credentials__wrong "$2" "holds no key that openssl can read"
    elif [ -z "$of_cert" ] || [ "$of_cert" != "$of_key" ]; then
        anchor_credentials_error="the key ${2##*/} does not belong to the certificate ${1##*/}"
    fi
    [ -z "$anchor_credentials_error" ] && return 0
    command -v openssl >/dev/null || {
        anchor_credentials_error="a certificate and its key cannot be compared: openssl is not in the initramfs"
        anchor_credentials_hint="build it anew: every initramfs has openssl"
    }
    return 1
}

# usage: anchor_credentials_keep CERT KEY
# Moves both into the credentials with mode 0600: the key first and the certificate last, each by a rename, so where the
# certificate is, its key is too. Status 1 with anchor_credentials_error otherwise.
anchor_credentials_keep() {
    local to="${ANCHOR_ROOT:-}/run/anchor/credentials"
    anchor_credentials_error=
    anchor_credentials_hint=
    # First beside their places: a move from another file system is a copy.
    if (umask 077 && mkdir -p "$to") && chmod 0700 "$to" && chmod 0600 "$1" "$2" &&
        rm -f "$to/client.crt" "$to/client.key" &&
        mv -f "$2" "$to/.client.key" && mv -f "$1" "$to/.client.crt" &&
        mv -f "$to/.client.key" "$to/client.key" && mv -f "$to/.client.crt" "$to/client.crt"; then
        return 0
    fi
    rm -f "$to/.client.key" "$to/.client.crt" "$to/client.key" "$to/client.crt"
    anchor_credentials_error="cannot write the certificate and its key to $to"
    anchor_credentials_hint="is there memory left for /run?"
    return 1
}

# usage: anchor_credentials__wrong FILE WHAT
# Sets anchor_credentials_error. Always returns 1.
anchor_credentials__wrong() {
    anchor_credentials_error="${1##*/} $2"
    return 1
}

# usage: anchor_credentials__line LINE
# Takes in one line of anchor_credentials_whole's file. Reads and sets its locals: label is that of the block that is
# open, cert, key and other count blocks, lines are those of the block's data, rest says that text follows a block.
anchor_credentials__line() {
    local line="$1"
    case $label:$line in
        :-----BEGIN\ *-----)
            label=${line#-----BEGIN }
            label=${label%-----}
            lines=0
            rest=
            ;;
        :-----*)
            anchor_credentials__wrong "$file" "has the end of a PEM block without its beginning"
            return 1
            ;;
        : | :[[:space:]]*) ;;
        :*) rest=1 ;;
        *:"-----END $label-----")
            if [ "$lines" -eq 0 ]; then
                anchor_credentials__wrong "$file" "has an empty PEM block"
                return 1
            fi
            case $label in
                CERTIFICATE | "TRUSTED CERTIFICATE" | "X509 CERTIFICATE") cert=$((cert + 1)) ;;
                "ENCRYPTED PRIVATE KEY") anchor_credentials__locked || return 1 ;;
                "PRIVATE KEY" | *" PRIVATE KEY") key=$((key + 1)) ;;
                *) other=$((other + 1)) ;;
            esac
            label=
            ;;
        *:Proc-Type:*ENCRYPTED*) anchor_credentials__locked || return 1 ;;
        *:*[!A-Za-z0-9+/=]*)
            # RFC 1421's headers, which only old keys have, are what else may be in a block.
            case $line in
                [A-Z]*:\ *) ;;
                *)
                    anchor_credentials__wrong "$file" "is not whole: a PEM block in it is broken"
                    return 1
                    ;;
            esac
            ;;
        *) lines=$((lines + ${#line})) ;;
    esac
}

# usage: anchor_credentials__locked
# An encrypted key: nobody is there to type its password. Status 1 where a key is wanted.
anchor_credentials__locked() {
    case $kind in any | pem) return 0 ;; esac
    anchor_credentials_hint="put the key there without a password: openssl pkey -in KEY -out PLAIN-KEY"
    anchor_credentials__wrong "$file" "is encrypted, and nobody is there to give its password"
}

# usage: anchor_credentials__judge
# Decides when all lines are in.
anchor_credentials__judge() {
    if [ -n "$label" ]; then
        anchor_credentials__wrong "$file" "is not whole: it ends inside of a PEM block"
    elif [ "$kind" = any ] && [ $((cert + key + other)) -eq 0 ]; then
        return 0
    elif [ -n "$rest" ] && [ $((cert + key + other)) -gt 0 ]; then
        anchor_credentials__wrong "$file" "has something after its last PEM block, as if one file was written over another"
    else
        case $kind:$((cert > 0)):$key in
            cert:1:0 | key:0:1 | any:*) return 0 ;;
            pem:*)
                [ $((cert + key + other)) -eq 0 ] || return 0
                anchor_credentials__wrong "$file" "holds no PEM block"
                ;;
            cert:*:0) anchor_credentials__wrong "$file" "holds no certificate" ;;
            cert:*) anchor_credentials__wrong "$file" "holds a private key, which does not belong beside a certificate" ;;
            key:*:0) anchor_credentials__wrong "$file" "holds no private key" ;;
            key:1:*) anchor_credentials__wrong "$file" "holds a certificate, which does not belong beside a private key" ;;
            *) anchor_credentials__wrong "$file" "holds more than one private key" ;;
        esac
    fi
}
