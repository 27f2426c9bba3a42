#!/bin/sh
# Waits for the node's credentials from whoever has the trusted SSH key.
#
# The stage runs dropbear with a host key of this boot. The trusted key opens no shell, forwards nothing, and starts
# one program only (ssh-receive), which takes the files that are waited for. The stage looks at what has come
# (anchor-ssh.sh), puts it in place when it is complete and fits together, and takes the server down on every way out.
# Meanwhile it tells a site's service, if there is one, where the node waits.

# usage: anchor_ssh_run
# Reads the stage's parameters anchor_ssh_*. Leaves client.crt and client.key in the credentials, and other files at
# their paths, all 0600. Notes: fingerprint, from. Statuses 0 and 1.
anchor_ssh_run() {
    local dir="${ANCHOR_ROOT:-}/run/anchor/ssh"
    # rd.debug traces every command with its values; the lines of a key must not get into a log.
    { set +x; } 2>/dev/null
    anchor_ssh__server=
    anchor_ssh__telling=
    anchor_ssh__told=
    anchor_ssh__home=
    anchor_uptime_ms
    anchor_ssh__deadline=$((anchor_uptime_ms + anchor_ssh_timeout * 1000))
    (
        umask 077
        trap 'anchor_ssh__end' EXIT
        trap 'exit 143' HUP INT TERM
        anchor_ssh__prepare && anchor_ssh__serve && anchor_ssh__await
    )
}

# usage: anchor_ssh__prepare
# Makes DIR with what anchor-ssh.sh reads, the host key, and the account that the trusted key opens.
anchor_ssh__prepare() {
    local rest="$anchor_ssh_wait_files," number=0
    rm -rf "${dir:?}"
    if ! mkdir -p "$dir/in" "$dir/checked" || ! : >"$dir/said"; then
        anchor_fail "cannot write to $dir" "is there memory left for /run?"
        return 1
    fi
    while [ -n "$rest" ]; do
        if ! anchor_ssh__target "${rest%%,*}"; then
            anchor_fail "rd.anchor.ssh.wait_files has a place that is not allowed" \
                "files belong to /client.cert, /client.key or /run/anchor/credentials/NAME"
            return 1
        fi
        printf '%s\n' "${rest%%,*}" >&3
        rest=${rest#*,}
    done 3>"$dir/wanted"
    # What an earlier try of this boot left, or somebody put into the initramfs, need not be sent again.
    while IFS= read -r rest; do
        number=$((number + 1))
        anchor_ssh__target "$rest"
        [ -s "$anchor_ssh__target" ] || anchor_ssh__target="${ANCHOR_ROOT:-}$rest"
        [ ! -s "$anchor_ssh__target" ] || ! anchor_ssh_check "$anchor_ssh__target" "$rest" '' ||
            cp "$anchor_ssh__target" "$dir/in/$number"
    done <"$dir/wanted"
    anchor_ssh__trusted >"$dir/trusted" || return 1
    anchor_ssh__account && anchor_ssh__host_key
}

# usage: anchor_ssh__target PATH
# Sets anchor_ssh__target to where the file that is waited for as PATH belongs on the node. Status 1 for no such place.
anchor_ssh__target() {
    anchor_credentials_place "$1" && anchor_ssh__target="${ANCHOR_ROOT:-}/run/anchor/credentials/$anchor_credentials_name"
}

# usage: anchor_ssh__trusted
# Prints the trusted keys as dropbear wants them: without options of their own, with ours. The forced command is given to
# the server, too.
anchor_ssh__trusted() {
    local type body rest found='' file="${ANCHOR_ROOT:-}$anchor_ssh_auth_key"
    local hint="give a line such as that in id_ed25519.pub: --set rd.anchor.ssh.auth_key=@FILE, or the path of such a file"
    case $anchor_ssh_auth_key in
        /*) ;;
        *)
            file=$dir/given
            printf '%s\n' "$anchor_ssh_auth_key" >"$file" || return 1
            ;;
    esac
    if [ ! -r "$file" ]; then
        anchor_fail "the trusted key is not in this initramfs: there is no file $anchor_ssh_auth_key" "$hint"
        return 1
    fi
    while read -r type body rest || [ -n "$type" ]; do
        case $type in
            '' | '#'*) continue ;;
            *[!A-Za-z0-9@.-]*) type= ;;
        esac
        case $body in
            *[!A-Za-z0-9+/=]*) body= ;;
            AAAA?*) ;;
            *) body= ;;
        esac
        if [ -z "$type" ] || [ -z "$body" ]; then
            anchor_fail "rd.anchor.ssh.auth_key holds a line that is no public key, or one with options" "$hint"
            return 1
        fi
        printf 'no-port-forwarding,no-agent-forwarding,no-X11-forwarding,no-pty %s %s\n' "$type" "$body"
        found=1
    done <"$file"
    [ -n "$found" ] || anchor_fail "rd.anchor.ssh.auth_key holds no public key" "$hint"
}

# usage: anchor_ssh__account
# root with the trusted keys, and a shell that dropbear allows: it runs the forced command.
anchor_ssh__account() {
    local etc="${ANCHOR_ROOT:-}/etc" line user password uid gid name home shell found=''
    while IFS= read -r line || [ -n "$line" ]; do
        case $line in root:*) found=$line ;; esac
    done 2>/dev/null <"$etc/passwd"
    IFS=: read -r user password uid gid name home shell <<EOF
${found:-root:x:0:0:root:/root:/bin/sh}
EOF
    case $home in
        '' | /) home=/root ;;
    esac
    [ -x "$shell" ] || shell=/bin/sh
    line="$user:$password:$uid:$gid:$name:$home:$shell"
    if [ "$line" != "$found" ]; then
        {
            printf '%s\n' "$line"
            while IFS= read -r found || [ -n "$found" ]; do
                case $found in root:*) ;; *) printf '%s\n' "$found" ;; esac
            done 2>/dev/null <"$etc/passwd"
        } >"$dir/passwd" && chmod 0644 "$dir/passwd" && cat "$dir/passwd" >"$etc/passwd"
    fi
    found=
    while read -r line; do
        [ "$line" != "$shell" ] || found=1
    done 2>/dev/null <"$etc/shells"
    anchor_ssh__home="${ANCHOR_ROOT:-}$home"
    { [ -n "$found" ] || printf '%s\n' "$shell" >>"$etc/shells"; } && mkdir -p "$anchor_ssh__home/.ssh" &&
        chmod 0700 "$anchor_ssh__home" "$anchor_ssh__home/.ssh" &&
        cat "$dir/trusted" >"$anchor_ssh__home/.ssh/authorized_keys" && return 0
    anchor_fail "cannot prepare the account for the trusted key" "is the root file system of the initramfs full?"
}

# usage: anchor_ssh__host_key
# Makes the host key of this boot. Sets anchor_ssh__fingerprint, in the form that ssh shows.
anchor_ssh__host_key() {
    local type name body rest sum octal=''
    for type in ed25519 ecdsa; do
        dropbearkey -t "$type" -f "$dir/hostkey" >"$dir/public" 2>/dev/null && break
        rm -f "$dir/hostkey"
    done
    while read -r name body rest; do
        case $name:$body in *-*:AAAA*) break ;; esac
    done <"$dir/public"
    # Older dropbearkeys print MD5 or SHA-1: the fingerprint is the SHA-256 of the key, in base64 without its padding.
    sum=$(printf '%s' "$body" | base64 -d 2>/dev/null | sha256sum)
    sum=${sum%% *}
    if [ ! -s "$dir/hostkey" ] || [ -z "$body" ] || [ ${#sum} -ne 64 ]; then
        anchor_fail "cannot make a host key with dropbearkey" "is there memory left for /run?"
        return 1
    fi
    while [ -n "$sum" ]; do
        rest=${sum#??}
        name=$((0x${sum%"$rest"}))
        octal="$octal\\0$((name / 64))$((name / 8 % 8))$((name % 8))"
        sum=$rest
    done
    sum=$(printf '%b' "$octal" | base64)
    anchor_ssh__fingerprint=SHA256:${sum%%=*}
    anchor_note fingerprint "$anchor_ssh__fingerprint"
}

# usage: anchor_ssh__serve
# Starts the server and waits until it listens. timeout(1) makes sure that it ends even if this shell is killed. Its log
# is bounded, for strangers write it; the same limit holds for what it starts.
anchor_ssh__serve() {
    local tries=100 reason=''
    ip link set lo up 2>/dev/null
    (
        trap '' XFSZ
        ulimit -f 4096
        exec timeout -k 1 $((anchor_ssh_timeout + 5)) dropbear -F -E -m -s -j -k -I 60 -K 15 -r "$dir/hostkey" \
            -p "$anchor_ssh_port" -P "$dir/pid" -c "exec ${ANCHOR_ROOT:-}/usr/lib/anchor/ssh-receive $dir"
    ) </dev/null >/dev/null 2>"$dir/log" &
    anchor_ssh__server=$!
    while [ "$tries" -gt 0 ] && kill -0 "$anchor_ssh__server" 2>/dev/null; do
        [ ! -s "$dir/pid" ] || return 0
        sleep 0.05
        tries=$((tries - 1))
    done
    anchor_ssh__last_words
    anchor_fail "the SSH server does not start: ${anchor_ssh__last_words:-no reason given}" \
        "is port $anchor_ssh_port free? rd.anchor.ssh.port= chooses another"
}

# usage: anchor_ssh__last_words
# Sets anchor_ssh__last_words to the last line of the server's log, without its process id and time.
anchor_ssh__last_words() {
    local line
    anchor_ssh__last_words=
    while IFS= read -r line || [ -n "$line" ]; do
        anchor_ssh__last_words=${line#"["*"] "}
    done <"$dir/log"
}

# usage: anchor_ssh__await
# Waits until the files are here and in place, the time is up, or the server is gone.
anchor_ssh__await() {
    local line news=1 told=0 verdict
    anchor_ssh__where
    anchor_ssh_missing "$dir" || :
    anchor_info "waiting for $anchor_ssh_wanted by SSH at $anchor_ssh__at, for $anchor_ssh_timeout s;\
 host key $anchor_ssh__fingerprint"
    exec 7<"$dir/said"
    anchor_uptime_ms
    anchor_ssh__next=$anchor_uptime_ms
    while :; do
        # One read after the other of a growing file: each goes on where the one before it stopped.
        while IFS= read -r line <&7; do
            anchor_info "$line"
            news=1
        done
        if [ -n "$news" ] && ! anchor_ssh_missing "$dir"; then
            anchor_ssh__settle
            verdict=$?
            [ "$verdict" -ne 0 ] || return 0
            [ "$verdict" -eq 2 ] || news=
        fi
        anchor_uptime_ms
        if [ "$anchor_uptime_ms" -ge "$anchor_ssh__deadline" ]; then
            anchor_ssh__late
            return 1
        fi
        if ! kill -0 "$anchor_ssh__server" 2>/dev/null; then
            anchor_ssh__last_words
            anchor_fail "the SSH server ended: ${anchor_ssh__last_words:-no reason given}"
            return 1
        fi
        anchor_ssh__notify
        sleep 0.3
    done
}

# usage: anchor_ssh__settle
# All files have come: checks key and certificate and puts everything in place. Works on copies, because the sender may
# replace a file at any time. Status 0 done, 1 not yet, 2 look again soon.
anchor_ssh__settle() {
    local path number=0
    rm -rf "${dir:?}/checked"
    mkdir "$dir/checked" && cp -R "$dir/in" "$dir/wanted" "$dir/checked/" || return 2
    anchor_ssh_pair_here "$dir/checked"
    if [ $? -eq 1 ]; then
        anchor_warn "client.key and client.cert do not belong together: waiting for the right ones"
        return 1
    fi
    while IFS= read -r path; do
        number=$((number + 1))
        anchor_ssh__target "$path"
        mkdir -p "${anchor_ssh__target%/*}" && cp "$dir/checked/in/$number" "$anchor_ssh__target.new" &&
            chmod 0600 "$anchor_ssh__target.new" && mv -f "$anchor_ssh__target.new" "$anchor_ssh__target" && continue
        anchor_warn "cannot write $path: is it a directory, or is the memory full?"
        return 1
    done <"$dir/wanted"
    anchor_info "$anchor_ssh_wanted: complete"
}

# usage: anchor_ssh__late
# Says what did not come in time, and how to send it.
anchor_ssh__late() {
    local what="client.key and client.cert came, but do not belong together"
    ! anchor_ssh_missing "$dir" || what="nobody sent $anchor_ssh_missing"
    anchor_fail "$what, within $anchor_ssh_timeout s" \
        "send them with scp -O FILE... root@NODE:/, or allow more time with rd.anchor.ssh.timeout="
}

# usage: anchor_ssh__end
# Takes everything down: the server first, so that nothing new begins, then its sessions, which lead process groups of
# their own. A sender whose file was the last one gets a moment to see its reply.
anchor_ssh__end() {
    local tries=20
    [ -z "$anchor_ssh__telling" ] || kill "$anchor_ssh__telling" 2>/dev/null
    if [ -n "$anchor_ssh__server" ]; then
        while :; do
            anchor_ssh__below "$anchor_ssh__server"
            # shellcheck disable=SC2086 # process ids, one word each: the server's first, then those of its sessions
            set -- $anchor_ssh__below
            if [ $# -le 1 ] || [ "$tries" -eq 0 ]; then break; fi
            sleep 0.1
            tries=$((tries - 1))
        done
        kill -KILL "$anchor_ssh__server" "$@" 2>/dev/null
        wait "$anchor_ssh__server" 2>/dev/null
    fi
    [ -z "$anchor_ssh__home" ] || rm -f "$anchor_ssh__home/.ssh/authorized_keys"
    rm -rf "${dir:?}"
}

# usage: anchor_ssh__below PID
# Sets anchor_ssh__below to the processes that PID started, and those that they started, parents first.
anchor_ssh__below() {
    local file line pid known=" $1 " more=1
    anchor_ssh__below=
    while [ -n "$more" ]; do
        more=
        for file in /proc/[0-9]*/stat; do
            { IFS= read -r line; } 2>/dev/null <"$file" || continue
            pid=${line%% *}
            # What is in parentheses is a name and may hold anything.
            line=${line##*') '}
            line=${line#* }
            case $known in *" $pid "*) continue ;; esac
            case $known in
                *" ${line%% *} "*)
                    known="$known$pid "
                    anchor_ssh__below="$anchor_ssh__below $pid"
                    more=1
                    ;;
            esac
        done
    done
}

# usage: anchor_ssh__where
# Finds the interface that BOOTIF names, or else the first one with an address. Sets anchor_ssh__dev, _mac, _addr,
# _addr6 (empty where there is none) and _at (for people).
anchor_ssh__where() {
    local index name family address rest wanted='' path
    anchor_ssh__dev='' anchor_ssh__mac='' anchor_ssh__addr='' anchor_ssh__addr6=''
    if [ -n "$anchor_ssh_bootif" ]; then
        if anchor_type_mac "$anchor_ssh_bootif"; then
            for path in "${ANCHOR_ROOT:-}"/sys/class/net/*; do
                anchor_recall "$path/address"
                [ "$anchor_recall" != "$anchor_value" ] || wanted=${path##*/}
            done
            [ -n "$wanted" ] || anchor_warn "no interface has the MAC address that BOOTIF names"
        else
            anchor_warn "BOOTIF $anchor_reason: it is not used"
        fi
    fi
    while read -r index name family address rest; do
        name=${name%@*}
        case $name in
            lo) continue ;;
            "${wanted:-${anchor_ssh__dev:-$name}}") ;;
            *) continue ;;
        esac
        anchor_ssh__dev=$name
        case $family in
            inet) anchor_ssh__addr=${anchor_ssh__addr:-${address%/*}} ;;
            inet6) anchor_ssh__addr6=${anchor_ssh__addr6:-${address%/*}} ;;
        esac
    done <<EOT
$(ip -o addr show up scope global 2>/dev/null)
EOT
    anchor_ssh__dev=${anchor_ssh__dev:-$wanted}
    anchor_recall "${ANCHOR_ROOT:-}/sys/class/net/${anchor_ssh__dev:-none}/address"
    anchor_ssh__mac=$anchor_recall
    anchor_ssh__at=${anchor_ssh__addr:-${anchor_ssh__addr6:-this node}}
    [ "$anchor_ssh_port" = 22 ] || anchor_ssh__at="$anchor_ssh__at port $anchor_ssh_port"
}

# usage: anchor_ssh__notify
# Tells the site's service where this node waits, when it is time to; in the background, one at a time.
anchor_ssh__notify() {
    local status url="$anchor_ssh_notify_url" separator='?' name value error=''
    [ -n "$url" ] || return 0
    if [ -n "$anchor_ssh__telling" ]; then
        ! kill -0 "$anchor_ssh__telling" 2>/dev/null || return 0
        wait "$anchor_ssh__telling"
        status=$?
        anchor_ssh__telling=
        [ ! -s "$dir/notify.error" ] || IFS= read -r error <"$dir/notify.error"
        error=$status:${error#"curl: ("*") "}
        # Said once, not at each poll.
        if [ "$error" != "$anchor_ssh__told" ]; then
            anchor_ssh__told=$error
            anchor_fetch_plain "$url"
            if [ "$status" -eq 0 ]; then
                anchor_info "told $anchor_fetch_url"
            else
                anchor_warn "cannot tell $anchor_fetch_url: ${error#*:} (curl ended with status $status); still trying"
            fi
        fi
    fi
    [ "$anchor_uptime_ms" -ge "$anchor_ssh__next" ] || return 0
    anchor_ssh__next=$((anchor_uptime_ms + anchor_ssh_notify_interval * 1000))
    case $url in *\?*) separator='&' ;; esac
    for name in mac domain dev addr addr6 fingerprint; do
        case $name in
            mac) value=$anchor_ssh__mac ;;
            domain) value=$(anchor_net_hostname) ;;
            dev) value=$anchor_ssh__dev ;;
            addr) value=$anchor_ssh__addr ;;
            addr6) value=$anchor_ssh__addr6 ;;
            fingerprint) value=$anchor_ssh__fingerprint ;;
        esac
        anchor_ssh__encode "$value"
        url=$url$separator$name=$anchor_ssh__encode
        separator='&'
    done
    printf 'url = "%s"\nproxy = ""\nnoproxy = "*"\n' "$url" >"$dir/notify" || return 0
    curl --disable --silent --show-error --fail --globoff --output /dev/null --config "$dir/notify" \
        --proto '=http,https' --tlsv1.2 --connect-timeout 5 --max-time 10 --max-filesize 1048576 \
        --cacert "${ANCHOR_ROOT:-}/etc/anchor/ca.pem" --capath "$dir/no-other-authorities" \
        </dev/null >/dev/null 2>"$dir/notify.error" &
    anchor_ssh__telling=$!
}

# usage: anchor_ssh__encode TEXT
# Sets anchor_ssh__encode to TEXT with all but RFC 3986's unreserved characters as % and two digits. For short texts.
anchor_ssh__encode() {
    local rest="$1" plain char code LC_ALL=C
    anchor_ssh__encode=
    while [ -n "$rest" ]; do
        plain=${rest%%[!A-Za-z0-9._~-]*}
        rest=${rest#"$plain"}
        char=${rest%"${rest#?}"}
        rest=${rest#?}
        code=
        [ -z "$char" ] || code=$(printf '%%%02X' "'$char")
        anchor_ssh__encode=$anchor_ssh__encode$plain$code
    done
}
