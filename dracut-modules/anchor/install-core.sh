# Prints the module that configures the network: the one that was asked for by name, which dracut's network module goes
# with; else systemd-networkd if there can be one. systemd-networkd needs nothing else of dracut and has an address
# seconds before the others; ip=, vlan= and bond= are read by systemd's own generator.
network_module() {
    local name asked=" ${dracutmodules-} ${add_dracutmodules-} ${force_add_dracutmodules-} "
    for name in network-manager network-legacy connman; do
        [[ $asked != *" $name "* ]] || { printf 'network\n' && return; }
    done
    if [[ -x ${dracutsysrootdir-}$systemdutildir/systemd-networkd && -x ${dracutsysrootdir-}$systemdutildir/systemd-network-generator ]] &&
        compgen -G "$dracutbasedir/modules.d/[0-9][0-9]systemd-networkd" >/dev/null; then
        printf 'systemd-networkd\n'
    else
        printf 'network\n'
    fi
}

# Devices that no node boots from or over, often hundreds of them; and what udev reports like devices: the kernel's drivers,
# their buses and its modules.
idle_subsystems=(tty vc vtconsole mem memory memory_tiering node cpu machinecheck bdi workqueue clocksource clockevents
    event_source wakeup thermal leds module drivers subsystem)

install_core() {
    local n
    for ((n = 0; n < ${#hooks[@]}; n += 2)); do
        inst_hook "${hooks[n]}" "${hooks[n + 1]}" "$moddir/hook-${hooks[n]}.sh"
    done
    install_site
    install_network
    install_early_udev
    install_direct
    install_late_modprobe
    # ualpn gives up root for nobody; dracut knows that user, but not its group.
    grep -E '^(nobody|nogroup):' "${dracutsysrootdir-}/etc/group" >>"$initdir/etc/group"
}

# What belongs to the site: its CA, its defaults, when this was built. ANCHOR_ETC is where anchor-build prepared it;
# without anchor-build it is the host's own /etc/anchor.
install_site() {
    local etc="${ANCHOR_ETC:-${dracutsysrootdir-}/etc/anchor}" name
    check_site "$etc" || exit 1
    mkdir -p "$initdir/etc/anchor"
    for name in ca.pem params build-time manifest.pub manifest-since images.squashfs; do
        [[ ! -e $etc/$name ]] || inst_simple "$etc/$name" "/etc/anchor/$name" || exit 1
    done
    [[ -e $initdir/etc/anchor/build-time ]] ||
        printf '%s\n' "${SOURCE_DATE_EPOCH:-$(date +%s)}" >"$initdir/etc/anchor/build-time"
    if [[ ! -e $initdir/etc/anchor/ca.pem ]]; then
        for name in "${bundles[@]}"; do
            [[ -e ${dracutsysrootdir-}$name ]] || continue
            cp -L "${dracutsysrootdir-}$name" "$initdir/etc/anchor/ca.pem"
            break
        done
    fi
    # One trust for every program: the paths that the distributions' TLS libraries read, and the one of older tools.
    for name in "${bundles[@]}" /ca.pem; do
        mkdir -p "$initdir${name%/*}"
        ln -sfn /etc/anchor/ca.pem "$initdir$name"
    done
}

# usage: check_site DIR
# Says what in DIR every node would fail by; status 1 when there is anything. Without anchor-build nobody else has looked.
check_site() {
    local name text why status=0
    for name in ca.pem manifest.pub build-time manifest-since; do
        [[ -e $1/$name ]] || continue
        { text=$(<"$1/$name"); } 2>/dev/null
        why=
        case $name in
            ca.pem)
                [[ $text == *'-----BEGIN '*'CERTIFICATE-----'* ]] || why='holds no certificate in PEM form'
                [[ $text != *'PRIVATE KEY-----'* ]] || why='holds a private key: a CA bundle holds certificates only'
                ;;
            manifest.pub)
                [[ $text == *'-----BEGIN PUBLIC KEY-----'* ]] || why='holds no public key in PEM form'
                [[ $text != *'PRIVATE KEY-----'* ]] || why='holds a private key: nodes need the public one'
                ;;
            *) [[ $text =~ ^[0-9]+$ ]] || why='is not a number of seconds since the epoch' ;;
        esac
        [[ -z $why ]] || {
            derror "anchor: $1/$name: $why"
            status=1
        }
    done
    return "$status"
}

install_network() {
    # Host names are looked up through DNS; before glibc 2.34 that is a library of its own.
    inst_libdir_file -o "libnss_dns.so.*" "libnss_files.so.*"
    # udev makes up an address for a bond, another at each boot, where no file says otherwise. Without one the kernel takes
    # the first port's, which is the one that a DHCP server knows.
    mkdir -p "$initdir/etc/systemd/network" || exit 1
    printf '[Match]\nType=bond\n\n[Link]\nMACAddressPolicy=none\n' >"$initdir/etc/systemd/network/10-anchor-bond.link" || exit 1
    if ! dracut_module_included systemd-networkd; then
        ! dracut_module_included network-manager || install_network_manager
        dracut_need_initqueue
        return
    fi
    inst_simple "$moddir/${network_file[0]}" "${network_file[1]}" || exit 1
    # It turns ip=, vlan= and bond= into networkd's files; dracut before 053 leaves it out.
    if [[ ! -e $initdir$systemdutildir/systemd-network-generator ]]; then
        inst_multiple "$systemdutildir/systemd-network-generator" \
            "$systemdsystemunitdir/systemd-network-generator.service" || exit 1
        "${SYSTEMCTL:-systemctl}" -q --root "$initdir" enable systemd-network-generator.service || exit 1
    fi
    # What the generator leaves out is put in behind it, and before networkd.
    install_unit anchor-netdev
    # The driver makes a bond0 by itself when it is loaded, without options, and networkd takes what is there. systemd
    # has this file, too, but not in the initramfs.
    mkdir -p "$initdir/etc/modprobe.d" || exit 1
    printf 'options bonding max_bonds=0\n' >"$initdir/etc/modprobe.d/anchor.conf" || exit 1
    # networkd is enabled for multi-user.target, which an initramfs never reaches.
    "${SYSTEMCTL:-systemctl}" -q --root "$initdir" add-wants initrd.target systemd-networkd.service || exit 1
}

# usage: install_unit NAME
# Enables one of our services for sysinit.target.
install_unit() {
    local unit
    mkdir -p "$initdir/etc/systemd/system/sysinit.target.wants" || exit 1
    for unit in "/etc/systemd/system/$1.service" "/etc/systemd/system/sysinit.target.wants/$1.service"; do
        ln -sfn "/usr/lib/anchor/$1.service" "$initdir$unit" || exit 1
    done
}

# dracut 051 looks for NetworkManager's programs in one directory only, which is not Debian's, and goes on without them.
install_network_manager() {
    local name directory
    for name in nm-initrd-generator nm-dhcp-helper; do
        [[ ! -e $initdir/usr/libexec/$name && ! -e $initdir/usr/lib/NetworkManager/$name && ! -e $initdir/usr/lib/$name ]] ||
            continue
        for directory in /usr/lib/NetworkManager /usr/lib; do
            [[ -x ${dracutsysrootdir-}$directory/$name ]] || continue
            inst "$directory/$name" || exit 1
            [[ $name == nm-dhcp-helper ]] || inst "$directory/$name" "/usr/libexec/$name" || exit 1
            break
        done
    done
}

# Hides modprobe until /proc is mounted, which is the first thing that an init does. Before it there is the kernel's own
# start, which asks modprobe six times, one after the other, for ciphers and hashes that it has built in or goes without:
# each time it would start the program and wait for it. (CONFIG_MODPROBE_PATH is /sbin/modprobe.) dracut leaves a file
# alone that is there.
install_late_modprobe() {
    local link="$initdir/usr/sbin/modprobe" target
    [[ -L $link && -x $link ]] || return 0
    target=$(readlink -m "$link") || return 0
    [[ $target == "$(readlink -m "$initdir")"/* ]] || return 0
    ln -sfn "/proc/self/root${target#"$(readlink -m "$initdir")"}" "$link" || exit 1
}

# Lets dracut's services run anchor-direct.sh instead of their scripts, which are in its second argument.
install_direct() {
    local hook program programs=() own="${dracutsysrootdir-}${systemdsystemunitdir-}" units="$initdir/etc/systemd/system"
    dracut_module_included dracut-systemd || return 0
    install_unit anchor-cards
    # systemd has services ignore SIGPIPE, and no shell can undo that: a program whose reader has gone would go on.
    mkdir -p "$units/dracut-pre-mount.service.d" &&
        printf '[Service]\nIgnoreSIGPIPE=no\n' >"$units/dracut-pre-mount.service.d/anchor-pipe.conf" || exit 1
    # All of them or none: what the first one leaves out, the second one does.
    for hook in cmdline pre-mount pre-pivot; do
        program=$(sed -n 's/^ExecStart=-//p' "$own/dracut-$hook.service" 2>/dev/null) &&
            [[ $program == /*/dracut-"$hook" ]] || return 0
        programs+=("$program")
    done
    for program in "${programs[@]}"; do
        hook=${program##*/dracut-}
        mkdir -p "$units/dracut-$hook.service.d" || exit 1
        printf '[Service]\nExecStart=\nExecStart=-/bin/sh /usr/lib/anchor/anchor-direct.sh %s %s\n' "$hook" "$program" \
            >"$units/dracut-$hook.service.d/anchor.conf" || exit 1
    done
    # Nothing is left to do for it then.
    printf '[Unit]\nConditionPathExists=!/run/anchor/steps/handed-off\n' >>"$units/dracut-pre-pivot.service.d/anchor.conf" ||
        exit 1
}

# dracut starts udev when its cmdline hooks are done, which costs a boot a second. Where no module has a hook that udev
# could depend on, both run at the same time, and what comes after udev waits for both. dracut's pre-udev service stays
# behind the hooks: it runs only for rd.driver.* and rd.break, and reads what they leave.
install_early_udev() {
    local name units="$initdir/etc/systemd/system" own="${dracutsysrootdir-}${systemdsystemunitdir-}"
    dracut_module_included systemd-networkd && dracut_module_included dracut-systemd &&
        [[ -e $own/dracut-pre-udev.service && -e $own/dracut-cmdline.service ]] || return 0
    for name in ${mods_to_load-} ${modules_loaded-}; do
        case $name in
            base | anchor | anchor-*) ;;
            *) ! grep -qsE 'inst_hook +(cmdline|pre-udev|pre-trigger)' "$dracutbasedir/modules.d"/[0-9][0-9]"$name"/module-setup.sh || return 0 ;;
        esac
    done
    mkdir -p "$units/dracut-initqueue.service.d" || exit 1
    # Each of the two may say that one comes after the other.
    sed -e '/^After=dracut-cmdline/d' -e 's/^ExecStart=/ExecStartPre=-systemctl start dracut-cmdline.service\n&/' \
        "$own/dracut-pre-udev.service" >"$units/dracut-pre-udev.service" || exit 1
    sed -e '/^Before=/s/ *dracut-pre-\(udev\|trigger\)\.service//g' -e '/^Before=$/d' "$own/dracut-cmdline.service" \
        >"$units/dracut-cmdline.service" || exit 1
    printf '[Unit]\nAfter=dracut-cmdline.service\n' >"$units/dracut-initqueue.service.d/anchor.conf" || exit 1
    install_short_wait
}

# What an initramfs that only boots over the network can leave to the root that it boots: users that nobody is, device
# nodes that load their drivers when opened, and devices that are neither a card, nor a disk, nor behind one of them. All
# of these make udev wait or keep it busy before it comes to the network card.
install_short_wait() {
    local name units="$initdir/etc/systemd/system" own="${dracutsysrootdir-}${systemdsystemunitdir-}" skip=''
    install_users || return 0
    for name in systemd-sysusers systemd-tmpfiles-setup-dev-early systemd-tmpfiles-setup-dev kmod-static-nodes; do
        [[ ! -e $own/$name.service ]] || ln -sfn /dev/null "$units/$name.service" || exit 1
    done
    for name in "${idle_subsystems[@]}"; do
        skip+=" --subsystem-nomatch=$name"
    done
    sed -e "s/^ExecStart=.*udevadm trigger .*/&$skip/" "$own/systemd-udev-trigger.service" \
        >"$units/systemd-udev-trigger.service" || exit 1
    install_light_services
    install_no_sysctl
    # These two look for a root on a disk.
    dracut_module_included rootfs-block || for name in dracut-rootfs-generator systemd-gpt-auto-generator; do
        mkdir -p "$initdir/etc/systemd/system-generators" &&
            ln -sfn /dev/null "$initdir/etc/systemd/system-generators/$name" || exit 1
    done
}

# Services whose start a boot waits for. The filters of system calls of the two that nobody can reach over the network take
# longer to make than all else of their start; systemd-networkd keeps its own, and comes before the devices that can wait.
install_light_services() {
    local name units="$initdir/etc/systemd/system"
    for name in systemd-udevd systemd-journald; do
        mkdir -p "$units/$name.service.d" &&
            printf '%s\n' '[Service]' SystemCallFilter= SystemCallArchitectures= RestrictAddressFamilies= RestrictNamespaces=no \
                RestrictRealtime=no RestrictSUIDSGID=no MemoryDenyWriteExecute=no LockPersonality=no \
                >"$units/$name.service.d/anchor.conf" || exit 1
    done
    mkdir -p "$units/systemd-networkd.service.d" &&
        printf '[Service]\nNice=-10\n' >"$units/systemd-networkd.service.d/anchor.conf" || exit 1
}

# Leaves the settings of sysctl.d to the root that is booted, which has its own; unless one is about the network, because
# what an interface is set up with stays. With them goes a program that udev would start for each network card.
install_no_sysctl() {
    local rules="${dracutsysrootdir-}${udevdir-}/rules.d/99-systemd.rules"
    ! grep -RqsE '^[^#;]*net[./]' "$initdir"/{etc,usr/local/lib,usr/lib,lib}/sysctl.d "$initdir/etc/sysctl.conf" || return 0
    ln -sfn /dev/null "$initdir/etc/systemd/system/systemd-sysctl.service" || exit 1
    [[ -e $rules ]] || return 0
    mkdir -p "$initdir/etc/udev/rules.d" &&
        sed -e 's/^.*systemd-sysctl.*$/# left out/' "$rules" >"$initdir/etc/udev/rules.d/99-systemd.rules" || exit 1
}

# Copies from the host, as dracut does with some, the users and groups that daemons in the initramfs run as. Status 1 if
# the host lacks one: then the service that makes them has to run. (What basic.conf lists are those that every host has.)
install_users() {
    local file kind name rest list
    for file in "$initdir"/usr/lib/sysusers.d/*.conf "$initdir"/etc/sysusers.d/*.conf; do
        [[ -e $file && ${file##*/} != basic.conf ]] || continue
        while read -r kind name rest; do
            case $kind in
                u*) list='passwd group' ;;
                g*) list=group ;;
                *) continue ;;
            esac
            for kind in $list; do
                grep -qs "^$name:" "$initdir/etc/$kind" ||
                    grep -s "^$name:" "${dracutsysrootdir-}/etc/$kind" >>"$initdir/etc/$kind" || return 1
            done
        done <"$file"
    done
}
