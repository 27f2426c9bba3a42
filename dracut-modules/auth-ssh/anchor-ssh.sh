#!/bin/sh
# What the ssh stage and the program that receives files (ssh-receive) have in common: which files are wanted, and
# when one of them is whole.
#
# DIR below is the stage's directory: wanted has one path per line, in/N is what came for line N.
# Needs anchor-credentials.sh.

# usage: anchor_ssh_find DIR NAME
# Finds the wanted file that NAME means: its path, or as much of its end as a person writes. Sets anchor_ssh_number
# (its line) and anchor_ssh_path. Status 1 if none is meant.
anchor_ssh_find() {
    local name="${2#/}" path number=0 loose=''
    anchor_ssh_number=
    while IFS= read -r path; do
        number=$((number + 1))
        case $name in
            client.cert | client.crt)
                anchor_credentials_place "$path"
                [ "$anchor_credentials_name" != client.crt ] || path=$name
                ;;
        esac
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
    local size kind=pem
    size=$(stat -c %s "$1" 2>/dev/null) || size=0
    if [ -n "$3" ] && [ "$size" != "$3" ]; then
        anchor_ssh_reason="is incomplete: $size of $3 bytes came"
        return 1
    fi
    anchor_credentials_place "$2"
    case $anchor_credentials_name:$3 in
        client.key:*) kind=key ;;
        client.crt:*) kind=cert ;;
        *:?*) return 0 ;;
    esac
    anchor_credentials_whole "$1" "$kind" && return 0
    anchor_ssh_reason=${anchor_credentials_error#"${1##*/} "}
    [ "$kind" != pem ] ||
        anchor_ssh_reason="$anchor_ssh_reason, and nothing tells its size: use scp -O, or put NAME SIZE"
    return 1
}

# usage: anchor_ssh_pair_here DIR
# Whether the certificate and the key that have come to DIR/in belong together: status 0 if so, 1 if not, 2 while one of
# the two is missing, or not wanted at all.
anchor_ssh_pair_here() {
    local path number=0 cert='' key=''
    while IFS= read -r path; do
        number=$((number + 1))
        anchor_credentials_place "$path"
        case $anchor_credentials_name in
            client.crt) cert=$1/in/$number ;;
            client.key) key=$1/in/$number ;;
        esac
    done <"$1/wanted"
    [ -e "$cert" ] && [ -e "$key" ] || return 2
    anchor_credentials_pair "$cert" "$key"
}
