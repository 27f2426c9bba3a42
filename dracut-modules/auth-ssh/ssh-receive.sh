#!/bin/sh
# usage: ssh-receive DIR
#
# What the ssh stage's server runs for whoever has the trusted key, whatever they asked for: that is in
# SSH_ORIGINAL_COMMAND. It takes the files that the node waits for, and nothing else:
#
#   put NAME [SIZE] | cat > NAME     one file from standard input
#   scp -t TARGET                    the older protocol of scp (scp -O), which announces sizes
#   status, or nothing               prints what is missing
#
# A file is written aside and moved to DIR/in only when it is whole. The request is text: it is split at blanks and
# compared, and nothing in it is expanded.

ANCHOR_RECEIVE_MAX=1048576

dir=$1
ANCHOR_ROOT=${dir%/run/anchor/ssh} # the server starts this with an empty environment
. "${0%/*}/lib/anchor-credentials.sh" || exit 1
. "${0%/*}/lib/anchor-ssh.sh" || exit 1
umask 077
unset TMPDIR
partial=$dir/in/.partial.$$
trap 'rm -f "$partial"' EXIT
trap 'exit 143' HUP INT TERM
peer=${SSH_CONNECTION%% *}

# usage: tell TEXT
# One line for the node's console; the stage prints it.
tell() {
    printf '%s\n' "${peer:-somebody} $1" >>"$dir/said"
}

# usage: refuse TEXT
# Says no to the sender: in scp's protocol, or on standard error. Always status 1.
refuse() {
    if [ -n "$speaks_scp" ]; then
        printf '\001%s\n' "anchor: $1"
    else
        printf '%s\n' "anchor: $1" >&2
    fi
    return 1
}

# usage: take NAME SIZE
# Takes one file from standard input; SIZE may be empty. Status 1 when it is refused; the sender has been told.
take() {
    local number path most=$((ANCHOR_RECEIVE_MAX + 1))
    if ! anchor_ssh_find "$dir" "$1"; then
        anchor_ssh_missing "$dir"
        refuse "this node does not wait for a file of that name, but for: $anchor_ssh_wanted"
        return 1
    fi
    number=$anchor_ssh_number
    path=$anchor_ssh_path
    case $2 in
        *[!0-9]* | ????????*)
            refuse "$path is too large: at most $ANCHOR_RECEIVE_MAX bytes are taken"
            return 1
            ;;
        ?*)
            # With zeros before it, a shell would take it for octal.
            most=${2#"${2%%[!0]*}"}
            most=${most:-0}
            set -- "$1" "$most"
            ;;
    esac
    # One byte more than announced would show that it was not all; scp's protocol goes on after the file.
    [ -z "$2" ] || [ -n "$speaks_scp" ] || most=$((most + 1))
    [ -z "$speaks_scp" ] || printf '\000'
    if ! head -c "$most" 2>/dev/null >"$partial"; then
        refuse "$path cannot be written on the node: is its memory full?"
        return 1
    fi
    if [ "$(stat -c %s "$partial")" -gt "$ANCHOR_RECEIVE_MAX" ]; then
        refuse "$path is too large: at most $ANCHOR_RECEIVE_MAX bytes are taken"
        return 1
    fi
    if [ -n "$speaks_scp" ]; then
        case $(head -c 1 | od -A n -t u1) in
            *[1-9]*)
                refuse "the sender could not read all of $path"
                return 1
                ;;
        esac
    fi
    if ! anchor_ssh_check "$partial" "$path" "$2"; then
        tell "sent a file for $path that was refused: it $anchor_ssh_reason"
        refuse "$path was refused: it $anchor_ssh_reason"
        return 1
    fi
    if ! mv -f "$partial" "$dir/in/$number"; then
        refuse "$path cannot be kept on the node: is its memory full?"
        return 1
    fi
    tell "sent $path"
    anchor_ssh_pair_here "$dir"
    if [ $? -eq 1 ]; then
        refuse "client.key and client.cert do not belong together: send the right one again"
        return 1
    fi
    [ -z "$speaks_scp" ] || printf '\000'
}

# usage: sink TARGET
# The receiving side of scp's protocol: lines such as "C0600 227 client.key", each followed by the bytes and a zero byte.
sink() {
    local target="$1" line name
    printf '\000'
    while IFS= read -r line; do
        case $line in
            C[0-7][0-7][0-7][0-7]\ [0-9]*\ ?*)
                line=${line#C???? }
                name=${line#* }
                # TARGET is the file, or a directory: what is wanted tells.
                case $target in
                    . | './' | '~' | /) ;;
                    *) if anchor_ssh_find "$dir" "$target"; then name=$target; else name=${target%/}/$name; fi ;;
                esac
                # After a refused file nobody can tell its bytes from what follows: the sender has to begin anew.
                take "$name" "${line%% *}" || return 1
                ;;
            T[0-9]*) printf '\000' ;;
            *)
                refuse "only files are taken"
                return 1
                ;;
        esac
    done
}

# usage: show_missing
show_missing() {
    if anchor_ssh_missing "$dir"; then
        printf '%s\n' "this node waits for: $anchor_ssh_missing" \
            "send them with: scp -O FILE... root@NODE:/   or one with: ssh root@NODE put NAME <FILE"
    else
        printf '%s\n' "all files have come"
    fi
}

speaks_scp=
set -f
# shellcheck disable=SC2086 # split at blanks on purpose; set -f keeps it from being anything more
set -- ${SSH_ORIGINAL_COMMAND:-status}
case "$# $1 ${2:-}" in
    '1 status '*) show_missing ;;
    '2 put '* | '3 put '*) take "$2" "${3:-}" ;;
    '2 cat >'?*) take "${2#>}" '' ;;
    '3 cat >') take "$3" '' ;;
    *' scp '*)
        speaks_scp=1
        what=
        while [ $# -gt 2 ]; do
            shift
            [ "$1" != -t ] || what=to
        done
        case $what in
            to) sink "$2" ;;
            *) refuse "files can only be sent here" ;;
        esac
        ;;
    *sftp*) refuse "this node does not speak SFTP: use scp -O, or ssh root@NODE put NAME <FILE" ;;
    *) refuse "only these are possible here: put NAME [SIZE] <FILE, scp -O FILE... root@NODE:/, status" ;;
esac
