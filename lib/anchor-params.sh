#!/bin/sh
# Reads the node's parameters: every word of every command-line source is offered to the stages' generated
# functions (params.sh), every value is checked, and all errors are reported together.
#
# Sets, for each parameter rd.anchor.<stage>.<name>, the variable anchor_<stage>_<name>; and anchor_auth,
# anchor_image: the names of the chosen stages.

ANCHOR_LIB="${ANCHOR_ROOT:-}/usr/lib/anchor/lib"
ANCHOR_STAGES="${ANCHOR_ROOT:-}/usr/lib/anchor/stages"

# usage: anchor_params_load
# Sources every stage's parameter functions. Sets anchor_stages: "core_anchor auth_acme ...", in the order of selection.
anchor_params_load() {
    local file
    anchor_stages=
    for file in "$ANCHOR_STAGES"/core/*/params.sh "$ANCHOR_STAGES"/auth/*/params.sh \
        "$ANCHOR_STAGES"/transport/*/params.sh "$ANCHOR_STAGES"/image/*/params.sh; do
        [ ! -f "$file" ] || . "$file" || return 1
    done
}

# usage: anchor_params_parse
# Reads, checks and chooses. Status 1 when anything is wrong; then everything wrong has been said and
# anchor_params_error sums it up.
anchor_params_parse() {
    anchor_untraced anchor_params__parse
}

# usage: anchor_params__parse
# The same, traced.
anchor_params__parse() {
    local stage
    anchor_params_bad=0
    anchor_params_error=
    for stage in $anchor_stages; do
        "anchor_${stage}_forget"
    done
    anchor_cmdline_each anchor_params_word ||
        anchor_param_bad /etc/anchor/params "or a file of the kernel command line cannot be read"
    for stage in $anchor_stages; do
        "anchor_${stage}_check"
    done
    anchor_params_choose auth "${anchor_auth:-}" && anchor_auth=$anchor_chosen
    anchor_params_image
    [ "$anchor_params_bad" -eq 0 ]
}

# usage: anchor_params_signed
# Whether this initramfs believes signed manifests only.
anchor_params_signed() {
    [ -e "${ANCHOR_ROOT:-}/etc/anchor/manifest.pub" ]
}

# usage: anchor_params_image
# Chooses the image stage; or, where a manifest will choose it, sees to it that nothing else says what to boot.
anchor_params_image() {
    local stage digest=''
    if [ -z "${anchor_manifest:-}" ]; then
        if anchor_params_signed; then
            anchor_param_bad rd.anchor.manifest "is required: this initramfs boots only what a signed manifest names"
        else
            anchor_params_choose image "${anchor_image:-}" && anchor_image=$anchor_chosen
        fi
        return
    fi
    # A signature protects the manifest as a digest would.
    ! anchor_params_signed || digest=signed
    anchor_param_list anchor_param_url rd.anchor.manifest "$anchor_manifest" ${digest:+"$digest" ''}
    for stage in $anchor_stages; do
        case $stage in
            image_*) "anchor_${stage}_sources" ;;
        esac
    done
}

# usage: anchor_params_word NAME VALUE HAS_VALUE
# Offers one word to each stage; refuses what nobody takes if it chooses a stage or is an rd.anchor.* name.
anchor_params_word() {
    local stage
    for stage in $anchor_stages; do
        ! "anchor_${stage}_take" "$@" || return 0
    done
    ! anchor_core_anchor_refuse "$@" || return 0
    case $1 in
        rd.anchor.*) anchor_param_bad "$1" "is not a parameter of any stage in this initramfs ($anchor_stages)" ;;
    esac
}

# usage: anchor_param_bad NAME REASON
# Reports one wrong parameter. The value itself is not shown: it may be hostile or secret.
anchor_param_bad() {
    anchor_params_bad=$((anchor_params_bad + 1))
    anchor_params_error="$anchor_params_error${anchor_params_error:+; }$1 $2"
    anchor_say 'error: ' "$1: $2"
}

# usage: anchor_param_valued NAME HAS_VALUE
# Status 1, with a report, for a bare word where a value is needed.
anchor_param_valued() {
    [ "$2" = 1 ] || {
        anchor_param_bad "$1" "needs a value: $1=..."
        return 1
    }
}

# usage: anchor_param_private NAME
# Status 1, with a report, for a secret that does not come from the baked-in defaults.
anchor_param_private() {
    [ "$anchor_cmdline_source" = "${ANCHOR_ROOT:-}/etc/anchor/params" ] || {
        anchor_param_bad "$1" "is a secret and every process can read the kernel command line: bake it in with --set $1=@FILE"
        return 1
    }
}

# usage: anchor_param_source NAME URL [DIGEST DIGEST_NAME]...
# Reports a URL that this initramfs cannot fetch from, or anything at all beside a manifest.
anchor_param_source() {
    if [ -z "${anchor_manifest:-}" ]; then
        anchor_param_url "$@"
        return
    fi
    anchor_param_beside "$1" "$2" || return 0
    shift 2
    while [ $# -gt 0 ]; do
        anchor_param_beside "$2" "$1" || :
        shift 2
    done
}

# usage: anchor_param_beside NAME VALUE
# Status 1, with a report, for a value that says what to boot where a manifest does.
anchor_param_beside() {
    local reason='is not for a boot with rd.anchor.manifest=, which says what to boot: give one of the two'
    [ -n "${anchor_manifest:-}" ] && [ -n "$2" ] || return 0
    case $anchor_params_error in
        *"$1 $reason"*) ;;
        *) anchor_param_bad "$1" "$reason" ;;
    esac
    return 1
}

# usage: anchor_param_one_of MISSING NAME VALUE [NAME VALUE...]
# Reports, as MISSING says, that none of these parameters has a value and no manifest takes their place; and each one but
# the first that has.
anchor_param_one_of() {
    local missing="$1" first="$2" given=''
    shift
    while [ $# -gt 0 ]; do
        if [ -n "$2" ] && [ -n "$given" ]; then
            anchor_param_bad "$1" "is given beside $given: give one of the two"
        fi
        [ -z "$2" ] || given=${given:-$1}
        shift 2
    done
    [ -n "$given${anchor_manifest:-}" ] || anchor_param_bad "$first" "$missing"
}

# usage: anchor_param_pinned NAME WHY REFERENCE
# Reports NAME, with WHY, unless REFERENCE ends in a digest.
anchor_param_pinned() {
    local digest="${3#*@sha256:}"
    if [ "$digest" != "$3" ]; then
        case ${#digest}:$digest in
            64:*[!0123456789abcdef]*) ;;
            64:*) return 0 ;;
        esac
    fi
    anchor_param_bad "$1" "$2"
}

# usage: anchor_param_sources NAME URLS [DIGEST DIGEST_NAME]...
# The same for each URL of a comma list.
anchor_param_sources() {
    anchor_param_list anchor_param_source "$@"
}

# usage: anchor_param_list FUNCTION NAME URLS [DIGEST DIGEST_NAME]...
# Calls FUNCTION for each URL of a comma list, which may be empty.
anchor_param_list() {
    local check="$1" name="$2" rest="$3" first
    shift 3
    while :; do
        first=${rest%%,*}
        "$check" "$name" "$first" "$@"
        [ "$first" != "$rest" ] || return 0
        rest=${rest#*,}
    done
}

# usage: anchor_param_url NAME URL [DIGEST DIGEST_NAME]...
# Reports a URL whose scheme no transport in this initramfs carries, or carries only with a digest and none is given.
anchor_param_url() {
    local name="$1" scheme="${2%%://*}" remedy=''
    [ -n "$2" ] || return 0
    if ! anchor_stage_for_scheme "$scheme"; then
        anchor_param_bad "$name" "no transport in this initramfs carries $scheme://"
        return
    fi
    [ "$anchor_transport_needs_digest" = 1 ] || return 0
    shift 2
    while [ $# -gt 0 ]; do
        [ -z "$1" ] || return 0
        remedy="${remedy:-add }$2= or "
        shift 2
    done
    anchor_param_bad "$name" "$scheme:// is not protected: ${remedy}use https://"
}

# usage: anchor_stage_for_scheme SCHEME
# Sets anchor_transport (the stage's name as in its functions) and anchor_transport_needs_digest (0 or 1); status 1 if
# no transport carries SCHEME.
anchor_stage_for_scheme() {
    local stage
    for stage in $anchor_stages; do
        case $stage in
            transport_*) ! "anchor_${stage}_scheme" "$1" || return 0 ;;
        esac
    done
    return 1
}

# usage: anchor_params_choose KIND NAME
# Sets anchor_chosen to the stage called NAME, or without a name to the first one whose required parameters are
# given, or else to the first one, so that what it lacks is reported.
anchor_params_choose() {
    local stage first='' names=''
    anchor_chosen=
    for stage in $anchor_stages; do
        case $stage in
            "$1"_*) ;;
            *) continue ;;
        esac
        first=${first:-$stage}
        names="$names ${stage#"$1"_}"
        if [ -n "$2" ]; then
            anchor_params_same_name "$2" "${stage#"$1"_}" || continue
        else
            "anchor_${stage}_selected" || continue
        fi
        anchor_chosen=${stage#"$1"_}
        break
    done
    if [ -z "$anchor_chosen" ] && [ -n "$2" ]; then
        anchor_param_bad "rd.anchor.$1" "names no $1 stage of this initramfs, which has:$names"
        return 1
    fi
    anchor_chosen=${anchor_chosen:-${first#"$1"_}}
    if [ -z "$anchor_chosen" ]; then
        anchor_param_bad "rd.anchor.$1" "this initramfs holds no $1 stage"
        return 1
    fi
    "anchor_$1_${anchor_chosen}_require"
}

# usage: anchor_params_same_name NAME WORD
# Whether a stage's NAME, which may hold dashes, has WORD as its form in function names.
anchor_params_same_name() {
    local rest="$1" word=''
    while :; do
        case $rest in
            *-*) word="$word${rest%%-*}_" && rest=${rest#*-} ;;
            *) break ;;
        esac
    done
    [ "$word$rest" = "$2" ]
}
