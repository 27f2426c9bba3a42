#!/bin/sh
# Boots an image from an OCI registry without a container engine. An artifact's layers are squashfs or erofs and are
# mounted as they are. An ordinary image's layers are tar: each goes through tar2sqfs, several at once, and what has been
# read of it is given back while its squashfs grows. overlayfs stacks them.
#
# A layer's squashfs holds what it takes away from older ones (.wh.NAME, .wh..wh..opq) as the files that stand for it, and
# directories that have files in the layer but no entry as marked by tar2sqfs. A small tree directly below the squashfs has
# overlayfs's own marks; one directly above hides those files, and gives these directories the attributes from below.
#
# In /run/anchor/image, a tmpfs: l1, l2, ... the layers as files; c1, ... as they came, until they are made a squashfs;
# m1, ... where they are mounted; b1, ... the trees below, a1, ... those above each; stack, the names of what overlayfs stacks.
# shellcheck disable=SC2154 # anchor_oci_* are this stage's parameters and what anchor-oci.sh sets

ANCHOR_OCI_WORKERS=4    # layers at once, at most
ANCHOR_OCI_FREE=4194304 # bytes of a layer that are given back at a time, once they have been read
ANCHOR_OCI_MARKS=100000 # whiteouts and directories without an entry, in one layer
# The user and group that tar2sqfs gives, with mode 0, to a directory without an entry; it takes none above 2^31 - 1.
ANCHOR_OCI_NOBODY=1954112063

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
    if [ -n "${anchor_manifest_urls:-}" ]; then
        anchor_oci__named || return 1
        # Whoever can write a manifest that nobody signed would choose who gets them.
        anchor_params_signed || anchor_registry_user='' anchor_registry_password=''
    fi
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
# Fetches the layers, the largest first, as many at once as there are processors. Status 1 if one of them failed; its reason
# is the step's.
anchor_oci__layers() {
    local cpu workers=0 started='' n=0 digest size type all=0
    while read -r digest size type; do
        n=$((n + 1))
        printf '%s %s %s %s\n' "$n" "$digest" "$size" "$type"
    done <"$anchor_oci_dir/layers" | LC_ALL=C sort -k 3,3nr -k 1,1n >"$anchor_oci_dir/queue"
    for cpu in /sys/devices/system/cpu/cpu[0-9]*; do
        [ ! -d "$cpu" ] || workers=$((workers + 1))
    done
    [ "$workers" -gt 0 ] || workers=1
    [ "$workers" -le "$ANCHOR_OCI_WORKERS" ] || workers=$ANCHOR_OCI_WORKERS
    # With a layer for each processor none waits for the network while another works, and a file costs less than the pipes
    # of a stream: a fourth of all processor time, where that is emulated. It needs memory for the largest of them, beside
    # what all layers become.
    anchor_oci__whole=
    n=0
    while read -r cpu digest size type; do
        n=$((n + 1))
        all=$((all + size + (n <= workers ? size : 0)))
    done <"$anchor_oci_dir/queue"
    [ "$n" -lt "$workers" ] || [ "$all" -ge "$anchor_memory_available" ] || anchor_oci__whole=1
    n=1
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
    local n digest size type pid
    anchor_pid
    pid=$anchor_pid
    : >"$anchor_oci_dir/worker.$pid"
    while read -r n digest size type; do
        [ ! -e "$anchor_oci_dir/failed" ] || return 1
        mkdir "$anchor_oci_dir/$n" 2>/dev/null || continue
        # Facts and failures of layers that come side by side must not mix.
        anchor_step_dir=$anchor_oci_dir/$n
        if [ "$anchor_oci__tar" = 1 ]; then
            anchor_oci__n=$n anchor_oci__type=$type anchor_oci__image=$1
            anchor_oci__squash "$digest" "$size" && anchor_oci__look "$1" "$n"
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
    done <"$anchor_oci_dir/queue"
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

# usage: anchor_oci__squash DIGEST SIZE
# Makes a squashfs of a layer: while it comes, or, with anchor_oci__whole, once it is here and its digest is right. Reads pid,
# the worker's.
anchor_oci__squash() {
    local blob="$anchor_oci__image/c$anchor_oci__n" release status
    case $anchor_oci__whole:$anchor_oci__type in
        1:*gzip | 1:*zstd) ;;
        *)
            # A plain tar goes through cat, and busybox's only passes on the file's pages: of a large page, what is given back
            # behind the file's position would come as zeros.
            anchor_oci_stream "$1" "$2" "$anchor_oci_dir/$anchor_oci__n/stream" anchor_oci__convert
            return
            ;;
    esac
    anchor_oci_get "$1" "$2" "$blob" || return 1
    exec 4<"$blob"
    anchor_oci__release "$blob" "$2" "$pid" &
    release=$!
    anchor_oci__convert <&4 4<&-
    status=$?
    exec 4<&-
    kill "$release" 2>/dev/null
    wait "$release" 2>/dev/null
    rm -f "$blob"
    return "$status"
}

# usage: anchor_oci__release BLOB SIZE PID 4<BLOB
# Gives the memory of BLOB back as far as it has been read, until it is killed, and leaves nothing then, or until the process
# PID is gone: whoever reads it shares this descriptor's position.
anchor_oci__release() {
    local key at freed=0 other="$!"
    trap '[ "$!" = "$other" ] || { kill "$!" && wait "$!"; } 2>/dev/null; exit 0' TERM
    while kill -0 "$3" 2>/dev/null; do
        sleep 0.4 4<&- &
        wait "$!"
        while read -r key at; do
            [ "$key" != pos: ] || break
        done </proc/self/fdinfo/4
        [ $((at - freed)) -ge "$ANCHOR_OCI_FREE" ] || continue
        # Without it there is only more memory in use for a while.
        fallocate --punch-hole --offset "$freed" --length $((at - freed)) "$1" 2>/dev/null || at=$2
        freed=$at
    done
}

# usage: anchor_oci__convert <BLOB
# Makes a squashfs of a layer. The digest of the uncompressed bytes (diff_id) is not taken: the blob has one
# in the manifest, which is compared, and another digest of the same bytes would cost as much once more.
anchor_oci__convert() {
    local dir="$anchor_oci_dir/$anchor_oci__n" image="$anchor_oci__image/l$anchor_oci__n" why
    local owner="uid=$ANCHOR_OCI_NOBODY,gid=$ANCHOR_OCI_NOBODY,mode=0" LC_ALL=C
    export LC_ALL
    rm -f "$image" "$dir/unpacked" "$dir/made"
    {
        anchor_oci__unpack 2>"$dir/unpack.error"
        printf '%s\n' "$?" >"$dir/unpacked"
    } | {
        # Directories that have no entry count in no line: 64 MiB, and 256 bytes for each entry that there may be.
        # shellcheck disable=SC3045 # dash, bash and busybox sh have it
        ulimit -v $((65536 + anchor_oci_max_entries / 4)) 2>/dev/null
        # It prints a line for each entry. lz4 takes 1.2 s less of an emulated processor for 94 MB, and half as much memory again.
        timeout "$anchor_fetch_timeout" tar2sqfs -c zstd -X level=1 -j 1 -d "$owner" "$image" 2>"$dir/made.error"
        why=$?
        printf '%s\n' "$why" >"$dir/made"
        # What follows the end of an archive is no reason for who unpacks to end early.
        [ "$why" -ne 0 ] || cat >/dev/null
    } | grep -c -m $((anchor_oci_max_entries + 1)) -e '^Packing ' -e '^Hard link ' >"$dir/entries"
    anchor_recall "$dir/entries"
    if [ "${anchor_recall:-0}" -gt "$anchor_oci_max_entries" ]; then
        anchor_fail "it has more than $anchor_oci_max_entries files and directories" \
            "raise rd.anchor.oci.max_entries if the node has the memory for them, or publish the image as squashfs"
        return 1
    fi
    # Where tar2sqfs gave up, what comes before it ended for that reason (141 is SIGPIPE, where that is not ignored).
    anchor_recall "$dir/unpacked"
    why=$anchor_recall
    anchor_recall "$dir/unpack.error"
    case $why:$anchor_recall in
        0:* | 141:* | *'roken pipe'*) ;;
        *)
            anchor_fail "it cannot be unpacked: ${anchor_recall:-no reason was given}" \
                "does it have the compression that its media type says ($anchor_oci__type)?"
            return 1
            ;;
    esac
    why=$(sed -n '/(invalid name)$/{s/^skipping //;p;q;}' "$dir/made.error")
    if [ -n "$why" ]; then
        anchor_fail "it has an entry that leads out of the image: $(printf '%.200s' "$why")" "see what published it"
        return 1
    fi
    anchor_recall "$dir/made"
    [ "$anchor_recall" != 0 ] || return 0
    why=$(sed -n '/^$/d; $p' "$dir/made.error")
    why=${why:-tar2sqfs ended with status $anchor_recall}
    case $why in
        *': File exists') anchor_fail "it has the same file twice: $(printf '%.200s' "${why%: File exists}")" "see what published it" ;;
        *'I/O error'* | *'No space left'* | *'ut of memory'* | *'annot allocate memory'*)
            anchor_fail "it needs more memory than the node has for it" "give the node more memory, or make the image smaller"
            ;;
        *)
            anchor_fail "it cannot be made a squashfs: $(printf '%.200s' "$why")" \
                "is it a tar archive as its media type says ($anchor_oci__type), and without hard links out of the layer?"
            ;;
    esac
}

# usage: anchor_oci__unpack <BLOB
# Prints the uncompressed layer. tar2sqfs could do that itself, but takes the end of gzip's first member for the end of
# all, and some layers have many. zlib, which zstd uses where it is built with it, is twice as fast as gzip.
anchor_oci__unpack() {
    case $anchor_oci__type in
        *gzip)
            case $(zstd -vV 2>&1) in
                *gzip*) zstd -dcq ;;
                *) gzip -dc ;;
            esac
            ;;
        *zstd) zstd -dcq ;;
        *) cat ;;
    esac
}

# usage: anchor_oci__look DIR NUMBER
# Mounts a layer's squashfs, and leaves in the layer's directory what overlayfs cannot see in it: whiteouts and implied,
# the names of files and of directories that have no entry, with a NUL after each; and gone, lines for anchor_oci__plain:
# "oDIRECTORY/" for an opaque one and "wPATH" for a whiteout.
anchor_oci__look() {
    local dir="$anchor_oci_dir/$2"
    anchor_oci__attach "$1" "$2" squashfs || return 1
    if ! find "$1/m$2" -mindepth 1 \( -name '.wh.*' -prune -fprintf "$dir/whiteouts" '%P\0' \) -o -type d -perm 0 \
        -uid "$ANCHOR_OCI_NOBODY" -gid "$ANCHOR_OCI_NOBODY" -fprintf "$dir/implied" '%P\0' ||
        ! anchor_oci__lines "$dir/implied" "$dir/lines" || ! anchor_oci__lines "$dir/whiteouts" "$dir/names" ||
        ! LC_ALL=C sed -n -e 's|^\(\(.*/\)\{0,1\}\)\.wh\.\.wh\.\.opq$|o\1|p' -e t -e '/^\(.*\/\)\{0,1\}\.wh\.\.wh\./d' \
            -e 's|^\(\(.*/\)\{0,1\}\)\.wh\.|w\1|p' "$dir/names" >"$dir/gone"; then
        anchor_fail "what is in it cannot be listed" "is there memory left?"
        return 1
    fi
    if grep -q '^w\(.*/\)\{0,1\}\.\{0,2\}$' "$dir/gone"; then
        anchor_fail "it has an entry that leads out of the image: a .wh. of no name" "see what published it"
        return 1
    fi
    [ -n "$(sed -n "${ANCHOR_OCI_MARKS}p" "$dir/gone")$(sed -n "${ANCHOR_OCI_MARKS}p" "$dir/lines")" ] || return 0
    anchor_fail "it takes away more than $ANCHOR_OCI_MARKS files, or leaves out as many directories" "squash the image"
}

# usage: anchor_oci__lines NAMES LINES
# Writes names with a NUL after each as lines for anchor_oci__plain.
anchor_oci__lines() {
    LC_ALL=C sed -z -e 's/\\/\\0134/g' -e 's/\n/\\0012/g' "$1" >"$2.new" && tr '\0' '\n' <"$2.new" >"$2" && rm -f "$2.new"
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
# Makes the trees between the layers of an ordinary image, oldest first, and leaves the names in stack.
anchor_oci__stack() {
    local n=1 dir above lowers='' root=''
    anchor_note format "tar layers"
    while [ "$n" -le "$anchor_oci_count" ]; do
        dir=$anchor_oci_dir/$n above=''
        # Whoever hides all of the root leaves nothing of the older layers.
        ! grep -q '^o$' "$dir/gone" || lowers=''
        if [ -n "$lowers" ] && [ -s "$dir/gone" ]; then
            anchor_oci__below "$1" "b$n" "$lowers" "$dir/gone" || return 1
            lowers="b$n:$lowers"
        fi
        if [ -s "$dir/whiteouts" ] || [ -s "$dir/implied" ]; then
            anchor_oci__above "$1" "$n" "$lowers" || return 1
            above="a$n:"
        fi
        lowers="${above}m$n${lowers:+:$lowers}"
        set -- "$1" "$(stat -c '%u:%g %a' "$1/m$n")"
        [ "$2" = "$ANCHOR_OCI_NOBODY:$ANCHOR_OCI_NOBODY 0" ] || root=$2
        n=$((n + 1))
    done
    # The root is that of the last layer that has an entry for it.
    if ! mkdir -m 0755 "$1/top" ||
        { [ -n "$root" ] && ! { chown "${root% *}" "$1/top" && chmod "${root#* }" "$1/top"; }; }; then
        anchor_fail "cannot write to $1"
        return 1
    fi
    anchor_keep "$1/stack" "top:$lowers"
}

# usage: anchor_oci__below DIR TREE OLDER GONE
# Makes a tree of overlayfs's marks for what a layer takes away from OLDER, a stack.
anchor_oci__below() {
    local tree="$1/$2" line path error=''
    while IFS= read -r line; do
        anchor_oci__plain "$tree/${line#?}"
        path=${anchor_oci__plain%/*}
        [ -d "$path" ] || error=$(mkdir -p "$path" 2>&1) || break
    done <"$4"
    [ -n "$error" ] || error=$(find "$tree" -mindepth 1 -type d -printf '%P\0' 2>&1 >"$anchor_oci_dir/names") || error=${error:-find failed}
    [ -n "$error" ] || anchor_oci__dress "$1" "$3" "$tree" "$anchor_oci_dir/names" || return 1
    [ -n "$error" ] || while IFS= read -r line; do
        anchor_oci__plain "./${line#?}"
        path=$anchor_oci__plain
        # What leads to it is no directory in OLDER, or has been taken away as a whole meanwhile.
        anchor_oci__directory "$tree" "${path%/*}" || continue
        case $line in
            o*) error=$(setfattr -n trusted.overlay.opaque -v y "$tree/$path" 2>&1) ;;
            w*)
                # A program less for each: seldom is anything there, in a tree that began empty.
                error=$({ { [ ! -e "$tree/$path" ] || rm -rf "${tree:?}/$path"; } && mknod "$tree/$path" c 0 0; } 2>&1)
                ;;
        esac || break
    done <"$4"
    [ -n "$error" ] || return 0
    anchor_fail "cannot mark what a layer takes away: $error" "is there memory left for the image?"
}

# usage: anchor_oci__above DIR NUMBER OLDER
# Makes the tree above a layer: what overlayfs writes when, in the layer on top of OLDER, a stack, the files that stand for
# whiteouts go and directories without an entry get the attributes that they have in OLDER.
anchor_oci__above() {
    local dir="$anchor_oci_dir/$2" view="$1/view" error status=0
    if ! error=$({
        mkdir -p "$1/a$2" "$1/work" "$view" && cd "$1" &&
            mount -t overlay -o "lowerdir=m$2${3:+:$3},upperdir=a$2,workdir=work" anchor-image "$view" && cd "$view" &&
            xargs -0 -r rm -rf -- <"$dir/whiteouts" &&
            xargs -0 -r chown 0:0 -- <"$dir/implied" && xargs -0 -r chmod 0755 -- <"$dir/implied"
    } 2>&1); then
        anchor_fail "cannot hide what a layer takes away: $error" \
            "is there memory left for the image, and does this kernel have overlayfs (the overlay module)?"
        return 1
    fi
    anchor_oci__dress "$1" "$3" "$view" "$dir/implied" || status=1
    umount "$view" || umount -l "$view"
    rm -rf "${1:?}/work"
    return "$status"
}

# usage: anchor_oci__dress DIR STACK TREE NAMES
# Gives directories of TREE, with a NUL after each name in NAMES, the attributes that they have in STACK. One that is no
# directory there, and empty, goes: nothing but whiteouts led to it.
anchor_oci__dress() {
    local older="$1/older" known="$anchor_oci_dir/known" line path error status=0
    if ! error=$({
        mkdir -p "$older" && anchor_oci__lines "$4" "$known.lines" && LC_ALL=C sort -r -o "$known.lines" "$known.lines" &&
            { [ -z "$2" ] || anchor_oci__overlay "$1" "$2" "$older"; }
    } 2>&1); then
        anchor_fail "cannot mount the older layers: $error" "does this kernel have overlayfs (the overlay module)?"
        return 1
    fi
    while IFS= read -r line; do
        anchor_oci__plain "./$line"
        path=$anchor_oci__plain
        if anchor_oci__directory "$older" "$path" || {
            rmdir "$3/$path" 2>/dev/null && anchor_oci__directory "$older" "${path%/*}" &&
                { [ -L "$older/$path" ] || [ -e "$older/$path" ]; }
        }; then
            printf '%s\0' "$path"
        fi
    done <"$known.lines" >"$known"
    if [ -s "$known" ]; then
        error=$(tar -C "$older" --no-recursion --null -T "$known" --numeric-owner --xattrs --xattrs-include='*' -cf - 2>/dev/null |
            tar -C "$3" --numeric-owner --xattrs --xattrs-include='*' -xpf - 2>&1) || {
            # Without them, a directory would be open to more than it was.
            anchor_fail "directories cannot get the attributes that they have in older layers: $error" \
                "is there memory left for the image?"
            status=1
        }
    fi
    [ -z "$2" ] || umount "$older" || umount -l "$older"
    return "$status"
}

# usage: anchor_oci__directory ROOT PATH
# Whether PATH is a directory in ROOT, and so is all that leads to it: a symbolic link there could lead anywhere.
anchor_oci__directory() {
    local rest="$2/" path="$1"
    while [ -n "$rest" ]; do
        path=$path/${rest%%/*}
        rest=${rest#*/}
        [ ! -L "$path" ] && [ -d "$path" ] || return 1
    done
}

# usage: anchor_oci__plain TEXT
# Sets anchor_oci__plain to a path of which anchor_oci__look has escaped backslashes and line ends.
anchor_oci__plain() {
    anchor_oci__plain=$1
    case $1 in
        *\\*)
            anchor_oci__plain=$(printf '%b.' "$1")
            anchor_oci__plain=${anchor_oci__plain%.}
            ;;
    esac
}
