#!/bin/sh
# Boots an image from an OCI registry without a container engine. An artifact's layers are squashfs or erofs and are
# mounted as they are. An ordinary image's layers are tar: each goes through sqfstar as it comes, so that nothing but its
# squashfs is ever kept, several at once. overlayfs stacks them.
#
# What a layer takes away from older ones (.wh.NAME, .wh..wh..opq) is kept out of its squashfs and becomes a small tree of
# overlayfs's own marks, directly below it. The same trees carry the attributes of directories that the layer above or
# below has no entry for: overlayfs shows those of the topmost directory.
#
# In /run/anchor/image, a tmpfs: l1, l2, ... the layers as files; m1, ... where they are mounted; b1, ... the marks below,
# a1, ... the directories above each; stack, the names of what overlayfs stacks.
# shellcheck disable=SC2154 # anchor_oci_* are this stage's parameters and what anchor-oci.sh sets

ANCHOR_OCI_WORKERS=4    # layers at once, at most
ANCHOR_OCI_MARKS=100000 # whiteouts and directories without an entry, in one layer
# lz4: zstd at sqfstar's only level in 4.5 takes sixty times as long, which a boot has not.
ANCHOR_OCI_COMPRESSION=lz4

# usage: anchor_oci_run
# Reads this stage's parameters; what the manifest says takes the place of the image's reference. Leaves
# /run/anchor/image, complete and read-only. Safe to repeat. On failure it unmounts everything, which frees the memory.
anchor_oci_run() {
    anchor_untraced anchor_oci__run
}

# usage: anchor_oci__run
# The same, traced: it handles credentials.
anchor_oci__run() {
    local dir="${ANCHOR_ROOT:-}/run/anchor/image" work="${ANCHOR_ROOT:-}/run/anchor/oci" references rest status
    anchor_registry_user=$anchor_oci_user
    anchor_registry_password=$anchor_oci_password
    anchor_registry_proxy=$anchor_oci_proxy
    references=$anchor_oci_image
    [ -z "${anchor_manifest_urls:-}" ] || anchor_oci__named || return 1
    anchor_fetch_mirrors "$references" "$anchor_oci_mirrors"
    references=$anchor_fetch_urls
    # An earlier try left it, complete.
    anchor_recall "$dir/of"
    if [ "$anchor_recall" = "$references $anchor_oci_platform" ] && anchor_mounted "$dir"; then
        return 0
    fi
    rest=$anchor_oci_platform
    anchor_memory_free "$dir"
    anchor_oci_open "$work" "$references" && anchor_oci__prepare "$dir" "$rest" &&
        (umask 077 && anchor_keep "$dir/of" "$references $rest") && anchor_memory_seal "$dir"
    status=$?
    rm -rf "${work:?}"
    [ "$status" -eq 0 ] && return 0
    anchor_memory_free "$dir"
    return 1
}

# usage: anchor_oci__named
# Sets references to what the manifest names: its digest is that of the image's manifest or index, wherever that is.
anchor_oci__named() {
    local url
    references=
    for url in $anchor_manifest_urls; do
        case $url in
            https://*@* | http://*@*) ;;
            https://* | http://*)
                references="$references${references:+ }$url@sha256:$anchor_manifest_sha256"
                continue
                ;;
        esac
        anchor_fetch_plain "$url"
        anchor_fail "the manifest names no image at a registry: $anchor_fetch_url" \
            "a mirror of it is https://REGISTRY/NAME:TAG; anchor-build image --at makes such manifests"
        return 1
    done
}

# usage: anchor_oci__prepare DIR PLATFORM
# Everything between the reference and the finished stack.
anchor_oci__prepare() {
    case $2 in
        '' | [a-z]*/[a-z0-9]*) ;;
        *)
            anchor_fail "rd.anchor.oci.platform is not OS/ARCHITECTURE or OS/ARCHITECTURE/VARIANT" "such as linux/arm64"
            return 1
            ;;
    esac
    if [ -z "$anchor_oci_digest" ]; then
        anchor_info "rd.anchor.oci.image= has no digest: nothing but the registry's certificate vouches for the image"
    fi
    anchor_oci_resolve "$2" "${anchor_manifest_size:-}" && anchor_oci__kind && anchor_oci__space "$1" && anchor_oci__layers "$1" || return 1
    if [ "$anchor_oci__tar" = 1 ]; then
        anchor_oci__stack "$1"
    else
        anchor_oci__files "$1"
    fi
}

# usage: anchor_oci_mount DIR
# Mounts the image read-only on DIR. Safe to repeat.
anchor_oci_mount() {
    local dir="${ANCHOR_ROOT:-}/run/anchor/image" error
    anchor_mounted "$1" && return 0
    anchor_recall "$dir/stack"
    error=$(anchor_oci__overlay "$dir" "$anchor_recall" "$1" 2>&1) && return 0
    anchor_fail "cannot mount the image: $error" "does this kernel have overlayfs (the overlay module)?"
    anchor_memory_free "$dir"
    return 1
}

# usage: anchor_oci__kind
# Decides what the layers are: sets anchor_oci__tar to 1 for an ordinary image, or to 0 for file systems. Status 1
# for what is neither.
anchor_oci__kind() {
    local digest size type kind='' this
    while read -r digest size type; do
        case $anchor_oci_config_type:$type in
            *:application/vnd.oci.image.layer.nondistributable.* | *:application/vnd.docker.image.rootfs.foreign.*)
                anchor_fail "the image has a layer whose bytes are not in the registry ($type)" "publish it with all its layers"
                return 1
                ;;
            *:*[./+-]squashfs* | *:*[./+-]erofs* | *:application/octet-stream) this=0 ;;
            application/vnd.oci.image.config.v1+json:application/vnd.oci.image.layer.v1.tar | \
                application/vnd.oci.image.config.v1+json:application/vnd.oci.image.layer.v1.tar+gzip | \
                application/vnd.oci.image.config.v1+json:application/vnd.oci.image.layer.v1.tar+zstd | \
                application/vnd.docker.container.image.v1+json:application/vnd.docker.image.rootfs.diff.tar.gzip | \
                application/vnd.docker.container.image.v1+json:application/vnd.docker.image.rootfs.diff.tar) this=1 ;;
            # What oras calls a file where it is not told; the file's own magic tells more.
            *:application/vnd.oci.image.layer.v1.tar) this=0 ;;
            *) this=none ;;
        esac
        if [ "$this" = none ] || [ "${kind:-$this}" != "$this" ]; then
            anchor_fail "the image has a layer of a type that cannot be booted: $type with a configuration of $anchor_oci_config_type" \
                "an image of tar layers, or an artifact of squashfs or erofs layers (doc/oci.md has the types)"
            return 1
        fi
        kind=$this
    done <"$anchor_oci_dir/layers"
    anchor_oci__tar=$kind
    [ "$kind" = 1 ] || return 0
    anchor_oci_get "$anchor_oci_config" "$anchor_oci_config_size" "$anchor_oci_dir/config" || return 1
    # shellcheck disable=SC2016 # $ are jq's
    if ! jq -r -s --argjson count "$anchor_oci_count" 'if length == 1 and (.[0] | .rootfs.type == "layers"
            and (.rootfs.diff_ids | length == $count and all(type == "string" and length == 71 and test("\\Asha256:[0-9a-f]{64}\\z"))))
            then .[0] | "\(.os)/\(.architecture)" | select(test("\\A[a-z0-9]+/[a-z0-9]+\\z")) else empty end' \
        "$anchor_oci_dir/config" >"$anchor_oci_dir/platform" 2>/dev/null; then
        : >"$anchor_oci_dir/platform"
    fi
    anchor_recall "$anchor_oci_dir/platform"
    case $anchor_oci_wanted/ in
        "$anchor_recall"/*) return 0 ;;
    esac
    case $anchor_recall in
        */*) anchor_fail "the image $anchor_oci_name is for $anchor_recall, and this node wants $anchor_oci_wanted" "publish it for this platform" ;;
        *)
            anchor_fail "the configuration of the image $anchor_oci_name is of no use: it does not have one SHA-256 diff_id for each layer" \
                "see what published it"
            ;;
    esac
}

# usage: anchor_oci__space DIR
# Mounts the image's tmpfs, which may use what memory there is but for the reserve: a layer that grows without end
# fails on it.
anchor_oci__space() {
    local key value rest needs=0
    anchor_memory_available
    while read -r key value rest; do
        needs=$((needs + value))
    done <"$anchor_oci_dir/layers"
    anchor_note_number bytes "$needs"
    anchor_note_number layers "$anchor_oci_count"
    if [ "$needs" -ge "$anchor_memory_available" ]; then
        anchor_fetch_amount "$needs"
        needs=$anchor_fetch_amount
        anchor_fetch_amount "$anchor_memory_available"
        anchor_fail "the image is too large: its layers have $needs as they are, and $anchor_fetch_amount of memory may be used" \
            "give the node more memory, make the image smaller, or lower rd.anchor.fetch.reserve"
        return 1
    fi
    anchor_memory_space "$1" "$anchor_memory_available"
}

# usage: anchor_oci__layers DIR
# Fetches the layers, as many at once as there are processors. Status 1 if one of them failed; its reason is the step's.
anchor_oci__layers() {
    local cpu workers=0 started='' n=1
    for cpu in /sys/devices/system/cpu/cpu[0-9]*; do
        [ ! -d "$cpu" ] || workers=$((workers + 1))
    done
    [ "$workers" -gt 0 ] || workers=1
    [ "$workers" -le "$ANCHOR_OCI_WORKERS" ] || workers=$ANCHOR_OCI_WORKERS
    while [ "$n" -le "$workers" ]; do
        anchor_oci__work "$1" </dev/null &
        started="$started $!"
        n=$((n + 1))
    done
    for n in $started; do
        # Some shells tell of each process that was killed.
        wait "$n" 2>/dev/null
    done
    [ ! -e "$anchor_oci_dir/failed" ] || {
        anchor_recall "$anchor_oci_dir/failed"
        n=$anchor_recall
        anchor_recall "$anchor_oci_dir/$n/hint"
        set -- "${anchor_recall:-see boot.log}"
        anchor_recall "$anchor_oci_dir/$n/error"
        anchor_fail "layer $n of $anchor_oci_count: ${anchor_recall:-it was cut off}" "$1"
        return 1
    }
}

# usage: anchor_oci__work DIR
# One worker: takes the next layer that no other has taken, until there is none or one has failed.
anchor_oci__work() {
    local n=0 digest size type pid rest
    read -r pid rest </proc/self/stat
    : >"$anchor_oci_dir/worker.$pid"
    while read -r digest size type; do
        n=$((n + 1))
        [ ! -e "$anchor_oci_dir/failed" ] || return 1
        mkdir "$anchor_oci_dir/$n" 2>/dev/null || continue
        # Facts and failures of layers that come side by side must not mix.
        anchor_step_dir=$anchor_oci_dir/$n
        if [ "$anchor_oci__tar" = 1 ]; then
            anchor_oci__n=$n anchor_oci__type=$type anchor_oci__image=$1
            anchor_oci_stream "$digest" "$size" "$anchor_oci_dir/$n/stream" anchor_oci__convert &&
                anchor_oci__marks "$anchor_oci_dir/$n"
        else
            anchor_oci_get "$digest" "$size" "$1/l$n"
        fi || {
            # What others do is of no use any more; the first to fail ends them.
            ! mkdir "$anchor_oci_dir/stopping" 2>/dev/null || {
                anchor_keep "$anchor_oci_dir/failed" "$n"
                anchor_oci__stop "$pid"
            }
            return 1
        }
    done <"$anchor_oci_dir/layers"
}

# usage: anchor_oci__stop PID
# Ends all workers but PID, with everything that they started.
anchor_oci__stop() {
    local ended='' before=none each pid line parent rest
    for each in "$anchor_oci_dir"/worker.*; do
        [ "${each##*.}" = "$1" ] || ended="$ended ${each##*.}"
    done
    # One after the other, and as often as there are new ones: none may go on and start another meanwhile.
    while [ "$ended" != "$before" ]; do
        before=$ended
        # shellcheck disable=SC2086 # numbers
        [ -z "$ended" ] || kill -STOP $ended 2>/dev/null
        for each in /proc/[0-9]*/stat; do
            IFS= read -r line 2>/dev/null <"$each" || continue
            pid=${line%% *}
            line=${line##*) }
            parent=${line#* }
            case " $ended " in
                *" $pid "*) ;;
                *" ${parent%% *} "*) ended="$ended $pid" ;;
            esac
        done
    done
    # shellcheck disable=SC2086 # numbers
    [ -z "$ended" ] || kill -KILL $ended 2>/dev/null
}

# usage: anchor_oci__convert <BLOB
# Makes a squashfs of a layer while it comes, and lists it. The digest of the uncompressed bytes (diff_id) is not taken: the
# blob has one in the manifest, which is compared, and another digest of the same bytes would cost as much once more.
anchor_oci__convert() {
    local n="$anchor_oci__n" dir="$anchor_oci_dir/$anchor_oci__n" image="$anchor_oci__image/l$anchor_oci__n" sum listed
    rm -f "$image" "$dir/tar" "$dir/unpacked" "$dir/made" "$dir/listed"
    mkfifo "$dir/tar" || return 1
    # Without -B, tar calls the archive broken where a pipe gives it a part of a block.
    # The list is as far as the squashfs, and has a line for each entry: where it ends, all ends.
    {
        LC_ALL=C TZ=UTC tar --quoting-style=escape --numeric-owner --full-time -B -tvf "$dir/tar" 2>"$dir/tar.error"
        printf '%s\n' "$?" >"$dir/listed"
    } | head -n $((anchor_oci_max_entries + 1)) >"$anchor_oci__image/list$n" &
    listed=$!
    # shellcheck disable=SC2094 # different files
    {
        anchor_oci__unpack 2>"$dir/unpack.error"
        printf '%s\n' "$?" >"$dir/unpacked"
    } | tee "$dir/tar" 2>/dev/null | {
        # A pattern after "..." counts in every directory.
        timeout "$anchor_fetch_timeout" sqfstar -quiet -no-progress -exit-on-error -comp "$ANCHOR_OCI_COMPRESSION" -processors 1 \
            -mem 16M "$image" '... .wh.*' >"$dir/sqfstar.error" 2>&1
        sum=$?
        printf '%s\n' "$sum" >"$dir/made"
        # What follows the end of an archive is no reason for gzip to end early.
        [ "$sum" -ne 0 ] || cat >/dev/null
    }
    wait "$listed"
    if [ -n "$(sed -n "$((anchor_oci_max_entries + 1)){p;q;}" "$anchor_oci__image/list$n")" ]; then
        anchor_fail "it has more than $anchor_oci_max_entries files and directories" \
            "raise rd.anchor.oci.max_entries if the node has the memory for them, or publish the image as squashfs"
        return 1
    fi
    anchor_recall "$dir/listed"
    listed=${anchor_recall:-1}
    # Where sqfstar gave up, what comes before it ended for that reason (141 is SIGPIPE).
    anchor_recall "$dir/unpacked"
    if [ "$anchor_recall" != 0 ] && [ "$anchor_recall" != 141 ]; then
        anchor_recall "$dir/unpack.error"
        anchor_fail "it cannot be unpacked: ${anchor_recall:-no reason was given}" "does it have the compression that its media type says ($anchor_oci__type)?"
        return 1
    fi
    anchor_recall "$dir/made"
    if [ "$anchor_recall" != 0 ]; then
        sum=$(sed -n '/^$/d; $p' "$dir/sqfstar.error")
        if grep -q -e 'No space left' -e 'Failed to write to output' "$dir/sqfstar.error"; then
            anchor_fail "it needs more memory than the node has for it" "give the node more memory, or make the image smaller"
        else
            anchor_fail "it cannot be made a squashfs: ${sum:-sqfstar ended with status $anchor_recall}" \
                "is it a tar archive as its media type says ($anchor_oci__type), and without hard links out of the layer?"
        fi
        return 1
    fi
    if [ "$listed" -ne 0 ]; then
        anchor_recall "$dir/tar.error"
        anchor_fail "it cannot be listed: ${anchor_recall:-no reason was given}" "is it a tar archive?"
        return 1
    fi
    return 0
}

# usage: anchor_oci__unpack <BLOB
# Prints the uncompressed layer.
anchor_oci__unpack() {
    case $anchor_oci__type in
        *gzip) gzip -dc ;;
        *zstd) zstd -dcq ;;
        *) cat ;;
    esac
}

# usage: anchor_oci__marks DIR
# Reads the list of the layer that anchor_oci__convert made, and leaves in DIR what overlayfs cannot see in the squashfs:
# gone (lines of "oDIRECTORY/" for an opaque one and "wPATH" for a whiteout), implied (directories that have no entry of
# their own) and root (mode and owner of the root). Paths are as tar escapes them. Status 1 for what no layer may hold.
anchor_oci__marks() {
    local dir="$1" list="$anchor_oci__image/list$anchor_oci__n" LC_ALL=C
    export LC_ALL
    # "-rw-r--r-- 0/0 12 2026-11-21 07:20:00 ./usr/bin/x" becomes "-usr/bin/x".
    if ! sed -n 's|^d\([^ ]*\) \([0-9]*/[0-9]*\) *[^ ]* [^ ]* [^ ]* \.\{0,1\}/$|\1 \2|p' "$list" >"$dir/roots" ||
        ! tail -n 1 "$dir/roots" >"$dir/root" ||
        ! sed -e 's/^\(.\)[^ ]* [^ ]* *[^ ]* [^ ]* [^ ]* /\1/' -e 's/^l\(.*\) -> .*/l\1/' -e 's/^h\(.*\) link to .*/h\1/' \
            -e ':again' -e 's|^\(.\)\.\{0,1\}/|\1|' -e 't again' -e 's|^d\.$|d|' "$list" >"$dir/names" ||
        ! sed -n -e 's|^.\(\(.*/\)\{0,1\}\)\.wh\.\.wh\.\.opq$|o\1|p' -e 't' -e '/^.\.wh\.\.wh\./d' -e '/\/\.wh\.\.wh\./d' \
            -e 's|^.\(\(.*/\)\{0,1\}\)\.wh\.\([^/]*\)$|w\1\3|p' "$dir/names" >"$dir/gone" ||
        ! sed -n -e '/^.\.\.$/p' -e '/^.\.\.\//p' -e '/\/\.\.\//p' -e '/\/\.\.$/p' "$dir/names" >"$dir/bad" ||
        ! sed -n '/^w\(.*\/\)\{0,1\}\.\{0,2\}$/p' "$dir/gone" >>"$dir/bad" ||
        ! sed -n 's|^d\(.*[^/]\)/*$|\1|p' "$dir/names" >"$dir/new" || ! sort -u -o "$dir/explicit" "$dir/new" ||
        ! sed -n -e '/^.\.wh\./d' -e '/\/\.wh\./d' -e 's|^.||' -e 's|/*$||' -e 's|/[^/]*$||p' "$dir/names" >"$dir/new" ||
        ! uniq "$dir/new" "$dir/implied" || ! sort -u -o "$dir/parents" "$dir/implied" || ! : >"$dir/implied"; then
        anchor_fail "the list of what is in it cannot be read" "is there memory left?"
        return 1
    fi
    rm -f "$list"
    if [ -s "$dir/bad" ]; then
        anchor_recall "$dir/bad"
        anchor_fail "it has an entry that leads out of the image: $(printf '%.200s' "${anchor_recall#?}")" "see what published it"
        return 1
    fi
    while comm -23 "$dir/parents" "$dir/explicit" >"$dir/new" && [ -s "$dir/new" ]; do
        sort -u -o "$dir/implied" "$dir/implied" "$dir/new"
        sed -n 's|/[^/]*$||p' "$dir/new" | sort -u | comm -23 - "$dir/implied" >"$dir/parents"
    done
    sed -n -e '/\.wh\./d' -e 's/ already exists in the tar file, ignoring!*$//p' "$dir/sqfstar.error" | sort -u |
        comm -23 - "$dir/explicit" >"$dir/bad"
    if [ -s "$dir/bad" ]; then
        anchor_recall "$dir/bad"
        anchor_fail "it has the same file twice: $(printf '%.200s' "$anchor_recall")" "see what published it"
        return 1
    fi
    if [ -n "$(sed -n "${ANCHOR_OCI_MARKS}p" "$dir/gone")$(sed -n "${ANCHOR_OCI_MARKS}p" "$dir/implied")" ]; then
        anchor_fail "it takes away more than $ANCHOR_OCI_MARKS files, or leaves out as many directories" "squash the image"
        return 1
    fi
    rm -f "$dir/names" "$dir/explicit" "$dir/parents" "$dir/new" "$dir/bad" "$dir/roots"
}

# usage: anchor_oci__files DIR
# Mounts the layers of an artifact, which are file systems, and leaves their names in stack.
anchor_oci__files() {
    local n=1 lowers='' type
    while [ "$n" -le "$anchor_oci_count" ]; do
        # A squashfs begins with "hsqs"; an erofs has E2 E1 F5 E0 after 1024 bytes.
        case $(od -A n -v -t x1 -N 4 "$1/l$n")$(od -A n -v -t x1 -j 1024 -N 4 "$1/l$n" 2>/dev/null) in
            *' e2 e1 f5 e0') type=erofs ;;
            ' 68 73 71 73'*) type=squashfs ;;
            *)
                anchor_fail "layer $n of $anchor_oci_count is neither a squashfs nor an erofs" \
                    "an image of tar layers needs a configuration of an image (doc/oci.md has the types)"
                return 1
                ;;
        esac
        anchor_oci__attach "$1" "$n" "$type" || return 1
        anchor_note format "$type"
        lowers="m$n${lowers:+:$lowers}"
        n=$((n + 1))
    done
    anchor_keep "$1/stack" "$lowers"
}

# usage: anchor_oci__attach DIR NUMBER TYPE
# Mounts a layer's file.
anchor_oci__attach() {
    anchor_mount_file "$3" "$1/l$2" "$1/m$2" && return 0
    anchor_fail "cannot mount layer $2 of $anchor_oci_count: $anchor_mount_error" \
        "does this kernel have loop and $3 with the layer's compression? (see dmesg)"
    return 1
}

# usage: anchor_oci__overlay DIR STACK TARGET
# Mounts the directories of DIR that STACK names, the topmost first, on TARGET. Their names are short and relative,
# because all options of a mount have to fit into one page.
anchor_oci__overlay() {
    case $2 in
        *:*) (cd "$1" && mount -t overlay -o "ro,lowerdir=$2" anchor-image "$3") ;;
        *) mount --bind "$1/$2" "$3" && mount -o remount,bind,ro "$3" ;;
    esac
}

# usage: anchor_oci__stack DIR
# Mounts the layers of an ordinary image, oldest first, makes the trees between them, and leaves the names in stack.
anchor_oci__stack() {
    local n=1 dir lowers='' root='' mode owner
    anchor_note format "tar layers"
    while [ "$n" -le "$anchor_oci_count" ]; do
        dir=$anchor_oci_dir/$n
        anchor_oci__attach "$1" "$n" squashfs || return 1
        # Whoever hides all of the root leaves nothing of the older layers.
        ! grep -q '^o$' "$dir/gone" || lowers=''
        if [ -n "$lowers" ] && [ -s "$dir/gone" ]; then
            anchor_oci__between "$1" "$lowers" "b$n" "$dir/gone" || return 1
            lowers="b$n:$lowers"
        fi
        if [ -n "$lowers" ] && [ -s "$dir/implied" ]; then
            sed 's|.*|i&/|' "$dir/implied" >"$dir/above"
            anchor_oci__between "$1" "$lowers" "a$n" "$dir/above" || return 1
            lowers="a$n:m$n:$lowers"
        else
            lowers="m$n${lowers:+:$lowers}"
        fi
        anchor_recall "$dir/root"
        root=${anchor_recall:-$root}
        n=$((n + 1))
    done
    # sqfstar leaves the root's entry out.
    if ! mkdir -m 0755 "$1/top"; then
        anchor_fail "cannot write to $1"
        return 1
    fi
    if [ -n "$root" ]; then
        mode=${root%% *}
        owner=${root#* }
        anchor_oci__mode "$mode"
        chown "${owner%/*}:${owner#*/}" "$1/top" && chmod "$anchor_oci__mode" "$1/top" || return 1
    fi
    anchor_keep "$1/stack" "top:$lowers"
}

# usage: anchor_oci__mode TEXT
# Sets anchor_oci__mode: rwxr-sr-x in chmod's words.
anchor_oci__mode() {
    local rest="$1" who words='' bits
    for who in u g o; do
        bits=${rest%"${rest#???}"}
        rest=${rest#???}
        case $bits in
            *s) bits=${bits%s}xs ;;
            *S) bits=${bits%S}s ;;
            *t) bits=${bits%t}xt ;;
            *T) bits=${bits%T}t ;;
        esac
        words="$words,$who="
        case $bits in r*) words=${words}r ;; esac
        case $bits in ?w*) words=${words}w ;; esac
        case $bits in ??x*) words=${words}x ;; esac
        case $bits in *s) words=${words}s ;; *t) words=${words}t ;; esac
    done
    anchor_oci__mode=${words#,}
}

# usage: anchor_oci__between DIR STACK TREE MARKS
# Makes a tree that lies directly above what STACK names, with the directories that MARKS (as gone; "iDIRECTORY/" for one
# without an entry) need, with the attributes that they have in STACK. What is no directory there is left out.
anchor_oci__between() {
    local tree="$1/$3" view="$1/view" list="$anchor_oci_dir/list" line path error
    if ! error=$({ mkdir -p "$tree" "$view" && anchor_oci__overlay "$1" "$2" "$view"; } 2>&1); then
        anchor_fail "cannot mount the older layers: $error" "does this kernel have overlayfs (the overlay module)?"
        return 1
    fi
    : >"$list"
    while IFS= read -r line; do
        anchor_oci__plain "${line#?}"
        case $anchor_oci__plain in
            */*) anchor_oci__directory "${anchor_oci__plain%/*}" || : ;;
        esac
    done <"$4"
    if [ -s "$list" ]; then
        error=$(tar -C "$view" --no-recursion --null -T "$list" --numeric-owner --xattrs --xattrs-include='*' -cf - 2>/dev/null |
            tar -C "$tree" --numeric-owner --xattrs --xattrs-include='*' -xpf - 2>&1) || anchor_warn "attributes of directories: $error"
    fi
    umount "$view" || umount -l "$view"
    while IFS= read -r line; do
        anchor_oci__plain "${line#?}"
        path=$anchor_oci__plain
        case $line in
            w*/*) [ -d "$tree/${path%/*}" ] || continue ;;
            o*) [ -d "$tree/$path" ] || continue ;;
        esac
        case $line in
            o*) error=$(setfattr -n trusted.overlay.opaque -v y "$tree/$path" 2>&1) ;;
            w*) error=$({ rm -rf "${tree:?}/${path:?}" && mknod "$tree/$path" c 0 0; } 2>&1) ;;
        esac || {
            anchor_fail "cannot mark what a layer takes away: $error" "is there memory left for the image?"
            return 1
        }
    done <"$4"
}

# usage: anchor_oci__directory PATH
# Makes the directories that lead to PATH in tree, and adds them to list, as far as they are directories in view: a
# symbolic link there could lead anywhere.
anchor_oci__directory() {
    local rest="$1/" path=''
    while [ -n "$rest" ]; do
        path=$path${path:+/}${rest%%/*}
        rest=${rest#*/}
        [ ! -d "$tree/$path" ] || continue
        [ ! -L "$view/$path" ] && [ -d "$view/$path" ] && mkdir "$tree/$path" && printf './%s\0' "$path" >>"$list" || return 1
    done
}

# usage: anchor_oci__plain TEXT
# Sets anchor_oci__plain to a path whose special bytes tar has escaped.
anchor_oci__plain() {
    anchor_oci__plain=$1
    case $1 in
        *\\*)
            anchor_oci__plain=$(printf '%s\n' "$1" | sed -e 's/\\\\/\\134/g' -e 's/\\\([0-7][0-7][0-7]\)/\\0\1/g')
            anchor_oci__plain=$(printf '%b.' "$anchor_oci__plain")
            anchor_oci__plain=${anchor_oci__plain%.}
            ;;
    esac
}
