#!/bin/sh
# Certferry inside whole Debian systems, as root: bullseye and trixie with nothing but
# python3-minimal and openssl, sid with Python 3.15 and OpenSSL 4.0 of experimental (chroot), and
# bookworm booted with systemd, nginx and what hooks reach for. One line per check; the first that
# fails ends it. The trees are made with debootstrap from apt's own mirror and kept in
# $CERTFERRY_TREES; what happens here happens in copies.
set -eu
cd "$(dirname "$0")/.."
trees=${CERTFERRY_TREES:-/var/cache/certferry-trees}
work=$(mktemp -d)
server='' container=''
export LC_ALL=C DEBIAN_FRONTEND=noninteractive

stop() {   # pid...
    for pid in "$@"; do
        kill "$pid" 2>/dev/null || true
        wait "$pid" 2>/dev/null || true
    done
}

# shellcheck disable=SC2086  # empty, or one number each
trap 'stop $server $container; rm -rf "$work"' EXIT
trap 'exit 1' HUP INT TERM

check() {   # what, command...: one line; the command's output only where it fails
    what=$1
    shift
    set +e   # an if would switch -e off for all that is inside it
    ( set -e; "$@" ) >"$work/log" 2>&1
    status=$?
    set -e
    if [ "$status" -ne 0 ]; then
        cat "$work/log"
        echo "$what: FAILED ($*)"
        exit 1
    fi
    echo "$what: ok"
}

until_true() {   # seconds, command...
    deadline=$(($(date +%s) + $1))
    shift
    until "$@"; do
        [ "$(date +%s)" -lt "$deadline" ] || return 1
        sleep 0.1
    done
}

says() {   # status, text, command...: it ends with this status and prints this text
    expected=$1 text=$2 status=0
    shift 2
    "$@" >"$work/said" 2>&1 || status=$?
    cat "$work/said"
    [ "$status" -eq "$expected" ] && grep -q -e "$text" "$work/said"
}

no_word_of() {   # text, command...: it succeeds and does not print this text
    text=$1
    shift
    "$@" >"$work/said" 2>&1
    cat "$work/said"
    ! grep -q -e "$text" "$work/said"
}

newest_release() {   # mirror of this system's own release, from apt's lists
    # shellcheck disable=SC2016  # apt's own
    apt-get indextargets --format '$(RELEASE) $(COMPONENT) $(REPO_URI)' 'Identifier: Packages' |
        sed -n "s/^$(sed -n 's/^VERSION_CODENAME=//p' /etc/os-release) main //p" | head -n 1
}

make_tree() {   # release, packages: a copy of that system in $work/RELEASE, with the files to try
    if [ ! -d "$trees/$1" ]; then
        rm -rf "$trees/$1.new"
        mkdir -p "$trees"
        debootstrap --variant=minbase --include="$2" "$1" "$trees/$1.new" "$(newest_release)"
        [ "$1" != sid ] || add_newest_openssl "$trees/$1.new"
        rm -rf "$trees/$1.new"/var/cache/apt/archives/*.deb
        mv "$trees/$1.new" "$trees/$1"
    fi
    tree=$work/$1
    cp -a "$trees/$1" "$tree"
    mkdir "$tree/opt/certferry"
    cp certferry.py install.sh certferry.service certferry.timer "$tree/opt/certferry"
    cp -RL "$work/pki" "$tree/opt/pki"
}

apt() {   # words for apt-get in $tree; an archive's copy may be older than it says it may get
    run apt-get -q -y -o Acquire::Check-Valid-Until=false -o Acquire::Retries=3 "$@"
}

add_newest_openssl() {   # tree: the command and its library; Python's own stays sid's
    tree=$1
    echo "deb $(newest_release) experimental main" >>"$tree/etc/apt/sources.list"
    apt update
    apt install --no-install-recommends -t experimental openssl
}

mint() {   # certificates for one key in turn, and one for another
    mkdir "$work/pki"
    python3 - "$work/pki" <<'END'
import os, shutil, sys
from tests import world
folder = sys.argv[1]
authority = world.Authority(world.scratch())
first = authority.issue(["example.com", "*.example.com"])
key = {"key": first.key}
shutil.copy(authority.root, os.path.join(folder, "root.pem"))
for name, how in (("first", key), ("second", key), ("third", key), ("other", {})):
    os.mkdir(os.path.join(folder, name))
    for path in authority.issue(["example.com", "*.example.com"], **how):
        shutil.copy(path, os.path.join(folder, name))
    shutil.copy(path.replace("fullchain", "cert"), os.path.join(folder, name))
    wanted = os.path.join(folder, name, "privkey.pem")
    if not os.path.exists(wanted):
        shutil.copy(first.key, wanted)
END
}

serial_of() {   # standard input: a certificate
    openssl x509 -noout -serial
}

is_current() {   # name: the lineage in $tree has the certificate of that name
    [ "$(serial_of <"$tree/etc/letsencrypt/live/example.com/cert.pem")" = \
        "$(serial_of <"$work/pki/$1/cert.pem")" ]
}


# A minimal system, in a chroot: no systemd, no cron, no trust store, no json

inside() {   # command... in $tree, with a /proc and terminals that nobody else sees
    # shellcheck disable=SC2016  # the inner shell's
    exec env -i PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin \
        unshare --mount --propagation private sh -c \
        'mount --bind "$1" "$1"   # or no other namespace could be made inside
        mount -t proc proc "$1/proc"
        mount -t devpts -o newinstance,ptmxmode=666 devpts "$1/dev/pts"
        exec chroot "$@"' sh "$tree" "$@"
}

run() {   # the same, in a process of its own
    ( inside "$@" )
}

serve() {   # name [port]: an upstream shows that certificate; sets $server and $port
    # shellcheck disable=SC2086
    stop $server
    : >"$work/served"
    inside openssl s_server -www -accept "127.0.0.1:${2:-0}" -key "/opt/pki/$1/privkey.pem" \
        -cert "/opt/pki/$1/cert.pem" -cert_chain "/opt/pki/$1/chain.pem" \
        >"$work/served" 2>&1 </dev/null &
    server=$!
    until_true 10 grep -q '^ACCEPT' "$work/served" || { cat "$work/served"; exit 1; }
    port=${2:-$(sed -n 's/^ACCEPT .*://p' "$work/served")}
}

listing() {   # every path and sum of $tree, the certificates apart
    ( cd "$tree" && find etc usr var -path etc/letsencrypt -prune -o -type f -exec sha256sum {} + \
        -o -print | sort )
}

is_compiled_for() {   # interpreter...: Python's cache has the module for these, for all to read
    for interpreter in "$@"; do
        run "$interpreter" -IS -c 'import importlib.util, os
path = importlib.util.cache_from_source("/usr/local/lib/certferry/certferry.py")
assert os.stat(path).st_mode & 0o777 == 0o644, path'
    done
    [ "$(find "$tree/usr/local/lib/certferry/__pycache__" -type f | wc -l)" -eq $# ]
}

try_minimal() {   # release
    check "$1: a tree with python3-minimal and openssl" make_tree "$1" python3-minimal,openssl
    tree=$work/$1
    listing >"$work/before"
    check "$1: install.sh puts a cron file, and says that there is no cron" \
        says 0 'no cron here to run it twice a day. Try: apt-get install cron' \
        run sh -c 'umask 077; sh /opt/certferry/install.sh'
    check "$1: the cron file and the program are there" \
        grep -q ' root /usr/local/bin/certferry renew ' "$tree/etc/cron.d/certferry"
    check "$1: the module is compiled" is_compiled_for python3
    try_crossings "$1"
    check "$1: uninstall says what runs out" \
        says 0 'nothing renews these now: example.com (until 20' \
        run sh /opt/certferry/install.sh --uninstall
    listing >"$work/after"
    check "$1: uninstall leaves the tree as it was" cmp "$work/before" "$work/after"
    [ "$1" != trixie ] || try_cron
    rm -rf "$tree"
}

try_crossings() {   # label: certferry is installed in $tree
    check "$1: certferry --help" says 0 '^usage: ' run certferry --help
    check "$1: any user can start it" says 0 '^certferry ' \
        run setpriv --reuid=65534 --regid=65534 --clear-groups certferry --version
    serve first
    crossing="run certferry example.com --key /opt/pki/first/privkey.pem --from 127.0.0.1:$port"
    # shellcheck disable=SC2086
    check "$1: without a trust store the package is named" says 1 'ca-certificates' $crossing
    # shellcheck disable=SC2086
    check "$1: first crossing" says 0 '^example.com: installed' \
        $crossing --ca-file /opt/pki/root.pem
    check "$1: the certificate is in place" is_current first
    check "$1: unchanged" says 0 '^example.com: unchanged' run certferry renew
    serve second "$port"
    check "$1: rotation" says 0 '^example.com: installed' run certferry renew
    check "$1: the new certificate is in place" is_current second
    serve other "$port"
    check "$1: another key is refused" says 1 'another key' run certferry renew
    check "$1: the old certificate is in place" is_current second
    stop "$server"
    server=''
}

run_tests() {   # interpreter: what Python and openssl have a part in; what needs a tool is skipped here
    cp -r tests README.md "$tree/opt/certferry"
    # shellcheck disable=SC2016  # the inner shell's
    run sh -c 'cd /opt/certferry && CERTFERRY_QUICK=1 exec "$1" -m unittest tests.test_certificates \
        tests.test_judge tests.test_options tests.test_sources tests.test_proof' sh "$1"
}

add_cron() {
    apt update
    apt install --no-install-recommends cron
}

try_cron() {   # Debian's cron brings systemd's files along, which will never run here
    check "trixie: PYTHON names itself where it does not start" \
        says 1 'certferry: PYTHON=/nope does not start' \
        run env PYTHON=/nope sh /opt/certferry/install.sh
    check "trixie: installed again" says 0 '^installed ' run sh /opt/certferry/install.sh
    check "trixie: cron is installed, as advised" add_cron
    check "trixie: systemd came with it" test -x "$tree/usr/lib/systemd/systemd"
    check "trixie: the cron file stays" says 0 '^unchanged' run sh /opt/certferry/install.sh
    check "trixie: and goes" says 0 '^removed .*, /etc/cron.d/certferry$' \
        run sh /opt/certferry/install.sh --uninstall
    check "trixie: a first installation takes cron, too" \
        says 0 '^installed .*, /etc/cron.d/certferry$' run sh /opt/certferry/install.sh
}

# The newest Python that there is, and the newest openssl; sid's own Python is there before.
try_newest() {
    check "sid: a tree with Python 3.15 and OpenSSL 4.0" make_tree sid \
        python3-minimal,python3.15,openssl
    tree=$work/sid
    check "sid: the command is OpenSSL 4.0" says 0 '^OpenSSL 4[.]0' run openssl version
    check "sid: installed for the system's own Python" says 0 '^installed /usr/local/bin/' \
        run sh /opt/certferry/install.sh
    check "sid: it runs" says 0 '^certferry ' run certferry --version
    check "sid: an upgrade to Python 3.15" says 0 '^installed /usr/local/bin/certferry$' \
        run env PYTHON=/usr/bin/python3.15 sh /opt/certferry/install.sh
    check "sid: it is compiled for both" is_compiled_for python3 python3.15
    try_crossings "sid, Python 3.15"
    check "sid: the tests, with Python 3.15 and OpenSSL 4.0" run_tests python3.15
    check "sid: uninstall" says 0 '^removed /usr/local/bin/certferry, /usr/local/lib/certferry,' \
        run sh /opt/certferry/install.sh --uninstall
    rm -rf "$tree"
}


# A booted system

boot() {
    systemd-nspawn -D "$tree" -M "certferry-$$" --register=no --keep-unit --boot \
        --link-journal=no --private-network </dev/null >"$work/console" 2>&1 &
    container=$!
    until_true 60 is_up || { cat "$work/console"; false; }
}

is_up() {
    init=$(pgrep -P "$container") || return 1
    state=$(there systemctl is-system-running 2>/dev/null) || true
    [ "$state" = running ] || [ "$state" = degraded ]
}

there() {   # command... in the booted system
    nsenter -t "$init" -m -u -i -n -p env -i HOME=/root \
        PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin "$@"
}

shows() {   # port, name: nginx shows that certificate
    [ "$(there openssl s_client -connect "127.0.0.1:$1" -servername example.com </dev/null \
        2>/dev/null | serial_of)" = "$(serial_of <"$work/pki/$2/cert.pem")" ]
}

switch_upstream() {   # name
    there ln -sfn "/opt/pki/$1" /opt/pki/now
    there systemctl reload nginx
    until_true 10 shows 8443 "$1"
}

write_nginx() {   # name, port, folder of the certificate
    cat >"$tree/etc/nginx/conf.d/$1.conf" <<END
server {
    listen 127.0.0.1:$2 ssl;
    ssl_certificate $3/fullchain.pem;
    ssl_certificate_key $3/privkey.pem;
}
END
}

# What administrators do in hooks. It has to work in the unit as it works in root's shell.
write_hook() {
    mkdir -p "$tree/etc/letsencrypt/renewal-hooks/deploy" "$tree/etc/haproxy" \
        "$tree/var/lib/prometheus" "$tree/home/www"
    cat >"$tree/etc/letsencrypt/renewal-hooks/deploy/everything" <<'END'
#!/bin/sh
set -eux
cat "$RENEWED_LINEAGE/fullchain.pem" "$RENEWED_LINEAGE/privkey.pem" >/etc/haproxy/example.com.pem
date +%s >/var/lib/prometheus/tls.prom
date >"$HOME/hook-was-here"
date >/home/www/hook-was-here
date >/tmp/hook-was-here
systemctl reload nginx
sudo -n -u postgres id -un
su - postgres -c 'id -un'
ssh -o BatchMode=yes -o StrictHostKeyChecking=no root@127.0.0.1 true
printf 'Subject: hook\n\nexample.com is new\n' | sendmail root
mount -t tmpfs hook /mnt
set +x   # or a trace is written when nobody listens any more, which ends its writer
setsid sleep 1000 </dev/null >/dev/null 2>&1 &
echo $! >/run/hook-daemon.pid
END
    chmod 755 "$tree/etc/letsencrypt/renewal-hooks/deploy/everything"
}

prepare_booted() {
    for user in postgres www; do chroot "$tree" useradd -m -s /bin/sh "$user"; done
    write_nginx upstream 8443 /opt/pki/now
    ln -s /opt/pki/first "$tree/opt/pki/now"
    chroot "$tree" sh -c 'cd ~root && ssh-keygen -q -t ed25519 -N "" -f .ssh/id_ed25519 &&
        cp .ssh/id_ed25519.pub .ssh/authorized_keys'
    write_hook
}

hook_worked() {   # every trace of the hook, seen from outside the unit; they are taken away
    there test -s /etc/haproxy/example.com.pem
    there test -s /var/lib/prometheus/tls.prom
    # shellcheck disable=SC2016  # the inner shell's
    there sh -c 'rm "$HOME/hook-was-here" /home/www/hook-was-here /tmp/hook-was-here'
    there umount /mnt
    # shellcheck disable=SC2016
    there sh -c 'kill $(cat /run/hook-daemon.pid)'
    until_true 20 there grep -q 'example.com is new' /var/mail/root
    there rm /var/mail/root
}

no_output() {   # command..., whatever its status
    "$@" >"$work/said" 2>&1 || true
    cat "$work/said"
    [ ! -s "$work/said" ]
}

what_is_left() {
    find "$tree/etc" "$tree/usr" "$tree/var" -name '*certferry*' ! -path "$tree/etc/letsencrypt/*"
    there systemctl list-unit-files --no-pager --no-legend 'certferry*' || true
    there systemctl list-units --no-pager --no-legend --all 'certferry*'
}

try_booted() {
    check "bookworm: a tree with systemd, nginx, sudo, postfix, ssh" make_tree bookworm \
        systemd,systemd-sysv,dbus,python3-minimal,openssl,nginx-light,sudo,postfix,openssh-server
    tree=$work/bookworm
    check "bookworm: prepared" prepare_booted
    boot
    echo "bookworm: booted: ok"
    check "booted: install.sh puts the units" \
        says 0 '^installed /usr/local/bin/certferry, .*, certferry.service, certferry.timer$' \
        there sh /opt/certferry/install.sh
    check "booted: systemd-analyze verify has nothing to say" \
        no_output there systemd-analyze verify \
        /etc/systemd/system/certferry.service /etc/systemd/system/certferry.timer
    check "booted: what a dry run says of the timer" \
        says 0 '^certferry.timer: would be started' there certferry example.com --dry-run \
        --from 127.0.0.1:8443 --key /opt/pki/first/privkey.pem --ca-file /opt/pki/root.pem
    check "booted: first crossing, hook in root's shell, timer started" \
        says 0 '^certferry.timer: started' there certferry example.com --from 127.0.0.1:8443 \
        --key /opt/pki/first/privkey.pem --ca-file /opt/pki/root.pem
    check "booted: the hook worked in root's shell" hook_worked
    check "booted: the timer is active" there systemctl is-active certferry.timer
    check "booted: the timer is enabled" there systemctl is-enabled certferry.timer
    check "booted: the timer is listed" \
        says 0 certferry.service there systemctl list-timers --no-pager certferry.timer
    write_nginx downstream 443 /etc/letsencrypt/live/example.com
    there systemctl reload nginx
    check "booted: nginx shows the first certificate" until_true 10 shows 443 first
    switch_upstream second
    check "booted: systemctl start certferry.service" there systemctl start certferry.service
    check "booted: the certificate is rotated" is_current second
    check "booted: nginx shows the second certificate" until_true 10 shows 443 second
    check "booted: the hook worked in the unit" hook_worked
    check "booted: the journal has the result" \
        says 0 'example.com: installed' there journalctl --no-pager -u certferry.service
    try_failure
    check "booted: exposure, reported and not aimed at" there systemd-analyze security \
        --no-pager certferry.service
    tail -n 1 "$work/log" | tr -cd '[:print:]' && echo
    echo '# the next version' >>"$tree/opt/certferry/certferry.py"
    check "booted: an upgrade says what it replaced" \
        says 0 '^installed /usr/local/lib/certferry$' there sh /opt/certferry/install.sh
    check "booted: the timer runs on" there systemctl is-active certferry.timer
    check "booted: what was remembered is kept" \
        says 0 '^example.com: unchanged' there certferry renew
    try_coming_back
    check "booted: uninstall" says 0 'nothing renews these now: example.com (until 20' \
        there sh /opt/certferry/install.sh --uninstall
    there rm -r /etc/systemd/system/certferry.service.d
    there systemctl daemon-reload
    check "booted: nothing is left" no_output what_is_left
    check "booted: nginx still shows the certificate" until_true 10 shows 443 third
    there systemctl poweroff 2>/dev/null || true
    wait "$container" || true
    container=''
}

try_coming_back() {   # after uninstall and install the timer is off: it says so, and what helps
    check "booted: another program's timer is refused" refuses_another_timer
    check "booted: uninstalled" says 0 '^removed ' there sh /opt/certferry/install.sh --uninstall
    check "booted: installed again, it says that no timer is on" \
        says 0 '^example.com is set up here and no timer is on. Try: systemctl' \
        there sh /opt/certferry/install.sh
    check "booted: what it advises" do_what_it_says
    check "booted: the timer is active again" there systemctl is-active certferry.timer
    check "booted: and then it says no more" no_word_of 'no timer is on' \
        there sh /opt/certferry/install.sh
}

do_what_it_says() {   # the command that was advised last
    # shellcheck disable=SC2046  # words
    there $(sed -n 's/.*timer.* Try: //p' "$work/said")
}

refuses_another_timer() {
    printf '[Timer]\nOnCalendar=daily\nUnit=certferry.service\n' \
        >"$tree/etc/systemd/system/certferry-renew.timer"
    there systemctl daemon-reload
    there systemctl start certferry-renew.timer
    says 1 'is active. Try: systemctl disable --now certferry-renew.timer' \
        there sh /opt/certferry/install.sh
    do_what_it_says
    rm "$tree/etc/systemd/system/certferry-renew.timer"
    there systemctl daemon-reload
}

try_failure() {   # a failing hook makes the unit fail, visibly; the next run makes up for it
    mkdir -p "$tree/etc/systemd/system/certferry.service.d"
    printf '[Unit]\nOnFailure=tell-me@%%n.service\n' \
        >"$tree/etc/systemd/system/certferry.service.d/override.conf"
    printf '[Service]\nType=oneshot\nExecStart=/usr/bin/touch /run/told-%%i\n' \
        >"$tree/etc/systemd/system/tell-me@.service"
    there systemctl daemon-reload
    printf '#!/bin/sh\ntest -e /run/hook-may-succeed\n' \
        >"$tree/etc/letsencrypt/renewal-hooks/deploy/failing"
    chmod 755 "$tree/etc/letsencrypt/renewal-hooks/deploy/failing"
    switch_upstream third
    check "booted: a failing hook makes the unit fail" \
        says 1 failed there systemctl start certferry.service
    check "booted: systemctl --failed names it" \
        says 0 certferry.service there systemctl --no-pager --failed
    check "booted: OnFailure= fired" until_true 10 there test -e /run/told-certferry.service
    check "booted: the journal has the problem as an error" says 0 'failing' \
        there journalctl --no-pager -u certferry.service -p err
    check "booted: the certificate is there all the same" is_current third
    check "booted: and the other hook did its work" hook_worked
    there touch /run/hook-may-succeed
    check "booted: the next run makes up for it" there systemctl start certferry.service
    check "booted: and is no failure" \
        says 3 inactive there systemctl is-active certferry.service
}


check "certificates to try" mint
try_minimal bullseye
try_minimal trixie
try_newest
try_booted
