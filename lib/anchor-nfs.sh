#!/bin/sh
# Mounting an NFS export for the stages that read files from one: read-only, without rpc.statd (NFS 4 has no need of it,
# and NFS 3 is mounted without locks), with time limits on everything. Most need it for a moment, and unmount it on every
# way out: who mounts calls anchor_nfs_umount; a trap on EXIT is the place for it. A stage that names this library in `libs`
# needs the binaries mount.nfs, mount.nfs4, timeout, dd and readlink. Needs anchor-report.sh, anchor-fetch.sh and
# anchor-mounts.sh.
#
# Who needs an export that stays, for the booted system, has locals of its own for these two: anchor_nfs_dir, which is where
# it is mounted, and anchor_nfs_wait. That is soft for a moment: a read fails when the server is silent. With hard a read
# waits for the server however long it takes, as the root of a system must; the mount itself has its limit all the same.
#
# What went wrong is left in anchor_nfs_error and anchor_nfs_hint, and anchor_nfs_final is 1 where trying again is no
# use: the caller decides whether it does.

ANCHOR_NFS_DIR="${ANCHOR_ROOT:-}/run/anchor/nfs"
ANCHOR_NFS_STAY="${ANCHOR_ROOT:-}/run/anchor/nfs-image"
anchor_nfs_dir=$ANCHOR_NFS_DIR
anchor_nfs_wait=soft
anchor_nfs_force=
ANCHOR_NFS_OPTIONS="vers, port, mountport, proto, mountproto, rsize, timeo, retrans"

# usage: anchor_nfs_export EXPORT
# Takes nfs[4]:SERVER:/PATH[:OPTIONS] apart. Sets anchor_nfs_server (an IPv6 address has brackets), anchor_nfs_path,
# anchor_nfs_given (the options) and anchor_nfs_type (nfs or nfs4).
anchor_nfs_export() {
    local rest="${1#*:}"
    anchor_nfs_type=${1%%:*}
    case $rest in
        \[*) anchor_nfs_server=${rest%%\]*}] ;;
        *) anchor_nfs_server=${rest%%:*} ;;
    esac
    rest=${rest#"$anchor_nfs_server":}
    anchor_nfs_path=${rest%%:*}
    anchor_nfs_given=
    case $rest in
        *:*) anchor_nfs_given=${rest#*:} ;;
    esac
}

# usage: anchor_nfs_options GIVEN
# Checks options that came from the command line. Sets anchor_nfs_passed to those that are passed on, each with a comma
# before it, and anchor_nfs_versions to the protocol versions to try, best first. What the node decides itself is left
# out, and said where it contradicts. Reads anchor_nfs_type and anchor_nfs_wait. Status 1, final, for any other option.
anchor_nfs_options() {
    local rest="${1:+$1,}" option value
    anchor_nfs_passed=
    anchor_nfs_versions='4.2 4.1 4.0'
    [ "$anchor_nfs_type" = nfs4 ] || anchor_nfs_versions="$anchor_nfs_versions 3"
    while [ -n "$rest" ]; do
        option=${rest%%,*}
        rest=${rest#*,}
        value=${option#*=}
        case $option in
            '' | "$anchor_nfs_wait" | ro | nolock | tcp | intr | nointr | noatime | nodiratime | nosuid | nodev | noexec | noacl) ;;
            defaults | _netdev | bg | fg | sec=sys | minorversion=[012]) ;;
            hard | soft | rw | udp | async | sync | lock)
                anchor_warn "the NFS option $option has no effect: an export is mounted ro,$anchor_nfs_wait,nolock over TCP"
                ;;
            vers=4 | nfsvers=4) anchor_nfs_versions='4.2 4.1 4.0' ;;
            vers=3 | vers=4.[012] | nfsvers=3 | nfsvers=4.[012])
                if [ "$anchor_nfs_type:$value" = nfs4:3 ]; then
                    anchor_nfs__never "nfs4: and the NFS option $option contradict each other" "write nfs: for NFS 3"
                    return 1
                fi
                anchor_nfs_versions=$value
                ;;
            port=* | mountport=* | rsize=* | timeo=* | retrans=*)
                case $option in
                    rsize=*) set -- 1024 1048576 ;;
                    timeo=*) set -- 1 600 ;;
                    retrans=*) set -- 0 10 ;;
                    *) set -- 1 65535 ;;
                esac
                anchor_nfs__number "$value" "$@" || anchor_nfs__unknown "$option" || return 1
                anchor_nfs_passed=$anchor_nfs_passed,$option
                ;;
            proto=tcp | proto=tcp6 | mountproto=tcp | mountproto=tcp6 | mountproto=udp | mountproto=udp6)
                anchor_nfs_passed=$anchor_nfs_passed,$option
                ;;
            *)
                anchor_nfs__unknown "$option"
                return 1
                ;;
        esac
    done
}

# usage: anchor_nfs_mount LIMIT [EXTRA]
# Mounts anchor_nfs_server:anchor_nfs_path on anchor_nfs_dir within about LIMIT seconds, with the best protocol version
# that the server has, anchor_nfs_passed, and EXTRA options of the caller's. Where it does not stay, an RPC that gets no
# answer fails after 18 s (3 + 6 + 9) unless options say otherwise. Status 1 with the reason.
anchor_nfs_mount() {
    local limit="$1" extra="${2:+,$2}" version options until error patience="$anchor_nfs_wait"
    anchor_nfs_error=
    anchor_nfs_hint="does the NFS server run, and does a firewall let this node through to its TCP port 2049?"
    anchor_nfs_final=0
    if ! anchor_nfs_umount || ! (umask 077 && mkdir -p "$anchor_nfs_dir"); then
        anchor_nfs__never "$anchor_nfs_dir cannot be used as a mount point" "is something still mounted there? (see dmesg)"
        return 1
    fi
    [ "$patience" = hard ] || patience=soft,timeo=30,retrans=2
    anchor_nfs__databases
    modprobe -q nfs 2>/dev/null
    anchor_nfs__identify
    anchor_uptime_ms
    until=$((anchor_uptime_ms + limit * 1000))
    for version in $anchor_nfs_versions; do
        anchor_uptime_ms
        limit=$(((until - anchor_uptime_ms + 999) / 1000))
        [ "$limit" -gt 0 ] || break
        options="ro,nosuid,nodev,noexec,$patience,retry=0,sec=sys,nolock$extra$anchor_nfs_passed"
        case $version in
            3) options="$options,vers=3,proto=tcp,mountproto=tcp" && set -- nfs nfsv3 ;;
            *) options="$options,vers=$version" && set -- nfs4 nfsv4 ;;
        esac
        modprobe -q "$2" 2>/dev/null
        error=$(timeout -k 2 "$limit" mount -t "$1" -o "$options" "$anchor_nfs_server:$anchor_nfs_path" "$anchor_nfs_dir" 2>&1 </dev/null)
        case $? in
            0)
                anchor_nfs_version=$version
                return 0
                ;;
            124 | 137) error="no answer within $limit s" ;;
        esac
        anchor_nfs__explain "$error"
        case $error in
            *rotocol*not\ supported* | *version*not\ supported* | *not\ supported*version*) ;;
            *) break ;;
        esac
    done
    # Where the time was up just when the mount was there.
    anchor_nfs_umount
    return 1
}

# usage: anchor_nfs_umount
# Takes anchor_nfs_dir away, lazily where the server does not answer any more. An unmount of a dead server may hang in the
# kernel, so it runs beside this shell, and each try is waited for 3 s: two tries, and between them one for each of the flags
# in anchor_nfs_force. Status 1 if it is still mounted.
anchor_nfs_umount() {
    local flags tries
    for flags in -ic $anchor_nfs_force -icfl; do
        anchor_mounted "$anchor_nfs_dir" || return 0
        # No helper (-i): that of NFS 3 would ask the dead server once more. No look at the mount point (-c) either.
        umount "$flags" "$anchor_nfs_dir" >/dev/null 2>&1 </dev/null &
        tries=30
        while anchor_mounted "$anchor_nfs_dir" && [ "$tries" -gt 0 ]; do
            sleep 0.1
            tries=$((tries - 1))
            kill -0 "$!" 2>/dev/null || break
        done
    done
    ! anchor_mounted "$anchor_nfs_dir"
}

# usage: anchor_nfs_file NAME
# Sets anchor_nfs_file to the regular file that NAME is in the mounted export, and anchor_nfs_size and
# anchor_nfs_identity to its size and to what changes with each version of it. Links are followed inside of the export
# only: those that lead out would lead to the node's own files. Status 1 with the reason.
anchor_nfs_file() {
    local what="$anchor_nfs_server:$anchor_nfs_path/${1#/}" type
    anchor_nfs_final=0
    anchor_nfs_hint="check the path, and that the file was put there"
    anchor_nfs_file=$(timeout -k 2 30 readlink -e "$anchor_nfs_dir/$1" 2>/dev/null) || anchor_nfs_file=
    case $anchor_nfs_file in
        '') anchor_nfs_error="$what is not there" ;;
        "$anchor_nfs_dir"/*)
            if ! type=$(timeout -k 2 30 stat -c '%s %i %F;%y;%z' "$anchor_nfs_file" 2>/dev/null); then
                anchor_nfs_error="$what cannot be looked at"
            else
                anchor_nfs_size=${type%% *}
                anchor_nfs_identity=$type
                case $type in
                    *' regular file;'* | *' regular empty file;'*) return 0 ;;
                esac
                anchor_nfs__never "$what is not a regular file" "give the path of a file"
            fi
            ;;
        *) anchor_nfs__never "$what is a link that leads out of the export" "put the file itself there, or a relative link" ;;
    esac
    return 1
}

# usage: anchor_nfs_copy TO SKIP COUNT LIMIT STALL
# Appends COUNT bytes of anchor_nfs_file, from its byte SKIP on, to TO, within LIMIT seconds. A copy that grows by less
# than 1 KiB/s for STALL seconds is broken off: a soft mount does not see to that, because NFS 4 waits for its session to
# come back however long that takes. What was a file a moment ago may be something else by now: a link is not followed,
# and a pipe is not waited for. Status 1 with the reason.
anchor_nfs_copy() {
    local error='' status copy guard messages="$anchor_nfs_dir.messages"
    rm -f "$messages" "$messages.end" "$messages.guarded"
    # In small blocks: the guard sees only whole ones, and takes a slow copy in large ones for a silent one.
    LC_ALL=C timeout -k 2 "$4" dd if="$anchor_nfs_file" of="$1" bs=16K skip="$2" count="$3" conv=notrunc \
        iflag=nofollow,nonblock,fullblock,skip_bytes,count_bytes oflag=append status=none 2>"$messages" </dev/null &
    copy=$!
    anchor_nfs__guard "$copy" "$1" "$5" "$messages" >/dev/null 2>&1 </dev/null &
    guard=$!
    wait "$copy"
    status=$?
    # In bash, a process that was forked this moment still has the traps of this shell, which unmount and remove: a signal
    # that comes so early would set them off. A guard that has none of its own yet finds the file.
    : >"$messages.end"
    [ ! -e "$messages.guarded" ] || kill "$guard" 2>/dev/null
    wait "$guard" 2>/dev/null
    [ ! -s "$messages" ] || IFS= read -r error <"$messages"
    rm -f "$messages" "$messages.end" "$messages.guarded"
    anchor_nfs_final=0
    anchor_nfs_hint="check the network between this node and the NFS server"
    error=${error#dd: }
    case $status:$error in
        0:*) return 0 ;;
        124:*) anchor_nfs_error="$anchor_nfs_server is too slow: not done after $4 s" ;;
        137:* | 143:*) anchor_nfs_error="$anchor_nfs_server is too slow or silent: less than 1 KiB/s for $5 s" ;;
        *"No space left on device"* | *"failed to open '$1'"* | *"error writing"*)
            anchor_nfs__never "cannot write what comes from $anchor_nfs_server: ${error##*: }" "is ${1%/*} full?"
            ;;
        127:*) anchor_nfs__never "dd is not in the initramfs" "build it anew: the nfs stages bring it" ;;
        *"Permission denied"*)
            anchor_nfs_error="$anchor_nfs_server does not let this node read ${anchor_nfs_file#"$anchor_nfs_dir"/}"
            anchor_nfs_hint="see the file's mode, and whether the export squashes root: make it readable for this node alone"
            ;;
        *) anchor_nfs_error="reading from $anchor_nfs_server failed: ${error##*: }" ;;
    esac
    return 1
}

# usage: anchor_nfs__guard PID FILE SECONDS NAME
# Ends the copy PID when FILE has not grown by 1 KiB for each of SECONDS. timeout(1) passes the signal on, and kills what
# the kernel does not let end otherwise. SIGTERM ends the guard once NAME.guarded is there, and NAME.end before that.
anchor_nfs__guard() {
    local before
    # What goes through a pipe is not counted before its end: there the limit of the whole download is the only one.
    [ ! -p "$2" ] || return 0
    # Its own last child is what it waits for; before there is one, $! is the copy, which is over then. A shell that was
    # forked this moment, to become sleep, would swallow SIGTERM.
    trap 'kill -KILL "$!"; exit 143' TERM
    : >"$4.guarded"
    anchor_fetch_size "$2"
    while [ ! -e "$4.end" ] && kill -0 "$1"; do
        before=$anchor_fetch_size
        sleep "$3" &
        wait "$!"
        anchor_fetch_size "$2"
        [ $((anchor_fetch_size - before)) -ge $(($3 * 1024)) ] || kill "$1"
    done
}

# usage: anchor_nfs__identify
# Gives the node an identity of its own, unless nfs.nfs4_unique_id= did. An NFS 4 server knows a client by the name that the
# node has when it mounts first. Nodes without one, as in an initramfs, would be one client to it, which comes back again and
# again, and would take each other's sessions away (Documentation/filesystems/nfs/client-identifier.rst of the kernel).
anchor_nfs__identify() {
    local file="${ANCHOR_ROOT:-}/sys/module/nfs/parameters/nfs4_unique_id"
    [ -w "$file" ] || return 0
    anchor_recall "$file"
    [ -n "$anchor_recall" ] || cat /proc/sys/kernel/random/boot_id >"$file"
} 2>/dev/null

# usage: anchor_nfs__databases
# Writes what mount.nfs looks protocols up in, where the initramfs has none: without either file it knows not even TCP.
anchor_nfs__databases() {
    local etc="${ANCHOR_ROOT:-}/etc"
    [ -e "$etc/netconfig" ] ||
        printf '%s - -\n' 'udp tpi_clts v inet udp' 'tcp tpi_cots_ord v inet tcp' 'udp6 tpi_clts v inet6 udp' \
            'tcp6 tpi_cots_ord v inet6 tcp' >"$etc/netconfig"
    [ -e "$etc/protocols" ] || printf '%s\n' 'tcp 6 TCP' 'udp 17 UDP' >"$etc/protocols"
} 2>/dev/null

# usage: anchor_nfs__number TEXT MIN MAX
# Whether TEXT is a whole number from MIN to MAX without leading zeros.
anchor_nfs__number() {
    case $1 in
        '' | 0?* | *[!0-9]* | ????????*) return 1 ;;
    esac
    [ "$1" -ge "$2" ] && [ "$1" -le "$3" ]
}

# usage: anchor_nfs__never ERROR HINT
# Sets what went wrong for good.
anchor_nfs__never() {
    anchor_nfs_error=$1
    anchor_nfs_hint=$2
    anchor_nfs_final=1
}

# usage: anchor_nfs__unknown OPTION
# Always returns 1.
anchor_nfs__unknown() {
    anchor_nfs__never "the NFS option ${1%%=*} is not allowed, or its value is not" "what may be given: $ANCHOR_NFS_OPTIONS"
    return 1
}

# usage: anchor_nfs__explain TEXT
# Says why a mount failed, from mount's first line.
anchor_nfs__explain() {
    local text="${1%%
*}" what="cannot mount $anchor_nfs_server:$anchor_nfs_path"
    text=${text#mount.nfs4: }
    text=${text#mount.nfs: }
    anchor_nfs_error="$what: ${text:-no reason given}"
    case $1 in
        *"access denied"* | *"ermission denied"* | *"peration not permitted"*)
            anchor_nfs__never "$anchor_nfs_error" "see which nodes may mount the export, and whether it wants ports below 1024"
            ;;
        *"No such file"*)
            anchor_nfs__never "$anchor_nfs_error" "check the path: NFS 4 counts from the server's pseudo root, NFS 3 from its /"
            ;;
        *"unknown filesystem type"* | *"No such device"* | *"bad option"* | *"helper program"*)
            anchor_nfs__never "$anchor_nfs_error" "build the initramfs with an nfs stage: it brings mount.nfs and the drivers"
            ;;
        *resolve*) anchor_nfs_hint="check the server's name, and what name servers DHCP gave" ;;
    esac
}
