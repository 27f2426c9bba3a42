#!/bin/sh
# Boots an image from an OCI registry the way of Anchor 0.1.5: buildah pulls it into a storage in memory, mksquashfs makes
# one squashfs of what buildah mounts, and the storage goes. The stage oci does the same without an engine.
#
# What buildah will pull is asked for beforehand by the same functions that oci has: whether the registry is there, trusts
# this node and has the image, and how large it is.
#
# While it works: /run/anchor/buildah, a tmpfs, has buildah's storage (overlay: with vfs each layer would be a copy of all
# below it) and its temporary files; /run/anchor/buildah.d its settings, certificates and credentials, for root alone. What
# stays is /run/anchor/image/image.
# shellcheck disable=SC2154 # anchor_buildah_* are this stage's parameters; anchor-oci.sh and others set the rest

ANCHOR_BUILDAH_PROGRESS_S=5      # between two lines of progress
ANCHOR_BUILDAH_COMPRESSION=lz4   # as oci's: what is faster to make counts more than what is smaller
ANCHOR_BUILDAH_SQUASH_MEMORY=32M # of mksquashfs

# usage: anchor_buildah_run
# Reads this stage's parameters. Leaves /run/anchor/image/image, complete and read-only. Safe to repeat. However it ends,
# nothing of buildah's storage is left; on failure nothing of the image either.
anchor_buildah_run() {
    anchor_untraced anchor_buildah__run
}

# usage: anchor_buildah__run
# The same, untraced: credentials must not get into a log.
anchor_buildah__run() {
    local run="${ANCHOR_ROOT:-}/run/anchor" reference="${anchor_buildah_registry%/}/$anchor_buildah_image" of status
    local dir="$run/image" storage="$run/buildah" work="$run/buildah.d"
    if [ -n "${anchor_manifest_urls:-}" ]; then
        anchor_fail "the manifest names the image stage buildah, which knows no manifests" \
            "boot it with the image stage oci: anchor-build image --at makes such manifests"
        return 1
    fi
    anchor_registry_user=$anchor_buildah_user
    anchor_registry_password=$anchor_buildah_password
    anchor_registry_proxy=$anchor_buildah_proxy
    of="$reference $anchor_buildah_platform $anchor_buildah_lookaside $anchor_buildah_policy"
    # An earlier try left it, complete; but what is wanted may have changed since.
    anchor_recall "$dir/of"
    if [ "$anchor_recall" = "$of" ] && anchor_mounted "$dir"; then
        case $anchor_mounted in
            ro | ro,*) return 0 ;;
        esac
    fi
    anchor_memory_free "$dir"
    anchor_memory_free "$storage"
    anchor_oci_open "$work" "$reference" && anchor_buildah__prepare && anchor_buildah__pull && anchor_buildah__squash
    status=$?
    anchor_memory_free "$storage"
    rm -rf "${work:?}" "${storage:?}"
    [ "$status" -eq 0 ] && (umask 077 && anchor_keep "$dir/of" "$of") &&
        anchor_memory_seal "$dir" && return 0
    anchor_memory_free "$dir"
    return 1
}

# usage: anchor_buildah_mount DIR
# Mounts the image read-only on DIR. Safe to repeat. On failure it frees the image's memory.
anchor_buildah_mount() {
    local dir="${ANCHOR_ROOT:-}/run/anchor/image"
    anchor_mounted "$1" && return 0
    anchor_mount_file squashfs "$dir/image" "$1" && return 0
    anchor_fail "cannot mount the image: $anchor_mount_error" \
        "does this kernel have loop and squashfs with $ANCHOR_BUILDAH_COMPRESSION? (see dmesg)"
    anchor_memory_free "$dir"
    return 1
}

# usage: anchor_buildah__prepare
# Everything before buildah: what the registry has, whether there is memory for it, and all that buildah reads.
# The helpers share the locals of anchor_buildah__run.
anchor_buildah__prepare() {
    local digest size rest bytes=0
    if [ -z "$anchor_oci_digest" ]; then
        anchor_info "rd.anchor.buildah.image= has no digest: nothing but the registry's certificate and rd.anchor.buildah.policy= vouch for the image"
    fi
    case $anchor_buildah_platform in
        '' | [a-z]*/[a-z0-9]*) ;;
        *)
            anchor_fail "rd.anchor.buildah.platform is not OS/ARCHITECTURE or OS/ARCHITECTURE/VARIANT" "such as linux/arm64"
            return 1
            ;;
    esac
    anchor_buildah__settings && anchor_oci_resolve "$anchor_buildah_platform" || return 1
    while read -r digest size rest; do
        bytes=$((bytes + size))
    done <"$anchor_oci_dir/layers"
    anchor_note_number bytes "$bytes"
    anchor_note_number layers "$anchor_oci_count"
    anchor_memory_available
    # buildah keeps each layer as it came beside what it unpacks to, until the last one is there.
    if [ $((2 * bytes)) -ge "$anchor_memory_available" ]; then
        anchor_fetch_amount "$bytes"
        bytes=$anchor_fetch_amount
        anchor_fetch_amount "$anchor_memory_available"
        anchor_fail "the image is too large: its layers have $bytes as they are, buildah needs more than twice that, and $anchor_fetch_amount of memory may be used" \
            "give the node more memory, make the image smaller, or boot it with the image stage oci, which needs less"
        return 1
    fi
    anchor_memory_space "$storage" "$anchor_memory_available" && mkdir "$storage/tmp" || return 1
}

# usage: anchor_buildah__settings
# Writes what buildah reads instead of its own files and of the system's, all private.
anchor_buildah__settings() {
    local credentials="${ANCHOR_ROOT:-}/run/anchor/credentials" signatures="$work/.config/containers/registries.d"
    local lookaside
    anchor_json "$anchor_buildah_lookaside" # a string of JSON is one of YAML
    lookaside=$anchor_json
    if ! (
        umask 077
        mkdir -p "$work/certs" "$signatures" && : >"$work/registries.conf" &&
            printf '[storage]\ndriver = "overlay"\n' >"$work/storage.conf" && cp "${ANCHOR_ROOT:-}/etc/anchor/ca.pem" "$work/certs/ca.crt" || exit 1
        # Signatures of sigstore lie in the registry, beside the image; buildah looks only where it is told to.
        {
            printf 'default-docker:\n  use-sigstore-attachments: true\n'
            [ -z "$anchor_buildah_lookaside" ] || printf '  lookaside: %s\n' "$lookaside"
        } >"$signatures/default.yaml" || exit 1
        if [ -s "$credentials/client.crt" ] && [ -s "$credentials/client.key" ]; then
            cp "$credentials/client.crt" "$work/certs/client.cert" && cp "$credentials/client.key" "$work/certs/client.key" || exit 1
        fi
        printf '%s\n' "$anchor_buildah_proxy" >"$work/proxy"
    ); then
        anchor_fail "cannot write buildah's settings to $work" "is /run full, and was the initramfs built with the site's CA?"
        return 1
    fi
    anchor_oci_authfile "$work/auth.json" && anchor_buildah__policy
}

# usage: anchor_buildah__policy
# Leaves the signature policy, which has to be JSON, in policy.json: without the parameter one that asks for no signature.
anchor_buildah__policy() {
    case $anchor_buildah_policy in
        '') printf '{"default":[{"type":"insecureAcceptAnything"}]}\n' >"$work/policy.json" ;;
        /*)
            if ! cp "${ANCHOR_ROOT:-}$anchor_buildah_policy" "$work/policy.json" 2>/dev/null; then
                anchor_fail "the signature policy $anchor_buildah_policy is not in this initramfs" \
                    "put it in, or bake its text in: --set rd.anchor.buildah.policy=@FILE, all on one line (jq -c)"
                return 1
            fi
            ;;
        *) printf '%s\n' "$anchor_buildah_policy" >"$work/policy.json" ;;
    esac
    jq -e 'type == "object"' "$work/policy.json" >/dev/null 2>&1 && return 0
    anchor_fail "the signature policy (rd.anchor.buildah.policy) is not a JSON object" "its form is that of containers-policy.json(5)"
}

# usage: anchor_buildah__pull
# Pulls the image, as often as rd.anchor.fetch.attempts says where it is the network that fails. Notes the digest of the
# manifest that buildah took. Status 0 or 1.
anchor_buildah__pull() {
    local deadline what="${anchor_oci_bases#*://}" attempt=1 start
    # buildah takes a tag or a digest; of both the digest counts.
    what="${what%%/*}/$anchor_oci_name"
    if [ -n "$anchor_oci_digest" ]; then
        what=$what@sha256:$anchor_oci_digest
    else
        what=$what:$anchor_oci_tag
    fi
    anchor_uptime_ms
    start=$anchor_uptime_ms
    deadline=$((start + anchor_fetch_timeout * 1000))
    set -- from --quiet --retry 0 --name anchor --platform "$anchor_oci_wanted" --signature-policy "$work/policy.json" --tls-verify=true --cert-dir "$work/certs"
    case $anchor_oci_bases in
        # Its digest makes the image what it is; nothing of this node's is shown to whoever answers.
        http://*) set -- from --quiet --retry 0 --name anchor --platform "$anchor_oci_wanted" --signature-policy "$work/policy.json" --tls-verify=false ;;
    esac
    [ ! -s "$work/auth.json" ] || set -- "$@" --authfile "$work/auth.json"
    until anchor_buildah__call "$@" "docker://$what"; do
        if ! anchor_buildah__passing || [ "$attempt" -ge "$anchor_fetch_attempts" ] || ! anchor_fetch_pause "$attempt" 0 "$deadline" \
            "pulling $what: attempt $attempt of $anchor_fetch_attempts: $anchor_buildah_error"; then
            anchor_buildah__failed "buildah cannot pull $what"
            return 1
        fi
        attempt=$((attempt + 1))
    done
    anchor_uptime_ms
    anchor_note_number pull_ms $((anchor_uptime_ms - start))
    anchor_buildah__call inspect --type container --format '{{.FromImageDigest}}' anchor || {
        anchor_buildah__failed "buildah does not know what it pulled"
        return 1
    }
    anchor_recall "$work/output"
    case $anchor_recall in
        sha256:????????????????????????????????????????????????????????????????) anchor_note manifest "$anchor_recall" ;;
    esac
}

# usage: anchor_buildah__squash
# Makes the squashfs of what buildah mounts.
anchor_buildah__squash() {
    local root size start error
    anchor_buildah__call mount anchor || {
        anchor_buildah__failed "buildah cannot mount what it pulled"
        return 1
    }
    anchor_recall "$work/output"
    root=$anchor_recall
    if [ ! -d "$root" ]; then
        anchor_fail "buildah does not say where it mounted the image"
        return 1
    fi
    # What it came as is not needed any more.
    rm -rf "${storage:?}/tmp"
    anchor_memory_available
    anchor_memory_space "$dir" "$anchor_memory_available" nr_inodes=64 || return 1
    anchor_uptime_ms
    start=$anchor_uptime_ms
    if ! timeout "$anchor_fetch_timeout" mksquashfs "$root" "$dir/image" -noappend -quiet -no-progress -exit-on-error \
        -comp "$ANCHOR_BUILDAH_COMPRESSION" -mem "$ANCHOR_BUILDAH_SQUASH_MEMORY" >"$work/error" 2>&1; then
        error=$(sed -n '/^$/d; $p' "$work/error")
        if grep -q -e 'No space left' -e 'Failed to write to output' "$work/error"; then
            anchor_fail "the squashfs of the image needs more memory than the node has beside the image itself" \
                "give the node more memory, make the image smaller, or boot it with the image stage oci, which needs less"
        else
            anchor_fail "the image cannot be made a squashfs: ${error:-mksquashfs gave no reason}"
        fi
        return 1
    fi
    anchor_uptime_ms
    anchor_note_number squash_ms $((anchor_uptime_ms - start))
    size=$(stat -c %s "$dir/image")
    anchor_note_number squashfs_bytes "$size"
    anchor_note format "squashfs"
}

# usage: anchor_buildah__call COMMAND [ARGUMENT...]
# Runs buildah with nothing of the environment, to which words of the kernel command line belong. What it prints is in
# output; on failure, anchor_buildah_error is its message.
anchor_buildah__call() {
    local status left pid
    anchor_uptime_ms
    left=$(((deadline - anchor_uptime_ms + 999) / 1000))
    [ "$left" -gt 0 ] || left=1
    set -- --root "$storage/root" --runroot "$storage/run" --storage-driver overlay --registries-conf "$work/registries.conf" "$@"
    # The proxy may have a password: no argument may.
    # shellcheck disable=SC2016 # for the other shell
    timeout -k 5 "$left" env -i "PATH=$PATH" "HOME=$work" "TMPDIR=$storage/tmp" "XDG_RUNTIME_DIR=$work" \
        CONTAINERS_CONF=/dev/null "CONTAINERS_STORAGE_CONF=$work/storage.conf" "SSL_CERT_FILE=$work/certs/ca.crt" "SSL_CERT_DIR=$work/none" /bin/sh -c '
        IFS= read -r proxy <"$HOME/proxy" && [ -n "$proxy" ] && HTTPS_PROXY=$proxy HTTP_PROXY=$proxy && export HTTPS_PROXY HTTP_PROXY
        exec buildah "$@"' sh "$@" >"$work/output" 2>"$work/error" </dev/null &
    pid=$!
    anchor_buildah__watch "$pid" &
    set -- "$!"
    wait "$pid"
    status=$?
    kill "$1" 2>/dev/null
    wait "$1" 2>/dev/null
    [ "$status" -ne 0 ] || return 0
    case $status in
        124 | 137) anchor_buildah_error="it was not done within $anchor_fetch_timeout s (rd.anchor.fetch.timeout)" ;;
        127) anchor_buildah_error="buildah is not in the initramfs" ;;
        *)
            # The query of a URL that a registry redirects to may be a signature.
            anchor_buildah_error=$(sed -n -e 's/?[^" ]*//g' -e 's/^Error: //p' "$work/error" | tail -n 1)
            [ -n "$anchor_buildah_error" ] || anchor_buildah_error=$(tail -n 1 "$work/error" | sed 's/?[^" ]*//g')
            anchor_buildah_error=$(printf '%.600s' "${anchor_buildah_error:-it ended with status $status}")
            ;;
    esac
    return 1
}

# usage: anchor_buildah__watch PID
# Says from time to time how much buildah has written, until it is killed.
anchor_buildah__watch() {
    local before=0 used
    # Whoever kills this leaves its sleep, which must hold nothing open.
    while sleep "$ANCHOR_BUILDAH_PROGRESS_S" >/dev/null 2>&1 && kill -0 "$1" 2>/dev/null; do
        used=$(stat -f -c '%b %f %S' "$storage") || return 0
        # shellcheck disable=SC2086 # three numbers
        set -- "$1" $used
        used=$((($2 - $3) * $4))
        [ "$used" -gt "$before" ] || continue
        before=$used
        anchor_fetch_amount "$used"
        anchor_info "pulling ${anchor_oci_name##*/}: $anchor_fetch_amount in the storage"
    done
}

# usage: anchor_buildah__passing
# Whether what buildah said is what another try may not meet.
anchor_buildah__passing() {
    case $anchor_buildah_error in
        *"no space left"* | *x509:* | *certificate*) return 1 ;;
        *"connection re"* | *"i/o timeout"* | *"no such host"* | *"unexpected EOF"* | *": EOF"* | *"network is unreachable"* | \
            *"no route to host"* | *"TLS handshake timeout"* | *"status code: 5"* | *"status: 5"* | *"toomanyrequests"* | *"Too Many Requests"*) return 0 ;;
    esac
    return 1
}

# usage: anchor_buildah__failed WHAT
# Says what failed, with buildah's own message. Always returns 1.
anchor_buildah__failed() {
    case $anchor_buildah_error in
        *"no space left"*)
            anchor_fail "$1: $anchor_buildah_error" \
                "give the node more memory, make the image smaller, or boot it with the image stage oci, which needs less"
            ;;
        *"crypto engine"*)
            anchor_fail "$1: $anchor_buildah_error" "gpg, which checks signatures of signedBy, was not on the host that built the initramfs"
            ;;
        *"ource image rejected"* | *"ignature"* | *olicy*)
            anchor_fail "$1: $anchor_buildah_error" "rd.anchor.buildah.policy= says which signatures the image must have"
            ;;
        *"nauthorized"* | *"denied"*)
            anchor_reject_credentials
            anchor_fail "$1: $anchor_buildah_error" "see who may pull this image there, and doc/oci.md for where credentials go"
            ;;
        *) anchor_fail "$1: $anchor_buildah_error" "see the registry's own log" ;;
    esac
}
