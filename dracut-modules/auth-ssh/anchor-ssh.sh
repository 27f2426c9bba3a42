#!/bin/sh
# What the ssh stage and the program that receives files (ssh-receive) have in common: which files are wanted, and
# when one of them is whole.
#
# DIR below is the stage's directory: wanted has one path per line, in/N is what came for line N, port is the server's.

# usage: anchor_ssh_find DIR NAME
# Finds the wanted file that NAME means: its path, or as much of its end as a person writes. Sets anchor_ssh_number
# (its line) and anchor_ssh_path. Status 1 if none is meant.
anchor_ssh_find() {
    local name="${2#/}" path number=0 loose=''
    [ "$name" != client.crt ] || name=client.cert
    anchor_ssh_number=
    while IFS= read -r path; do
        number=$((number + 1))
        case ${path#/} in
            "$name")
                anchor_ssh_number=$number
                break
                ;;
            */"$name") loose=${loose:-$number} ;;
        esac
    done <"$1/wanted"
    anchor_ssh_number=${anchor_ssh_number:-$loose}
    [ -n "$name" ] && [ -n "$anchor_ssh_number" ] && anchor_ssh_nth "$1" "$anchor_ssh_number"
}

# usage: anchor_ssh_nth DIR NUMBER
# Sets anchor_ssh_path to the wanted file of that number; status 1 if there are not so many.
anchor_ssh_nth() {
    local number=0
    while IFS= read -r anchor_ssh_path; do
        number=$((number + 1))
        [ "$number" -ne "$2" ] || return 0
    done <"$1/wanted"
    return 1
}

# usage: anchor_ssh_missing DIR
# Sets anchor_ssh_missing to the wanted files that have not come, and anchor_ssh_wanted to all of them, with commas
# between them. Status 1 if all have come.
anchor_ssh_missing() {
    local path number=0
    anchor_ssh_missing=
    anchor_ssh_wanted=
    while IFS= read -r path; do
        number=$((number + 1))
        anchor_ssh_wanted="$anchor_ssh_wanted${anchor_ssh_wanted:+, }$path"
        [ -e "$1/in/$number" ] || anchor_ssh_missing="$anchor_ssh_missing${anchor_ssh_missing:+, }$path"
    done <"$1/wanted"
    [ -n "$anchor_ssh_missing" ]
}

# usage: anchor_ssh_check FILE PATH SIZE
# Whether FILE is the whole of what PATH should be. SIZE is what its sender announced, or empty; without it only the
# closing line of PEM tells that nothing is missing. Sets anchor_ssh_reason when it is not.
anchor_ssh_check() {
    local size
    size=$(stat -c %s "$1" 2>/dev/null) || size=0
    if [ -n "$3" ] && [ "$size" != "$3" ]; then
        anchor_ssh_reason="is incomplete: $size of $3 bytes came"
        return 1
    fi
    case $2:$3 in
        /client.key:* | /client.cert:*) ;;
        *:?*) return 0 ;;
    esac
    anchor_ssh__blocks "$1"
    if [ -n "$anchor_ssh__open" ]; then
        anchor_ssh_reason="is incomplete: its last PEM block has no end"
        return 1
    fi
    case $2:$anchor_ssh__blocks in
        /client.key:*ENCRYPTED*) anchor_ssh_reason="is encrypted, and nobody can type its pass phrase here" ;;
        /client.key:*"PRIVATE KEY-----"* | /client.cert:*"CERTIFICATE-----"*) return 0 ;;
        /client.key:*) anchor_ssh_reason="holds no private key in PEM form" ;;
        /client.cert:*) anchor_ssh_reason="holds no certificate in PEM form" ;;
        *:) anchor_ssh_reason="may be incomplete, because nothing tells its size: use scp -O, or put NAME SIZE" ;;
        *) return 0 ;;
    esac
    return 1
}

# usage: anchor_ssh__blocks FILE
# Sets anchor_ssh__blocks to what the PEM blocks of FILE are ("CERTIFICATE-----"...), and anchor_ssh__open to those that
# begin and do not end.
anchor_ssh__blocks() {
    local line cr open=''
    cr=$(printf '\r')
    anchor_ssh__blocks=
    anchor_ssh__open=
    while IFS= read -r line || [ -n "$line" ]; do
        line=${line%"$cr"}
        case $line in
            "-----BEGIN "*-----)
                anchor_ssh__open=$anchor_ssh__open$open
                open=${line#-----BEGIN }
                ;;
            "-----END $open")
                anchor_ssh__blocks=$anchor_ssh__blocks$open
                open=
                ;;
            Proc-Type:*ENCRYPTED) anchor_ssh__blocks=${anchor_ssh__blocks}ENCRYPTED ;;
        esac
    done <"$1"
    anchor_ssh__open=$anchor_ssh__open$open
}

# usage: anchor_ssh_pair CERTIFICATE KEY PORT
# Status 0 if they belong together, 1 if not, 2 if that cannot be said now. curl loads both before it says a word to the
# server, and has an exit status (58) for a pair that does not fit; that the server at PORT speaks no TLS comes after
# (35). It is the program that will use them, and openssl would add 0.4 MB to the initramfs.
anchor_ssh_pair() {
    curl --disable --silent --output /dev/null --noproxy '*' --proxy '' --max-time 5 --pass '' \
        --cert "$1" --key "$2" --cacert "${ANCHOR_ROOT:-}/etc/anchor/ca.pem" "https://127.0.0.1:$3/" </dev/null 2>/dev/null
    case $? in
        35) return 0 ;;
        58) return 1 ;;
    esac
    return 2
}

# usage: anchor_ssh_pair_here DIR
# The same for what has come to DIR/in; status 2 also while one of the two is missing, or not wanted at all.
anchor_ssh_pair_here() {
    local cert key port
    anchor_ssh_find "$1" client.cert && [ "$anchor_ssh_path" = /client.cert ] || return 2
    cert=$1/in/$anchor_ssh_number
    anchor_ssh_find "$1" client.key && [ "$anchor_ssh_path" = /client.key ] || return 2
    key=$1/in/$anchor_ssh_number
    [ -e "$cert" ] && [ -e "$key" ] && read -r port <"$1/port" || return 2
    anchor_ssh_pair "$cert" "$key" "$port"
}
