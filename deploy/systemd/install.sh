#!/usr/bin/env bash
# Installs the node, or a newer version of it, as a systemd service. As root:
#
#     deploy/systemd/install.sh [--parts] [--gpu] [PACKAGE]
#
# PACKAGE is what pip takes: a wheel, or this checkout, which is the default. --parts installs a unit
# for each part instead of one for all; --gpu lets the part that scores use NVIDIA devices.
# /etc/dicomnode and /var/lib/dicomnode are left as they are. Run it again to upgrade.
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
root=${here%/deploy/systemd}
home=/opt/dicomnode
units=/etc/systemd/system
parts=(dicomnode)
scores=dicomnode
gpu=
package=$root
for argument in "$@"; do
    case $argument in
        --parts) parts=(dicomnode-receive dicomnode-work dicomnode-exchange dicomnode-web) scores=dicomnode-work ;;
        --gpu) gpu=yes ;;
        --help | -h) sed -n '2,9s/^# \{0,1\}//p' "$0"; exit 0 ;;
        -*) echo "install.sh: no such option: $argument" >&2; exit 2 ;;
        *) package=$argument ;;
    esac
done
[ "$(id -u)" = 0 ] || { echo "install.sh: run it as root" >&2; exit 1; }

python=${PYTHON:-python3}
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    { echo "install.sh: Python 3.11 or newer is needed: PYTHON=python3.11 $0" >&2; exit 1; }
[ -x "$home/bin/python" ] || "$python" -m venv "$home"
"$home/bin/pip" install --quiet --upgrade --constraint "$root/constraints.txt" "$package"

systemd-sysusers "$here/sysusers.conf"
install -d -m 0750 -o root -g dicomnode /etc/dicomnode
[ -e /etc/dicomnode/node.toml ] ||
    install -m 0640 -o root -g dicomnode "$root/docs/node.toml" /etc/dicomnode/node.toml

for part in "${parts[@]}"; do
    install -m 0644 "$here/$part.service" "$units/"
    install -d "$units/$part.service.d"
    install -m 0644 "$here/hardening.conf" "$units/$part.service.d/10-hardening.conf"
done
[ "$scores" = dicomnode ] || install -m 0644 "$here/dicomnode-parts.target" "$units/"
if [ -n "$gpu" ]; then
    install -m 0644 "$here/gpu.conf" "$units/$scores.service.d/20-gpu.conf"
fi
[ ! -d /run/systemd/system ] || systemctl daemon-reload

cat <<END
Installed $("$home/bin/dicomnode" --version).
1. Edit /etc/dicomnode/node.toml: [node] host and peers, [database] url.
2. Try it:         cd /var/lib/dicomnode && sudo -u dicomnode $home/bin/dicomnode check --config /etc/dicomnode/node.toml
3. After an upgrade that says so in CHANGELOG.md: dicomnode db upgrade, as in 2.
4. Start it:       systemctl enable --now $([ "$scores" = dicomnode ] && echo dicomnode || echo dicomnode-parts.target "${parts[@]}")
END
