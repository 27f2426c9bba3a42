#!/bin/sh
# usage: anchor-direct.sh HOOK SCRIPT
# What dracut's services run instead of dracut's SCRIPT: before that one comes to a hook, it starts some ten programs, and
# all of them together take a slow node more than a second. Where this boot is anchor's, where no other module has a hook,
# and where the command line asks dracut for nothing, the hooks are all that SCRIPT would do. Else it is run.

# Whether this boot is anchor's and asks dracut for nothing. Words in quotes are left to dracut.
anchor_direct_boot() {
    local words='' word root='' file
    for file in /etc/cmdline /etc/cmdline.d/*.conf; do
        [ ! -e "$file" ] || return 1
    done
    IFS= read -r words </proc/cmdline
    set -f
    # shellcheck disable=SC2086 # split into words
    set -- $words
    set +f
    for word; do
        case $word in
            root=*) root=${word#root=} ;;
            *\"* | rd.break* | rd.debug* | rd.memdebug* | rd.hostonly* | rd.udev.* | rdbreak* | rdinitdebug* | rdudev*)
                return 1
                ;;
        esac
    done
    [ "$root" = anchor ]
}

# Whether all hooks of these names are anchor's.
anchor_direct_hooks() {
    local hook file
    for hook; do
        for file in /lib/dracut/hooks/"$hook"/* /etc/dracut/hooks/"$hook"/* /var/lib/dracut/hooks/"$hook"/*; do
            case $file in
                */[0-9][0-9]-hook-"$hook".sh | *'/*') ;;
                *) return 1 ;;
            esac
        done
    done
}

if ! anchor_direct_boot || ! anchor_direct_hooks cmdline pre-mount pre-pivot cleanup; then
    exec "$2"
fi
case $1 in
    # The next one reads the command line, too.
    cmdline) ;;
    pre-mount) . /usr/lib/anchor/lib/anchor-boot.sh && anchor_boot_direct ;;
    pre-pivot) . /usr/lib/anchor/lib/anchor-boot.sh && anchor_boot_handoff ;;
esac
