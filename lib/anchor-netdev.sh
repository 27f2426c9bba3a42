#!/bin/sh
# Complete what systemd-network-generator makes of vlan= and bond=, before systemd-networkd reads it.
#
# The generator of systemd 247 writes no VLAN number (bullseye's dracut 051), and no version up to 262 writes a bond's
# options: all bonds would be balance-rr and would not notice a cable that is pulled. Settings: systemd.netdev(5).
# Needs anchor-report.sh and anchor-cmdline.sh.
# shellcheck disable=SC3043 # `local` is the one extension that dash, busybox and bash share

# usage: anchor_netdev_run
# Appends to each /run/systemd/network/*.netdev what it lacks. Status 1 if one could not be written.
anchor_netdev_run() {
    local file line kind netdev sections status=0
    for file in "${ANCHOR_ROOT:-}"/run/systemd/network/*.netdev; do
        [ -f "$file" ] || continue
        kind='' netdev='' sections=''
        while read -r line; do
            case $line in
                Kind=*) kind=${line#Kind=} ;;
                Name=*) netdev=${line#Name=} ;;
                '['*) sections=$sections$line ;;
            esac
        done <"$file"
        case $kind$sections in
            *'[VLAN]'* | *'[Bond]'*) ;;
            vlan*) anchor_netdev__vlan || status=1 ;;
            bond*) anchor_netdev__bond || status=1 ;;
        esac
    done
    return "$status"
}

# usage: anchor_netdev__vlan
# The number is what the name ends with (dracut.cmdline(7)): vlan0005, vlan5, eth0.0005, eth0.5.
anchor_netdev__vlan() {
    local digits="${netdev##*[!0-9]}"
    digits=${digits#"${digits%%[!0]*}"}
    if [ -z "$digits" ] || [ "${#digits}" -gt 4 ] || [ "$digits" -gt 4094 ]; then
        anchor_warn "vlan=$netdev: the name does not end with the number of a VLAN, 1 to 4094"
        return 0
    fi
    printf '\n[VLAN]\nId=%s\n' "$digits" >>"$file"
}

# usage: anchor_netdev__bond
# Without MACAddress= networkd makes up a bond's address, as udev does without install-core.sh's file.
anchor_netdev__bond() {
    local options='' option primary='' ports='' address=none
    anchor_cmdline_each anchor_netdev__word
    anchor_netdev__address
    {
        printf '\n[NetDev]\nMACAddress=%s\n\n[Bond]\n' "$address"
        while [ -n "$options" ]; do
            option=${options%%,*}
            options=${options#"$option"}
            options=${options#,}
            case $option in
                '') ;;
                *=*) anchor_netdev__option "${option%%=*}" "${option#*=}" ;;
                *) anchor_netdev__option "$option" '' ;;
            esac
        done
    } >>"$file" || return 1
    for file in "${file%/*}"/[0-9][0-9]-"$primary".network; do
        [ ! -f "$file" ] || printf '\n[Network]\nPrimarySlave=yes\n' >>"$file" || return 1
    done
}

# usage: anchor_netdev__word NAME VALUE HAS_VALUE
# Called for each word of the command line. Sets the caller's ports and options for bond=$netdev:PORTS[:OPTIONS[:MTU]].
anchor_netdev__word() {
    case $1=$2 in
        "bond=$netdev:"*)
            ports=${2#*:}
            ports=${ports%%:*}
            ;;
    esac
    case $1=$2 in
        "bond=$netdev:"*:*)
            options=${2#*:*:}
            options=${options%%:*}
            ;;
    esac
}

# usage: anchor_netdev__address
# Sets the caller's address, where systemd is older than 250 and does not know that a bond can do without one, to that of
# its first port. Whose driver may not be loaded yet: waits up to 20 s for it.
anchor_netdev__address() {
    local port="${ports%%,*}" version tries=0 found
    version=$(systemctl --version 2>/dev/null)
    version=${version#systemd }
    version=${version%%[!0-9]*}
    [ "${version:-250}" -lt 250 ] || return 0
    case $port in
        '' | */* | .*) return 0 ;;
    esac
    port="${ANCHOR_ROOT:-}/sys/class/net/$port"
    until [ -e "$port/address" ]; do
        if [ "$tries" -ge 200 ]; then
            anchor_warn "bond=$netdev: its first port ${port##*/} is not there; the bond gets an address of systemd's making"
            return 0
        fi
        tries=$((tries + 1))
        sleep 0.1 2>/dev/null || sleep 1
    done
    found=$(cat "$port/address" 2>/dev/null)
    case $found in
        '' | *[!0-9a-f:]*) ;;
        *) address=$found ;;
    esac
}

# usage: anchor_netdev__option NAME VALUE
# Prints one option of the kernel's bonding driver as networkd's setting. Sets the caller's primary.
anchor_netdev__option() {
    local value="$2" setting
    case $value in
        '' | *[!A-Za-z0-9.+\;_-]*)
            anchor_warn "bond=$netdev: the option $1 has no value that can be used; it is left out"
            return 0
            ;;
    esac
    case $1=$value in
        mode=*)
            setting=Mode
            anchor_netdev__number balance-rr active-backup balance-xor broadcast 802.3ad balance-tlb balance-alb
            ;;
        miimon=*) setting=MIIMonitorSec value=${value}ms ;;
        updelay=*) setting=UpDelaySec value=${value}ms ;;
        downdelay=*) setting=DownDelaySec value=${value}ms ;;
        arp_interval=*) setting=ARPIntervalSec value=${value}ms ;;
        arp_ip_target=*\;*)
            setting=ARPIPTargets
            value=$(printf '%s' "$value" | tr ';' ' ')
            ;;
        arp_ip_target=*) setting=ARPIPTargets ;;
        arp_validate=*)
            setting=ARPValidate
            anchor_netdev__number none active backup all
            ;;
        xmit_hash_policy=*)
            setting=TransmitHashPolicy
            anchor_netdev__number layer2 layer3+4 layer2+3 encap2+3 encap3+4
            ;;
        lacp_rate=*)
            setting=LACPTransmitRate
            anchor_netdev__number slow fast
            ;;
        ad_select=*)
            setting=AdSelect
            anchor_netdev__number stable bandwidth count
            ;;
        fail_over_mac=*)
            setting=FailOverMACPolicy
            anchor_netdev__number none active follow
            ;;
        min_links=*) setting=MinLinks ;;
        primary=*)
            primary=$value
            return 0
            ;;
        *)
            anchor_warn "bond=$netdev: systemd-networkd is not told about the option $1; it is left out"
            return 0
            ;;
    esac
    printf '%s=%s\n' "$setting" "$value"
}

# usage: anchor_netdev__number NAME...
# Puts the name in the place of its number in the caller's value: networkd takes names only.
anchor_netdev__number() {
    case $value in
        [0-9])
            [ "$value" -lt "$#" ] || return 0
            shift "$value"
            value=$1
            ;;
    esac
}
