#!/bin/sh
# What a node asks of an OCI registry: a tag's or digest's manifest, the one for its platform, and blobs by their digest
# (OCI Distribution Specification 1.1). All bytes come through anchor_fetch: mirrors, attempts, digests and memory are its
# business. The registry is a transport to it (anchor-registry.sh).
#
# A reference is a URL: https://REGISTRY/NAME[:TAG][@sha256:DIGEST]. http:// is for a reference with a digest only.
#
#   anchor_oci_open DIR "REFERENCE..."    the image's reference, and those of its mirrors
#   anchor_oci_resolve PLATFORM [SIZE]    the manifest, checked; sets what is listed there
#   anchor_oci_get DIGEST SIZE DEST       a blob as a file
#   anchor_oci_stream DIGEST SIZE NAME FUNCTION   a blob as standard input
#   anchor_oci_authfile FILE              the credentials, for another program
#
# Needs anchor-report.sh, anchor-fetch.sh, anchor-registry.sh, anchor-stream.sh where a blob is streamed, and the programs jq and
# uname.
# shellcheck disable=SC2154 # anchor_recall is set by anchor_recall, anchor_json by anchor_json

ANCHOR_OCI_DOCUMENT_MAX=4194304 # bytes of a manifest or a configuration; registries have this limit, too
ANCHOR_OCI_LAYERS_MAX=128       # that overlayfs can stack is 500, and layers come with whiteouts

ANCHOR_OCI_INDEX_TYPES='application/vnd.oci.image.index.v1+json application/vnd.docker.distribution.manifest.list.v2+json'
ANCHOR_OCI_MANIFEST_TYPES='application/vnd.oci.image.manifest.v1+json application/vnd.docker.distribution.manifest.v2+json'

# The manifest or index as lines: of what is wrong with it ("bad WHY"), or "index" and for each manifest in it
# "entry DIGEST SIZE OS ARCHITECTURE VARIANT", or "manifest", "config DIGEST SIZE TYPE" and "layer DIGEST SIZE TYPE" for
# each layer. Nothing is printed that could be more than one word.
# shellcheck disable=SC2016 # $ are jq's
ANCHOR_OCI_JQ='
def word: if type == "string" and length < 200 and test("\\A[A-Za-z0-9][A-Za-z0-9._+/-]*\\z") then . else "-" end;
def described: type == "object"
    and (.digest | type == "string" and length == 71 and test("\\Asha256:[0-9a-f]{64}\\z"))
    and (.size | type == "number" and . >= 0 and . < 1e14 and floor == .);
def shown: "\(.digest[7:]) \(.size)";
if length != 1 or (.[0] | type) != "object" then "bad it is not one JSON object"
else .[0]
    | if .schemaVersion != 2 then "bad its schemaVersion is not 2"
    elif has("manifests") and has("layers") then "bad it is a manifest and an index at the same time"
    elif (.mediaType // null) as $type | $type != null and ($types | split(" ") | index($type) | not)
        then "bad its media type is none of a manifest or index"
    elif has("manifests") then
        if (.manifests | type) != "array" or (.manifests | length) > 1000 then "bad it lists no manifests, or too many"
        elif (.manifests | all(described) | not) then "bad it has an entry without a SHA-256 digest or a size"
        else "index", (.manifests[]
            | (if (.platform | type) == "object" then .platform else {} end) as $p
            | select((.mediaType | word) as $type | $types | split(" ") | index($type))
            | "entry \(shown) \($p.os | word) \($p.architecture | word) \($p.variant | word)")
        end
    elif (.layers | type) != "array" then "bad it has neither layers nor manifests"
    elif (.layers | length) == 0 or (.layers | length) > $most then "bad it has \(.layers | length) layers; 1 to \($most) are allowed"
    elif ([.config, .layers[]] | all(described) | not) then "bad it has a layer or configuration without a SHA-256 digest or a size"
    else "manifest", "config \(.config | shown) \(.config.mediaType | word)",
        (.layers[] | "layer \(shown) \(.mediaType | word)")
    end
end'

# usage: anchor_oci_reference URL [image]
# Takes a reference apart. With `image`, a tag over http:// is refused: nothing would protect it. Sets anchor_oci_base
# (https://REGISTRY/v2/NAME), anchor_oci_name, anchor_oci_tag and anchor_oci_digest (64 digits): the last two may be empty,
# but not both. Status 1, explained, when it is none.
anchor_oci_reference() {
    local rest="${1#*://}" registry why='' LC_ALL=C
    anchor_oci_tag='' anchor_oci_digest='' anchor_oci_name=''
    registry=${rest%%/*}
    case $rest in
        "$registry" | */) why="it names no image: REGISTRY/NAME:TAG" ;;
    esac
    case $registry in
        *@*) why="it has a user in it: credentials go elsewhere (see doc/oci.md)" ;;
    esac
    rest=${rest#"$registry"}
    rest=${rest#/}
    case $rest in
        *@sha256:*)
            anchor_oci_digest=${rest#*@sha256:}
            rest=${rest%%@*}
            case ${#anchor_oci_digest}:$anchor_oci_digest in
                64:*[!0-9a-f]*) why="its digest is not SHA-256 in lower case" ;;
                64:*) ;;
                *) why="its digest is not SHA-256" ;;
            esac
            ;;
        *@*) why="its digest is not SHA-256" ;;
    esac
    case $rest in
        *:*)
            anchor_oci_tag=${rest#*:}
            rest=${rest%%:*}
            case ${#anchor_oci_tag}:$anchor_oci_tag in
                *:[!A-Za-z0-9_]* | *:*[!A-Za-z0-9._-]* | *: | 1[3-9]?:* | 12[89]:* | [2-9]??:* | ????*:*) why="its tag is none" ;;
            esac
            ;;
    esac
    case /$rest/ in
        *[!a-z0-9._/-]* | */[._-]* | *[._-]/* | *//* | *..*) why=${why:-"its name is none: lower-case letters, digits and single separators"} ;;
    esac
    case ${2:-}:$1:$anchor_oci_digest in
        image:http://*:) why=${why:-"nothing protects http://: add the manifest's digest (@sha256:...) or use https://"} ;;
    esac
    if [ -n "$why" ]; then
        anchor_fail "the reference of the image is of no use: $why" "write REGISTRY/NAME:TAG or REGISTRY/NAME@sha256:DIGEST"
        return 1
    fi
    [ -n "$anchor_oci_tag$anchor_oci_digest" ] || anchor_oci_tag=latest
    anchor_oci_name=$rest
    anchor_oci_base=${1%%://*}://$registry/v2/$rest
}

# usage: anchor_oci_open DIR "REFERENCE..."
# Begins with an image: DIR, private, will hold manifests and tokens; what an earlier run left there goes. The first
# reference is the image's, the others are of its mirrors, whose tag and digest, if any, do not count. Sets
# anchor_oci_dir, anchor_oci_bases, anchor_oci_tag, anchor_oci_digest and anchor_oci_name.
anchor_oci_open() {
    local each tag='' digest='' name='' first=1
    anchor_oci_dir=$1
    anchor_oci_bases=
    if ! rm -rf "${1:?}" || ! mkdir -m 700 "$1"; then
        anchor_fail "cannot make $1" "is /run full?"
        return 1
    fi
    for each in $2; do
        anchor_oci_reference "$each" "${first:+image}" || return 1
        if [ -n "$first" ]; then
            tag=$anchor_oci_tag digest=$anchor_oci_digest name=$anchor_oci_name first=''
        fi
        anchor_oci_bases="$anchor_oci_bases${anchor_oci_bases:+ }$anchor_oci_base"
    done
    anchor_oci_tag=$tag anchor_oci_digest=$digest anchor_oci_name=$name
    [ -n "$anchor_oci_bases" ] && return 0
    anchor_fail "there is no reference to an image"
}

# usage: anchor_oci_here
# Sets anchor_oci_wanted to this node's, as OS/ARCHITECTURE[/VARIANT] in Go's words, which OCI uses.
anchor_oci_here() {
    anchor_oci_wanted=$(uname -m)
    case $anchor_oci_wanted in
        x86_64) anchor_oci_wanted=amd64 ;;
        aarch64) anchor_oci_wanted=arm64 ;;
        armv7l) anchor_oci_wanted=arm/v7 ;;
        armv6l) anchor_oci_wanted=arm/v6 ;;
        i?86) anchor_oci_wanted=386 ;;
    esac
    anchor_oci_wanted=linux/$anchor_oci_wanted
}

# usage: anchor_oci_resolve [PLATFORM [SIZE]]
# Fetches the manifest of what anchor_oci_open was given, for PLATFORM (linux/amd64) where there are several; without
# it, for this node's. SIZE is what the first document must have, in bytes. Leaves manifest.json and layers (lines of
# DIGEST SIZE TYPE) in anchor_oci_dir. Sets anchor_oci_manifest (its digest), anchor_oci_wanted, anchor_oci_config,
# anchor_oci_config_size, anchor_oci_config_type and anchor_oci_count (of layers). Notes reference, digest (of what the
# reference leads to) and manifest. Status 0 or 1.
anchor_oci_resolve() {
    local kind word digest size rest config=''
    anchor_oci_wanted=${1:-}
    [ -n "$anchor_oci_wanted" ] || anchor_oci_here
    rest=$anchor_oci_tag
    [ -z "$anchor_oci_digest" ] || rest=sha256:$anchor_oci_digest
    anchor_oci__document "manifests/$rest" index.json "$anchor_oci_digest" "${2:-}" || return 1
    anchor_oci_manifest=$anchor_oci__sha256
    word=${anchor_oci_bases%% *}
    word=${word#*://}
    anchor_note reference "${word%%/*}/$anchor_oci_name${anchor_oci_tag:+:$anchor_oci_tag}"
    anchor_note digest "sha256:$anchor_oci_manifest"
    anchor_oci__judge index.json || return 1
    if [ "$anchor_oci__kind" = index ]; then
        anchor_oci__choose || return 1
        anchor_oci_manifest=$anchor_oci__sha256
        anchor_oci__document "manifests/sha256:$anchor_oci_manifest" manifest.json "$anchor_oci_manifest" "$anchor_oci__size" || return 1
        anchor_oci__judge manifest.json || return 1
        if [ "$anchor_oci__kind" != manifest ]; then
            anchor_fail "the index of $anchor_oci_name leads to another index" "publish the image with one index over its manifests"
            return 1
        fi
    else
        mv -f "$anchor_oci_dir/index.json" "$anchor_oci_dir/manifest.json" || return 1
    fi
    anchor_note manifest "sha256:$anchor_oci_manifest"
    anchor_oci_count=0
    while read -r word digest size rest; do
        case $word in
            config)
                anchor_oci_config=$digest anchor_oci_config_size=$size anchor_oci_config_type=$rest
                ;;
            layer)
                anchor_oci_count=$((anchor_oci_count + 1))
                printf '%s %s %s\n' "$digest" "$size" "$rest" >&3
                ;;
        esac
    done <"$anchor_oci_dir/parsed" 3>"$anchor_oci_dir/layers"
}

# usage: anchor_oci_get DIGEST SIZE DEST
# Fetches a blob into the file DEST. Status 0 or 1.
anchor_oci_get() {
    anchor_oci__urls "blobs/sha256:$1"
    anchor_oci__fetch "$anchor_oci_urls" "$3" "$1" "$2"
}

# usage: anchor_oci_stream DIGEST SIZE NAME FUNCTION
# Gives a blob to FUNCTION as it comes (see anchor_fetch_stream); NAME.fetch is a directory for what that needs.
anchor_oci_stream() {
    local function="$4"
    anchor_oci__urls "blobs/sha256:$1"
    anchor_oci__fetch "$anchor_oci_urls" "$3" "$1" "$2"
}

# usage: anchor_oci_authfile FILE
# Writes this node's credentials for the image's registry, if it has any, to FILE, for root alone, in the form of
# containers-auth.json(5). Status 0 or 1.
anchor_oci_authfile() {
    local base="${anchor_oci_bases%% *}" anchor_registry__number=0 anchor_registry__authorization='' host
    anchor_registry__credentials || return 1
    [ -n "$anchor_registry__authorization" ] || return 0
    host=${base#*://}
    anchor_json "${host%%/*}"
    (umask 077 && printf '{"auths":{%s:{"auth":"%s"}}}\n' "$anchor_json" "${anchor_registry__authorization#Basic }" >"$1") && return 0
    anchor_fail "cannot write to ${1%/*}" "is /run full?"
}

# usage: anchor_oci__urls PATH
# Sets anchor_oci_urls: the URLs of PATH in the image's registry and its mirrors.
anchor_oci__urls() {
    local each
    anchor_oci_urls=
    for each in $anchor_oci_bases; do
        anchor_oci_urls="$anchor_oci_urls${anchor_oci_urls:+ }$each/$1"
    done
}

# usage: anchor_oci__fetch "URL..." DEST SHA256 [SIZE]
# anchor_fetch, or anchor_fetch_stream where the caller has a function, with the registry as the transport.
anchor_oci__fetch() {
    (
        # shellcheck disable=SC2317 # anchor_fetch calls it
        anchor_stage_for_scheme() {
            anchor_transport_needs_digest=0
            [ "$1" != http ] || anchor_transport_needs_digest=1
            anchor_transport=registry
        }
        if [ -n "${function:-}" ]; then
            anchor_fetch_stream "$@" "$function"
        else
            anchor_fetch "$@"
        fi
    )
}

# usage: anchor_oci__document PATH FILE SHA256 SIZE
# Fetches a small document to anchor_oci_dir/FILE. Sets anchor_oci__sha256 to its digest.
anchor_oci__document() {
    local anchor_fetch_limit="$ANCHOR_OCI_DOCUMENT_MAX" function=''
    anchor_oci__urls "$1"
    anchor_oci__fetch "$anchor_oci_urls" "$anchor_oci_dir/$2" "$3" "$4" || return 1
    anchor_oci__sha256=$3
    [ -n "$3" ] && return 0
    anchor_oci__sha256=$(sha256sum <"$anchor_oci_dir/$2")
    anchor_oci__sha256=${anchor_oci__sha256%% *}
    [ ${#anchor_oci__sha256} -eq 64 ] && return 0
    anchor_fail "could not take the digest of the manifest" "is sha256sum in the initramfs?"
}

# usage: anchor_oci__judge FILE
# Checks a manifest or index. Leaves its lines in anchor_oci_dir/parsed. Sets anchor_oci__kind to manifest or index.
anchor_oci__judge() {
    local why
    jq -r -s --arg types "$ANCHOR_OCI_MANIFEST_TYPES $ANCHOR_OCI_INDEX_TYPES" --argjson most "$ANCHOR_OCI_LAYERS_MAX" \
        "$ANCHOR_OCI_JQ" "$anchor_oci_dir/$1" >"$anchor_oci_dir/parsed" 2>"$anchor_oci_dir/error" ||
        printf 'bad it is not JSON\n' >"$anchor_oci_dir/parsed"
    anchor_recall "$anchor_oci_dir/parsed"
    anchor_oci__kind=$anchor_recall
    case $anchor_oci__kind in
        index | manifest) return 0 ;;
    esac
    why=${anchor_oci__kind#bad }
    anchor_fail "the manifest of $anchor_oci_name is of no use: $why" \
        "is ${anchor_oci_bases%% *} a registry, and the image one for Linux nodes? See what published it"
}

# usage: anchor_oci__choose
# Takes the manifest for anchor_oci_wanted out of an index. Sets anchor_oci__sha256 and anchor_oci__size.
anchor_oci__choose() {
    local word digest size os architecture variant has=''
    while read -r word digest size os architecture variant; do
        [ "$word" = entry ] || continue
        [ "$variant" = - ] && variant='' || variant=/$variant
        case $os/$architecture$variant in
            "$anchor_oci_wanted" | "$anchor_oci_wanted"/*)
                anchor_oci__sha256=$digest anchor_oci__size=$size
                return 0
                ;;
        esac
        has="$has${has:+, }$os/$architecture$variant"
    done <"$anchor_oci_dir/parsed"
    has=$(printf '%.300s' "${has:-nothing}")
    anchor_fail "the image $anchor_oci_name has no manifest for $anchor_oci_wanted: it has $has" \
        "publish it for this platform, or name one with the platform parameter"
}
