#!/bin/sh
# One attempt to fetch over rsync: rsync://HOST/MODULE/PATH from a daemon, rsync+ssh://USER@HOST/PATH through ssh.
#
# In rsync's protocol the sender says where in a file its bytes belong, and may send a part twice. A server that nobody
# vouches for could so change what the digest has already passed. rsync therefore writes into a file of its own
# (FILE.rsync/part), from which this stage copies each byte once, in order, to the end of FILE; what has been copied is
# punched out again, so the image is in memory once.

ANCHOR_RSYNC_WORDS=65536 # bytes that rsync may say

# usage: anchor_rsync_run URL FILE MAX_BYTES
# Statuses as in anchor-fetch.sh. Keeps in FILE.rsync/version which version of which URL FILE has: its size and time.
# The helpers below share these locals.
anchor_rsync_run() {
    local url="$1" file="$2" max="$3" state="$2.rsync" offset status='' text='' size='' stamp='' user host port path
    local scheme="${1%%://*}"
    # rd.debug traces every command with its values; neither the password nor the key must get into a log.
    { set +x; } 2>/dev/null
    anchor_fetch_plain "$url"
    anchor_fetch_size "$file"
    offset=$anchor_fetch_size
    anchor_rsync__parse && anchor_rsync__prepare || return 1
    anchor_rsync__links=
    anchor_rsync__call "$state/list" --list-only
    # A link is followed only where there is one: rrsync, which confines a key to a directory, refuses to.
    if [ "$status" -eq 0 ] && IFS= read -r text <"$state/list" && [ "${text#l}" != "$text" ]; then
        anchor_rsync__links=-L
        anchor_rsync__call "$state/list" --list-only -L
    fi
    anchor_rsync__words
    if [ "$status" -ne 0 ]; then
        anchor_rsync__judge
        return
    fi
    anchor_rsync__listed || return 1
    if [ "$size" -gt "$max" ]; then
        anchor_fetch_too_large "$size"
        return 1
    fi
    # A stream needs no room, but rsync does: it writes to a file of its own, which may get ahead of who takes the bytes.
    if [ -p "$file" ] && [ "$size" -gt "$anchor_fetch_memory" ]; then
        anchor_rsync__no_stream
        return 1
    fi
    if [ "$offset" -gt 0 ] && ! anchor_rsync__same; then
        anchor_fetch_error="what is here is of another version, or came from elsewhere"
        return 3
    fi
    printf '%s\n%s\n%s\n' "$url" "$size" "$stamp" >"$state/version"
    [ "$offset" -lt "$size" ] || return 0
    anchor_rsync__transfer
    anchor_fetch_size "$file"
    anchor_rsync__words
    if [ "$status" -ne 0 ]; then
        anchor_rsync__judge
        return
    fi
    anchor_rsync__received
}

# usage: anchor_rsync__total FILE
# Sets anchor_fetch_total to the size that FILE will have, or to nothing before the server said it.
anchor_rsync__total() {
    anchor_fetch_total=
    [ ! -r "$1.rsync/version" ] || {
        IFS= read -r anchor_fetch_total
        IFS= read -r anchor_fetch_total
    } <"$1.rsync/version"
}

# usage: anchor_rsync__parse
# Takes the URL apart into user, password, host, port and path. What a remote shell, rsync or ssh would read as more
# than a name is refused: quotes, wildcards, a dash at the beginning.
anchor_rsync__parse() {
    local rest="${url#*://}" LC_ALL=C hint="use a name of letters, digits, dots, dashes and underscores"
    user=''
    port=''
    anchor_rsync__password=$anchor_rsync_password
    path=/${rest#*/}
    host=${rest%%/*}
    case $host in
        *@*)
            user=${host%@*}
            host=${host##*@}
            ;;
    esac
    case $user in
        *:*)
            anchor_rsync__password=${user#*:}
            user=${user%%:*}
            ;;
    esac
    case $host in
        \[*\]:*) port=${host##*\]:} host=${host%:*} ;;
        \[*\]) ;;
        *:*) port=${host##*:} host=${host%:*} ;;
    esac
    case $user in
        -* | *[!A-Za-z0-9._-]*)
            anchor_fail "the user in $anchor_fetch_url cannot be used" "$hint"
            return 1
            ;;
    esac
    case $host in
        \[*[!0-9A-Fa-f:.]*\] | '' | -*) host= ;;
        \[*\]) ;;
        *[!A-Za-z0-9._-]*) host= ;;
    esac
    case $port in
        *[!0-9]* | ??????*) host= ;;
    esac
    case $path in
        *[!A-Za-z0-9._/@+,=:-]* | / | */ | */../* | */./* | */..) path= ;;
    esac
    if [ -z "$host" ] || [ -z "$path" ]; then
        anchor_fail "$anchor_fetch_url names no file in a way that rsync can be given" \
            "write rsync://HOST/MODULE/PATH or rsync+ssh://USER@HOST/PATH; letters, digits and . _ / @ + , = : - are taken"
        return 1
    fi
}

# usage: anchor_rsync__prepare
# Makes the state directory with what rsync and ssh read from files. The environment counts for nothing: unknown words
# of the kernel command line end up there.
anchor_rsync__prepare() {
    local key="${ANCHOR_ROOT:-}/run/anchor/credentials/client.key"
    unset RSYNC_PROXY RSYNC_CONNECT_PROG RSYNC_RSH RSYNC_OLD_ARGS RSYNC_PROTECT_ARGS RSYNC_PASSWORD RSYNC_PARTIAL_DIR \
        RSYNC_PORT RSYNC_CHECKSUM_LIST RSYNC_COMPRESS_LIST RSYNC_ICONV SSH_AUTH_SOCK SSH_ASKPASS DISPLAY
    if ! { [ -d "$state" ] || mkdir -m 700 "$state"; } || ! rm -f "$state/part" "$state/error"; then
        anchor_fail "cannot write to ${state%/*}" "is its file system full? $anchor_fetch_room"
        return 1
    fi
    if [ "$scheme" = rsync ]; then
        (umask 077 && printf '%s\n' "$anchor_rsync__password" >"$state/password")
        return
    fi
    case $anchor_rsync_host_key in
        '')
            anchor_fail "the SSH server's host key is not known, so nobody vouches for $host" \
                "build it in: --set rd.anchor.rsync.host_key=@ssh_host_ed25519_key.pub"
            return 1
            ;;
        /*)
            anchor_rsync__hosts="${ANCHOR_ROOT:-}$anchor_rsync_host_key"
            anchor_rsync__alias=
            if [ ! -r "$anchor_rsync__hosts" ]; then
                anchor_fail "the file of known hosts $anchor_rsync_host_key is not in this initramfs" \
                    "give the host key itself: --set rd.anchor.rsync.host_key=@ssh_host_ed25519_key.pub"
                return 1
            fi
            ;;
        *)
            anchor_rsync__hosts=$state/hosts
            anchor_rsync__alias='HostKeyAlias server'
            printf 'server %s\n' "$anchor_rsync_host_key" >"$anchor_rsync__hosts"
            ;;
    esac
    if [ -n "$anchor_rsync_ssh_key" ]; then
        key=$state/key
        if ! (umask 077 && printf '%s' "$anchor_rsync_ssh_key" | base64 -d 2>/dev/null >"$key") || [ ! -s "$key" ]; then
            anchor_fail "rd.anchor.rsync.ssh_key is not a key in base64" "make it with: base64 -w0 id_ed25519 >FILE"
            return 1
        fi
    elif [ ! -s "$key" ]; then
        anchor_fail "this node has no key for SSH" "build one in (rd.anchor.rsync.ssh_key), or choose an auth stage"
        return 1
    fi
    anchor_rsync__ssh_config "$key" >"$state/ssh"
}

# usage: anchor_rsync__ssh_config KEY
# Prints the whole of ssh's configuration: one key, known hosts only, no questions, nothing but this connection.
anchor_rsync__ssh_config() {
    printf '%s\n' "BatchMode yes" "StrictHostKeyChecking yes" "UserKnownHostsFile $anchor_rsync__hosts" \
        "GlobalKnownHostsFile /dev/null" "IdentityFile $1" "IdentitiesOnly yes" "IdentityAgent none" \
        "PreferredAuthentications publickey" "CheckHostIP no" "UpdateHostKeys no" "ForwardAgent no" "ForwardX11 no" \
        "ClearAllForwardings yes" "ProxyCommand none" "PermitLocalCommand no" "CanonicalizeHostname no" \
        "RequestTTY no" "LogLevel ERROR" "ConnectTimeout $anchor_fetch_connect_timeout" \
        "ServerAliveInterval $anchor_fetch_stall" "ServerAliveCountMax 1"
    [ -z "$anchor_rsync__alias" ] || printf '%s\n' "$anchor_rsync__alias"
    [ -z "$port" ] || printf 'Port %s\n' "$port"
}

# usage: anchor_rsync__call OUTPUT ARGUMENT...
# Runs rsync on the URL; sets status to its own. Messages are in the state directory.
anchor_rsync__call() {
    local output="$1" where
    shift
    set -- "$@" --no-motd --timeout="$anchor_fetch_stall"
    if [ "$scheme" = rsync ]; then
        [ -z "$anchor_rsync__password" ] || set -- "$@" --password-file="$state/password"
        where="rsync://${user:+$user@}$host${port:+:$port}$path"
        set -- "$@" --contimeout="$anchor_fetch_connect_timeout" -- "$where"
    else
        # The path goes through the server's shell: anchor_rsync__parse let nothing through that means anything to it.
        set -- "$@" --rsh="ssh -F $state/ssh" -- "${user:+$user@}$host:$path"
    fi
    [ "$output" != "$state/done" ] || set -- "$@" "$state/part"
    status=$(
        trap '' XFSZ
        ulimit -f $((max / 512 + 2)) 2>/dev/null
        {
            {
                {
                    timeout -k 1 "$anchor_fetch_left" rsync "$@" </dev/null 4>&-
                    printf '%s\n' "$?" >&4
                } 2>&1 >&3 3>&- | anchor_rsync__words_only >"$state/error" 4>&-
            } 3>&1 | anchor_rsync__words_only >"$output" 4>&-
        } 4>&1
    )
    # Without one, rsync was killed.
    status=${status:-137}
}

# usage: anchor_rsync__words_only <PIPE
# Copies what rsync says, up to a limit: a server may have it say whatever it likes, for as long as it likes, and that would
# go to the node's memory. Who says more finds nobody who listens. Nor does anybody after the time for it: what rsync
# started may outlive it, and hold the pipe.
anchor_rsync__words_only() {
    exec timeout "$((anchor_fetch_left + 2))" \
        dd bs=4096 count="$ANCHOR_RSYNC_WORDS" iflag=fullblock,count_bytes status=none 2>/dev/null
}

# usage: anchor_rsync__listed
# Sets size and stamp from the server's listing, which is one line: "-rw-r--r--  3,000,000 2026/01/02 03:04:05 name".
anchor_rsync__listed() {
    local mode bytes day time rest more='' number=''
    {
        read -r mode bytes day time rest
        IFS= read -r more
    } <"$state/list"
    case $mode:$more in
        -*:) ;;
        *)
            anchor_fail "$anchor_fetch_url is not a single file" "check the path in the URL"
            return 1
            ;;
    esac
    while :; do
        number=$number${bytes%%,*}
        case $bytes in
            *,*) bytes=${bytes#*,} ;;
            *) break ;;
        esac
    done
    case $number in
        '' | *[!0-9]* | ????????????????*) number= ;;
    esac
    case $day$time in
        *[!0-9/:]*) number= ;;
    esac
    if [ -z "$number" ]; then
        anchor_fail "the listing of $anchor_fetch_url cannot be understood" "is this an rsync server?"
        return 1
    fi
    # With zeros before it, a shell would take it for octal.
    size=${number#"${number%%[!0]*}"}
    size=${size:-0}
    stamp="$day $time"
}

# usage: anchor_rsync__same
# Whether FILE can be continued: its digest is known, so mixing versions would be noticed; or this transport began it, and
# the server's file has still the same size and time.
anchor_rsync__same() {
    local old_url='' old_size='' old_stamp=''
    [ "$offset" -le "$size" ] || return 1
    [ "${anchor_fetch_verified:-}" != 1 ] || return 0
    [ -r "$state/version" ] || return 1
    {
        IFS= read -r old_url
        IFS= read -r old_size
        IFS= read -r old_stamp
    } <"$state/version"
    [ "$old_url:$old_size:$old_stamp" = "$url:$size:$stamp" ]
}

# usage: anchor_rsync__transfer
# Lets rsync append to a sparse file as long as FILE, and copies on what arrives. Sets status to rsync's, or to 11 where
# FILE could not be written.
anchor_rsync__transfer() {
    local child copied=0
    if ! truncate -s "$offset" "$state/part" || ! exec 6<"$state/part" || ! dd skip="$offset" count=0 iflag=skip_bytes <&6 2>/dev/null; then
        status=11
        return
    fi
    (
        # shellcheck disable=SC2086 # an option or nothing
        anchor_rsync__call "$state/done" $anchor_rsync__links --append --out-format='%l %M'
        exit "$status"
    ) &
    child=$!
    while kill -0 "$child" 2>/dev/null; do
        anchor_rsync__copy || copied=$?
        [ "$copied" -eq 0 ] || break
        sleep 0.1
    done
    if [ "$copied" -ne 0 ]; then
        # rsync itself ends within its time limits; its file is gone, and nothing more is copied.
        rm -f "$state/part"
    fi
    wait "$child"
    status=$?
    [ "$copied" -ne 0 ] || anchor_rsync__copy || copied=$?
    [ "$copied" -eq 0 ] || status=11
    exec 6<&-
    rm -f "$state/part"
}

# usage: anchor_rsync__copy
# Appends to FILE what is new in the part (file descriptor 6 goes on where it stopped), then gives its memory back.
anchor_rsync__copy() {
    cat <&6 >>"$file" 2>"$state/copy" || return 1
    anchor_fetch_size "$file"
    [ "$anchor_fetch_size" -le "$offset" ] || fallocate -p -o 0 -l "$anchor_fetch_size" "$state/part" 2>/dev/null || :
}

# usage: anchor_rsync__received
# rsync is content: so is this stage if all of the version came that was listed.
anchor_rsync__received() {
    local sent=''
    [ ! -s "$state/done" ] || IFS= read -r sent <"$state/done"
    if [ "$sent" != "$size ${stamp% *}-${stamp#* }" ] || [ "$anchor_fetch_size" != "$size" ]; then
        anchor_fetch_error="the file changed on the server while it was fetched"
        return 3
    fi
}

# usage: anchor_rsync__words
# Sets text to the first line that rsync or ssh said.
anchor_rsync__words() {
    text=
    [ ! -s "$state/error" ] || IFS= read -r text <"$state/error"
    text=${text#rsync: }
    text=${text#"[Receiver] "}
    text=${text#@ERROR: }
    text=$(printf '%.300s' "$text")
}

# usage: anchor_rsync__reject
# The known server does not want the key, or ssh cannot use it: where auth made it, another try gets another one.
anchor_rsync__reject() {
    [ -n "$anchor_rsync_ssh_key" ] || anchor_reject_credentials
}

# usage: anchor_rsync__no_stream
anchor_rsync__no_stream() {
    local needs
    anchor_fetch_amount "$size"
    needs=$anchor_fetch_amount
    # Less may be left than shall stay free.
    anchor_fetch_amount $((anchor_fetch_memory > 0 ? anchor_fetch_memory : 0))
    anchor_fail "rsync cannot stream $anchor_fetch_url: it keeps the file in memory, which has room for $anchor_fetch_amount of $needs" \
        "serve it over https, s3 or nfs, which stream, or give the node more memory"
}

# usage: anchor_rsync__again ERROR [HINT]
# A failure that may pass.
anchor_rsync__again() {
    anchor_fetch_error=$1
    anchor_fetch_hint=${2:-}
    return 2
}

# usage: anchor_rsync__judge
# Says what rsync's exit status (rsync(1), EXIT VALUES) and first words mean. Statuses of anchor_rsync_run.
anchor_rsync__judge() {
    local said
    said=$(cat "$state/error" 2>/dev/null)
    case $status:$said in
        127:*) anchor_fail "rsync is not in the initramfs" "build it anew: the rsync transport brings rsync" ;;
        *"Host key verification failed"* | *"HOST IDENTIFICATION HAS CHANGED"*)
            anchor_fail "$host shows another host key than the one that is known" \
                "if the server's key was renewed, build it in again (rd.anchor.rsync.host_key)"
            ;;
        *"Permission denied ("* | *"Too many authentication failures"*)
            anchor_rsync__reject
            anchor_fail "$host does not let this node in: $text" \
                "the server must trust the node's key: rd.anchor.rsync.ssh_key, or client.key of the auth step"
            ;;
        *"error in libcrypto"* | *"invalid format"* | *"incorrect passphrase"*)
            anchor_rsync__reject
            anchor_fail "the node's SSH key cannot be used: $text" "it must be a private key without a pass phrase"
            ;;
        *"max connections"*) anchor_rsync__again "$host has too many clients: $text" "see how many nodes boot at once" ;;
        5:*"nknown module"* | 5:*chroot* | 5:*chdir*)
            anchor_fail "$host has no such module: $text" "check the first part of the path in the URL"
            ;;
        5:*auth* | 5:*"access denied"*)
            anchor_fail "$host does not let this node in: $text" "check the user in the URL, and rd.anchor.rsync.password"
            ;;
        11:* | 20:*"File too large"* | *"No space left"*)
            anchor_fail "cannot write the download: ${text:-rsync ended with status $status}" \
                "is ${file%/*} full? $anchor_fetch_room"
            ;;
        23:*"No such file"* | 3:*)
            anchor_fail "$anchor_fetch_url is not there: $text" "check the path in the URL, and that the image was published"
            ;;
        23:*) anchor_fail "$anchor_fetch_url may not be read: $text" "check the file's permissions on the server" ;;
        124:* | 137:*) anchor_rsync__again "the time for this download is up" "rd.anchor.fetch.timeout= is the limit" ;;
        30:* | 35:*)
            anchor_rsync__again "$host is too slow or silent: $text" \
                "check the network; rd.anchor.fetch.connect_timeout, .stall and .timeout are the limits"
            ;;
        *"has been disabled on this server"*)
            anchor_fail "$host does not allow what this needs: $text" \
                "is the path a link? rrsync follows none: name the file itself, or lift that limit for this key"
            ;;
        1:* | 2:* | 4:*) anchor_fail "$host and this node's rsync do not understand each other: $text" "is it an rsync server?" ;;
        *) anchor_rsync__again "the transfer from $host broke: ${text:-rsync ended with status $status}" ;;
    esac
}
