#!/bin/sh
# Makes apt install the Debian packages of the day on which the base image was made, from Debian's archive of snapshots:
# the same digest gives the same packages. The image itself names the snapshots, in comments of its list of sources.
set -eu
sources="${1:-/etc/apt/sources.list.d/debian.sources}"
if ! grep -q '^# http://snapshot\.debian\.org/' "$sources"; then
  echo "$sources names no snapshot: the base image must be an official Debian image." >&2
  exit 1
fi
sed -i -E '/^# http:\/\/snapshot\.debian\.org\//{N;s|^# ([^\n]+)\nURIs: [^\n]*|URIs: \1|}' "$sources"
if grep '^URIs:' "$sources" | grep -qv '^URIs: http://snapshot\.debian\.org/'; then
  echo "$sources has a source without a snapshot." >&2
  exit 1
fi
# Signatures are checked as ever; only their age is not.
if [ -d "${2:-/etc/apt/apt.conf.d}" ]; then
  echo 'Acquire::Check-Valid-Until "false";' > "${2:-/etc/apt/apt.conf.d}/snapshot"
fi
