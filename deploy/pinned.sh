#!/bin/sh
# Refuses a base image that is not named by its digest: a tag can be moved to another image tomorrow.
set -eu
image="${1-}"
digest="${image##*@sha256:}"
case "$image" in
*@sha256:*) ;;
*)
  echo "BASE_IMAGE=$image has no digest: give NAME@sha256:... (docs/deploy.md says how to find it)." >&2
  exit 1
  ;;
esac
case "$digest" in
*[!0-9a-f]*) bad=1 ;;
*) bad=0 ;;
esac
if [ "$bad" = 1 ] || [ "${#digest}" != 64 ]; then
  echo "BASE_IMAGE=$image: a digest is sha256: and 64 hexadecimal digits." >&2
  exit 1
fi
