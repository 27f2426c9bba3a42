#!/bin/sh
# Copies the node's certificate and key from an NFS export that only this node, or its network, may mount. Whoever puts
# the files there may still be at it: they are taken when they are whole, do not change, and belong together.
# shellcheck disable=SC2154 # anchor_nfs_export, _files and _timeout are this stage's parameters

# usage: anchor_nfs_run
# Leaves client.crt, client.key and whatever else the list names (0600) in the credentials, and nothing mounted. Notes
# server, path, version and attempts. Statuses 0 and 1.
anchor_nfs_run() {
    local work="${ANCHOR_ROOT:-}/run/anchor/nfs-files" status
    # rd.debug traces every command with its values; a key must not get into a log.
    { set +x; } 2>/dev/null
    anchor_nfs__list || return 1
    anchor_nfs_export "$anchor_nfs_export"
    anchor_nfs_options "$anchor_nfs_given" || {
        anchor_fail "$anchor_nfs_error" "$anchor_nfs_hint"
        return 1
    }
    anchor_note server "$anchor_nfs_server"
    anchor_note path "$anchor_nfs_path"
    (
        umask 077
        trap 'anchor_nfs_umount; rm -rf "${work:?}"' EXIT
        trap 'exit 143' HUP INT TERM
        anchor_nfs__wait && anchor_nfs__keep
    )
    status=$?
    [ "$status" -eq 0 ] && anchor_info "credentials from $anchor_nfs_server:$anchor_nfs_path"
    return "$status"
}

# usage: anchor_nfs__list
# Checks the list of files. Sets anchor_nfs__wanted to one line per file: NAME SOURCE.
anchor_nfs__list() {
    local rest="$anchor_nfs_files," pair from to names=' '
    anchor_nfs__wanted=
    while [ -n "$rest" ]; do
        pair=${rest%%,*}
        rest=${rest#*,}
        from=${pair%%:*}
        to=${pair#"$from"}
        to=${to#:}
        anchor_credentials_place "$to"
        case /$from/ in
            // | */../* | */./*) anchor_credentials_name= ;;
        esac
        if [ -z "$anchor_credentials_name" ]; then
            anchor_fail "rd.anchor.nfs.files has an entry that is no source:destination, or whose destination is not allowed" \
                "sources are paths in the export; destinations /client.cert, /client.key or /run/anchor/credentials/NAME"
            return 1
        fi
        case $names in
            *" $anchor_credentials_name "*)
                anchor_fail "rd.anchor.nfs.files has two files for $anchor_credentials_name" "give each destination once"
                return 1
                ;;
        esac
        names="$names$anchor_credentials_name "
        anchor_nfs__wanted="$anchor_nfs__wanted$anchor_credentials_name $from
"
    done
    case $names in
        *' client.crt '*) pair=1 ;;
        *) pair=0 ;;
    esac
    case $pair$names in
        1*' client.key '*) return 0 ;;
        0*' client.key '* | 1*)
            anchor_fail "rd.anchor.nfs.files has a certificate without its key, or a key without its certificate" \
                "give both: CERT:/client.cert,KEY:/client.key"
            return 1
            ;;
    esac
}

# usage: anchor_nfs__wait
# Tries until all files are whole, or the time is up. Reads work.
anchor_nfs__wait() {
    local attempt=0 end left limit random what
    anchor_uptime_ms
    end=$((anchor_uptime_ms + anchor_nfs_timeout * 1000))
    while :; do
        attempt=$((attempt + 1))
        anchor_note_number attempts "$attempt"
        anchor_uptime_ms
        left=$(((end - anchor_uptime_ms + 999) / 1000))
        limit=$left
        [ "$limit" -le 30 ] || limit=30
        # The kernel may not answer from what it saw before: somebody else writes these files.
        if anchor_nfs_mount "$limit" noac,lookupcache=none; then
            anchor_note version "$anchor_nfs_version"
            anchor_nfs__copy && anchor_nfs__judge && return 0
            anchor_nfs_umount
        fi
        anchor_uptime_ms
        left=$((end - anchor_uptime_ms))
        if [ "$anchor_nfs_final" = 1 ] || [ "$left" -le 500 ]; then
            what=
            [ "$anchor_nfs_final" = 1 ] || what=" (attempts: $attempt, time limit: $anchor_nfs_timeout s)"
            anchor_fail "$anchor_nfs_error$what" "$anchor_nfs_hint"
            return 1
        fi
        [ "$attempt" -ne 1 ] || anchor_warn "$anchor_nfs_error; waiting for it, up to $((left / 1000)) s"
        # 1 to 3 s, a different time on each node.
        random=$(od -An -N2 -tu2 /dev/urandom)
        random=$((1000 + ${random##* } % 2000))
        [ "$random" -lt "$left" ] || random=$((left / 2))
        sleep $((random / 1000)).$((random % 1000 / 100))
    done
}

# usage: anchor_nfs__copy
# Copies every file, then sees after a second whether one changed meanwhile.
anchor_nfs__copy() {
    local name from seen=''
    anchor_nfs_final=0
    rm -rf "${work:?}"
    if ! mkdir "$work"; then
        anchor_nfs__never "cannot write to ${work%/*}" "is there memory left for /run?"
        return 1
    fi
    while read -r name from; do
        [ -n "$name" ] || continue
        anchor_nfs_file "$from" || return 1
        if [ "$anchor_nfs_size" -gt "$ANCHOR_CREDENTIALS_MAX" ]; then
            anchor_nfs__never "$from is larger than any credentials ($anchor_nfs_size bytes)" "check rd.anchor.nfs.files"
            return 1
        fi
        printf '%s\n' "$anchor_nfs_identity" >"$work/$name.identity"
        : >"$work/$name"
        anchor_nfs_copy "$work/$name" 0 "$((ANCHOR_CREDENTIALS_MAX + 1))" 30 15 || return 1
        anchor_fetch_size "$work/$name"
        if [ "$anchor_fetch_size" != "$anchor_nfs_size" ]; then
            anchor_nfs__changed "$from"
            anchor_nfs_error="$anchor_nfs_error: got $anchor_fetch_size of $anchor_nfs_size bytes"
            return 1
        fi
    done <<END
$anchor_nfs__wanted
END
    sleep 1
    while read -r name from; do
        [ -n "$name" ] || continue
        anchor_nfs_file "$from" || return 1
        IFS= read -r seen <"$work/$name.identity"
        [ "$seen" = "$anchor_nfs_identity" ] || anchor_nfs__changed "$from" || return 1
        rm -f "$work/$name.identity"
    done <<END
$anchor_nfs__wanted
END
}

# usage: anchor_nfs__changed FILE
# Always returns 1.
anchor_nfs__changed() {
    anchor_nfs_error="$1 changed while it was copied"
    anchor_nfs_hint="make it elsewhere and move it into place when it is whole"
    return 1
}

# usage: anchor_nfs__judge
# Whether each file is whole, and certificate and key belong together.
anchor_nfs__judge() {
    local name from kind
    anchor_credentials_error=
    while read -r name from; do
        [ -n "$name" ] || continue
        case $name in
            client.crt) kind=cert ;;
            client.key) kind=key ;;
            *) kind=any ;;
        esac
        anchor_credentials_whole "$work/$name" "$kind" || break
    done <<END
$anchor_nfs__wanted
END
    [ -n "$anchor_credentials_error" ] || [ ! -e "$work/client.key" ] ||
        anchor_credentials_pair "$work/client.crt" "$work/client.key"
    [ -n "$anchor_credentials_error" ] || return 0
    anchor_nfs_error="$anchor_nfs_server:$anchor_nfs_path: $anchor_credentials_error"
    anchor_nfs_hint=$anchor_credentials_hint
    return 1
}

# usage: anchor_nfs__keep
# Moves the files into the credentials.
anchor_nfs__keep() {
    local to="${ANCHOR_ROOT:-}/run/anchor/credentials" file
    anchor_nfs_umount || anchor_warn "the export $anchor_nfs_server:$anchor_nfs_path could not be unmounted"
    for file in "$work"/*; do
        case $file in
            */client.crt | */client.key) ;;
            *)
                mv -f "$file" "$to/" || {
                    anchor_fail "cannot write to $to" "is there memory left for /run?"
                    return 1
                }
                ;;
        esac
    done
    [ -e "$work/client.key" ] || return 0
    anchor_credentials_keep "$work/client.crt" "$work/client.key" && return 0
    anchor_fail "$anchor_credentials_error" "$anchor_credentials_hint"
}
